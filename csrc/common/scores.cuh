// Score policy: what happens to q.k before the softmax, in this order (natural units):
//   s = softmax_scale * q.k;  s = softcap * tanh(s / softcap);  s -= slope * |distance to the diagonal|;  s += k_bias[key]
#pragma once

#include <cfloat>

#include "common/math.cuh"

namespace flash_ext {

struct ScoreParams {
  float softmax_scale;
  float softcap;                 // 0: off
  const float* alibi_slopes;     // (batch, num_heads), natural-log units; null: off
  int64_t alibi_batch_stride;    // 0: one for all of the batch
  const float* k_bias;           // (batch, num_heads_kv, seqlen_k) or packed (num_heads_kv, total_k), natural-log units; null: off
  int64_t k_bias_batch_stride;   // 0 when packed
  int64_t k_bias_head_stride;
};

// softmax_scale * q.k, by folding the scale and log2(e) into the argument of exp2. The online softmax needs a scale
// above zero (a maximum of scores must be the maximum of scaled scores, and -inf * 0 is NaN), so a negative scale flips
// the signs of Q in shared memory and a zero scale clears it: exact, and free for everybody else.
struct FoldedScale {
  float log2_scale;      // > 0
  uint32_t q_keep_bits;  // Q, two elements at a time, becomes (q & keep) ^ flip
  uint32_t q_flip_bits;

  FX_HOST_DEVICE constexpr bool changes_q() const {
    return q_keep_bits != 0xffffffffu || q_flip_bits != 0;
  }
};

FX_HOST_DEVICE constexpr FoldedScale fold_scale(float softmax_scale) {
  const float magnitude = softmax_scale < 0 ? -softmax_scale : softmax_scale;
  const float log2_scale = min_of(magnitude, FLT_MAX / kLog2e) * kLog2e;
  if (log2_scale == 0) return {1.f, 0, 0};
  return {log2_scale, 0xffffffffu, softmax_scale < 0 ? 0x80008000u : 0};
}

// The scale alone.
struct PlainScore {
  static constexpr bool kModifies = false;
};

// Every modification, each switched on by its number: branches that a whole warp takes alike, once for each tile. Scores
// leave in log2 units, so that the softmax's own scale is 1.
struct ModifiedScore {
  static constexpr bool kModifies = true;
};

#ifdef __CUDACC__
// tanh to float32 accuracy in two MUFU; tanh.approx would leave 2^-11 of the cap, percents of a weight.
__device__ __forceinline__ float accurate_tanh(float x) {
  return 1.f - 2.f * fast_reciprocal(1.f + fast_exp2(2.f * kLog2e * x));
}

// softcap * tanh(scale * qk / softcap) in log2 units, by the two factors that depend on the call alone. Backward: the
// derivative by the scaled score is 1 - tanh^2.
struct Softcap {
  float inner;  // softmax_scale / softcap
  float outer;  // softcap * log2(e)

  __device__ __forceinline__ explicit Softcap(const ScoreParams& params)
      : inner(params.softmax_scale / params.softcap), outer(params.softcap * kLog2e) {}
  __device__ __forceinline__ float tanh_of(float qk) const { return accurate_tanh(inner * qk); }
};
#endif

}  // namespace flash_ext
