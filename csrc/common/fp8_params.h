// What crosses to the FP8 forward, beside FwdParams.
#pragma once

#include "common/kvcache_params.h"
#include "common/params.h"

namespace flash_ext {

// Scales of one tensor, float32, as flash_ext.quantize_fp8 returns them: data[sequence * batch_stride + head /
// heads_per_scale * head_stride + block * block_step], block counting 64 rows of the sequence, for packed sequences from
// its first slot (seqlens.cuh) in place of sequence * batch_stride. Strides of 0 share a scale; null: 1.
struct Descale {
  const float* data;
  int64_t batch_stride;
  int64_t head_stride;
  int heads_per_scale;
  int block_step;  // 1, or 0
};

// q, k, v: e4m3, strides in bytes; out: bf16 or fp16.
struct FwdFp8Params : FwdParams {
  Descale q_descale, k_descale, v_descale;
  bool out_is_fp16;
};

// Over a cache. Scales of k and v for each 64 rows count by their places: data[block of the cache * batch_stride + head *
// head_stride + row in it / 64].
struct FwdFp8CacheParams : FwdCacheParams {
  Descale q_descale, k_descale, v_descale;
  bool out_is_fp16;
};

}  // namespace flash_ext
