// PLAN of a call over a KV cache: as plan.h, a pure function that makes no CUDA call and reads no device memory.
#pragma once

#include <string>
#include <vector>

#include "host/plan.h"

namespace flash_ext {

struct CacheProblem {
  ScalarType dtype{};
  TensorLayout q, k_cache, v_cache;  // caches: (blocks, rows, num_heads_kv, head_dim)
  bool paged = false;
  bool leftpad = false;
  bool appends = false;
  bool shared_values = false;  // v_cache is the first columns of k_cache's rows
  int64_t capacity = 0;     // rows that a sequence can have
  int64_t rotary_dim = 0;   // 0: no rotation
  int64_t window_left = -1, window_right = -1;  // -1: unbounded; causal has become right = 0
  bool modified_score = false;
  double softmax_scale = 1;
  int64_t num_splits = 0;  // 0: chosen on the device
  std::string backend;     // asked for by name; empty: any
  ScalarType out_dtype = dtype;  // another one where that is e4m3
  bool block_scales = false;     // of e4m3 keys or values: one for every 64 rows

  int64_t batch() const { return q.sizes[0]; }
  int64_t seqlen_q() const { return q.sizes[1]; }
  int64_t num_heads() const { return q.sizes[2]; }
  int64_t num_heads_kv() const { return k_cache.sizes[2]; }
};

struct CachePlan {
  const Variant* variant = nullptr;  // of the forward; null: the reference, for these reasons
  std::string backend;               // "sm90" or "sm80", of the variant
  std::vector<std::string> reasons;
  int64_t grid = 0;
  int heads_per_tile = 1;
  int64_t num_m_blocks = 0;    // tiles of queries of one head, or of heads that share a tile
  int64_t items_per_part = 0;  // num_m_blocks for every such head
  int64_t max_parts = 0;       // room for partial results; 0: sequences are not split
  bool prepares = false;       // append_kv runs

  std::string reasons_as_text() const;
};

CachePlan plan_kvcache(const CacheProblem& problem, const DeviceInfo& device);

}  // namespace flash_ext
