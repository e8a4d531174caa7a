// The variants as data: what the planner chooses from. Defined by the generated variant_table.cpp; an install without
// nvcc has the table too, for plans of imagined GPUs, but no kernels.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace flash_ext {

enum class ScalarType : uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64, kBool, kFloat8E4m3 };

enum class Op : uint8_t {
  k_fwd,
  k_bwd,
  k_bwd_preprocess,
  k_bwd_postprocess,
  k_bwd_sinks,
  k_fill_unused,
  k_mask_blocks,
  k_append_kv,
  k_combine,
  k_fwd_cache,
  k_fwd_cache_gather,
  k_fwd_mla,
  k_fwd_mla_gather,
  k_quantize_fp8,
  k_fwd_fp8,
  k_fwd_fp8_cache,
  k_fwd_fp8_cache_gather
};

// In the order of generality: a mask can stand in for every one before it; but k_blocks, which needs lists, and
// k_segments, which needs tables, for none.
enum class Mask : uint8_t { k_none, k_full, k_causal, k_local, k_blocks, k_segments };

// A modified score can stand in for a plain one.
enum class Score : uint8_t { k_plain, k_modified };

// A row of csrc/rows, where each column (rows/model.py) is explained.
struct Variant {
  const char* name;
  Op op;
  int arch;  // 80, 89 or 90: the lowest architecture that runs it, and the group it was compiled in
  ScalarType dtype;
  int head_dim;    // the largest it covers; smaller multiples of 8 too; 0: any
  int head_dim_v;  // the same
  Mask mask;
  Score score;
  int block_m;
  int block_n;
  int smem_bytes;  // what a CTA of the device must be allowed, where rows differ in that; 0: every device has enough
  const char* kind;  // what tells apart rows that are otherwise alike, '' where there are none
};

const char* op_name(Op op);

std::span<const Variant> variants();

}  // namespace flash_ext
