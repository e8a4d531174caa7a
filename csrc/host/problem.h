// The problem of one call as plain numbers: no torch, no CUDA, so that the planner can be tested anywhere.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "host/registry.h"

namespace flash_ext {

// A (batch, seqlen, num_heads, head_dim) tensor without its data; strides in elements.
struct TensorLayout {
  std::array<int64_t, 4> sizes{};
  std::array<int64_t, 4> strides{};
  bool base_aligned = true;  // the first element lies on a 16-byte boundary
};

// Gradients, as bits: those of `wanted` in flash_ext/call.py.
enum Gradient : int64_t { kWantDq = 1, kWantDk = 2, kWantDv = 4, kWantDsinks = 8, kWantDkBias = 16 };
// Whether pairs of CTAs run the backward, where rows of both kinds cover a call.
enum class Pairs : uint8_t { kByRule, kNever, kAlways };
// "auto", "never" or "always"; std::invalid_argument otherwise.
Pairs pairs_from_name(std::string_view name);

struct FwdProblem {
  ScalarType dtype{};
  TensorLayout q, k, v;         // packed sequences: batch 1
  int64_t num_sequences = -1;   // of a packed batch; -1: not packed
  int64_t num_parts = 0;        // parts of the keys with results of their own; 0: the whole, without that dimension
  bool causal = false;
  int64_t window_left = -1;   // -1: unbounded
  int64_t window_right = -1;  // -1: unbounded
  double softmax_scale = 1.0;
  double softcap = 0.0;  // 0: off
  bool deterministic = false;  // of the backward
  int64_t wanted = kWantDq | kWantDk | kWantDv | kWantDsinks | kWantDkBias;  // of the backward
  bool sinks = false, alibi = false, k_bias = false, leftpad = false;
  Pairs pairs = Pairs::kByRule;  // of the backward
  bool block_mask = false;  // which keys are seen is told by lists, and causal and windows are part of them
  bool grouped = false;     // packed: short sequences share a tile, and tables tell which keys are seen
  std::string backend;   // empty: the planner chooses

  bool packed() const { return num_sequences >= 0; }
  int64_t batch() const { return packed() ? num_sequences : q.sizes[0]; }
  int64_t seqlen_q() const { return q.sizes[1]; }  // packed: of all sequences
  int64_t seqlen_k() const { return k.sizes[1]; }
  int64_t num_heads() const { return q.sizes[2]; }
  int64_t num_heads_kv() const { return k.sizes[2]; }
  int64_t head_dim() const { return q.sizes[3]; }
  int64_t head_dim_v() const { return v.sizes[3]; }
};

int element_size(ScalarType dtype);
const char* dtype_name(ScalarType dtype);

// Why 16-byte accesses and TMA cannot read the tensor where it lies, so that it is copied; null when they can. Strides of
// dimensions of size 1 do not matter. Heads and batches may have stride 0 (an expanded tensor); for rows that is a case of
// which cuTensorMapEncodeTiled's documentation says nothing.
const char* why_copied(const TensorLayout& layout, ScalarType dtype);

}  // namespace flash_ext
