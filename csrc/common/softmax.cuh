// Online softmax over the accumulator fragment of fragment.cuh: a thread keeps the running maximum and sum of its two
// rows, four neighbouring threads share a row. Scores s are raw; weights are exp2(scale * s - scale * max).
#pragma once

#include <cfloat>

#include "common/fragment.cuh"
#include "common/math.cuh"

namespace flash_ext {

struct OnlineSoftmax {
  float row_max[2];     // of raw scores, equal in the four threads; of a row that has seen no key yet, far below any
  float scaled_max[2];  // row_max * scale, rounded once: what weights refer to
  float row_sum[2] = {0.f, 0.f};  // this thread's part of the sum of weights

  OnlineSoftmax() = default;  // for arrays, assigned before use

  // The maxima start finite, and so do their products with the scale: scores of -inf, hidden or not, get the weight
  // exp2(-inf - finite) = 0 with no guard in any loop.
  __device__ __forceinline__ explicit OnlineSoftmax(float scale) {
    constexpr float kShrink = 0x1p-64f;  // keeps the reciprocal of the largest scale from being flushed to 0
    const float lowest = -0.5f * FLT_MAX * (scale > 1.f ? kShrink * fast_reciprocal(scale * kShrink) : 1.f);
    row_max[0] = row_max[1] = lowest;
    scaled_max[0] = scaled_max[1] = lowest * scale;
  }

  // acc_s: scores in, weights out. Returns in `rescale` what earlier results of the two rows are multiplied with.
  template <int kNumAcc>
  __device__ __forceinline__ void update(float (&acc_s)[kNumAcc], float scale, float (&rescale)[2]) {
    // Independent chains hide the latency; a tree of maxima costs no more instructions than a chain.
    constexpr int kChains = 4;
    static_assert(kNumAcc >= 4 * kChains, "each row must fill every chain");
    float partial[2][kChains];
#pragma unroll
    for (int i = 0; i < kNumAcc; ++i) {
      float& chain = partial[acc_half(i)][acc_position(i) % kChains];
      chain = acc_position(i) < kChains ? acc_s[i] : fmaxf(chain, acc_s[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float (&p)[kChains] = partial[half];
      float tile_max = fmaxf(fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3])), row_max[half]);
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
      row_max[half] = tile_max;
      const float before = scaled_max[half];
      scaled_max[half] = tile_max * scale;
      rescale[half] = fast_exp2(before - scaled_max[half]);
    }
#pragma unroll
    for (int i = 0; i < kNumAcc; ++i) {
      acc_s[i] = fast_exp2(fmaf(acc_s[i], scale, -scaled_max[acc_half(i)]));
      float& chain = partial[acc_half(i)][acc_position(i) % kChains];
      chain = acc_position(i) < kChains ? acc_s[i] : chain + acc_s[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&p)[kChains] = partial[half];
      row_sum[half] = fmaf(row_sum[half], rescale[half], (p[0] + p[1]) + (p[2] + p[3]));
    }
  }

  // After the last tile: completes the sums. sinks: in natural-log units, of the two rows; -inf where there are none.
  // `normalise`: what the output rows are multiplied with, 0 for rows that saw no key; `lse`: natural logarithm of the
  // denominator, the sink (-inf without) for such rows; `largest`: the row's largest score, natural units.
  __device__ __forceinline__ void finish(const float (&sinks)[2], float (&normalise)[2], float (&lse)[2],
                                         float (&largest)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const bool empty = sum == 0.f;  // the largest weight of any other row is about 1; NaN stays NaN
      largest[half] = empty ? -INFINITY : sum == sum ? kLn2 * scaled_max[half] : NAN;
      const float sink = sinks[half] * kLog2e;
      const float reference = fmaxf(scaled_max[half], sink);  // finite, or a sink of +inf
      const float shrink = fast_exp2(scaled_max[half] - reference);
      const float total = fmaf(sum, shrink, fast_exp2(sink - reference));
      normalise[half] = empty ? 0.f : shrink * fast_reciprocal(total);
      lse[half] = kLn2 * (reference + fast_log2(total));
    }
  }
};

}  // namespace flash_ext
