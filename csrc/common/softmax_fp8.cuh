// Online softmax for e4m3 weights, over the accumulator fragment of fragment.cuh. As softmax.cuh, but weights are
// exp2(scale * s - max + 8), so that they fill e4m3's range up to 256 (the factor 2^8 cancels when a row is divided by its
// sum), and the scale may change between segments of columns, one for each block of keys with a scale of its own.
#pragma once

#include <cfloat>

#include "common/fragment.cuh"
#include "common/math.cuh"

namespace flash_ext {

constexpr float kWeightOffset = 8.f;  // log2 of the largest weight

struct OnlineSoftmaxFp8 {
  // Of scale * s, log2 units, equal in the four threads of a row; finite before any key is seen, so that a score of -inf
  // has the weight 0 without a guard.
  float scaled_max[2] = {-0.5f * FLT_MAX, -0.5f * FLT_MAX};
  float row_sum[2] = {0.f, 0.f};  // this thread's part of the sum of weights

  // acc_s: scores in, weights out. scales: > 0, of segments of equally many columns, for both rows or for each. Returns in
  // `rescale` what earlier results of the two rows are multiplied with.
  template <int kNumAcc, int kRows, int kSegments>
  __device__ __forceinline__ void update(float (&acc_s)[kNumAcc], const float (&scales)[kRows][kSegments],
                                         float (&rescale)[2]) {
    constexpr int kChains = 4;  // independent ones hide the latency
    constexpr int kPerSegment = kNumAcc / kSegments;
    static_assert(kNumAcc % kSegments == 0 && kPerSegment >= 4 * kChains && kPerSegment % 16 == 0,
                  "a segment is made of 32 columns");
    float subtrahend[2];
    float tile_max[2] = {scaled_max[0], scaled_max[1]};
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      float partial[2][kChains];
#pragma unroll
      for (int n = 0; n < kPerSegment; ++n) {
        const int i = segment * kPerSegment + n;
        float& chain = partial[acc_half(i)][acc_position(n) % kChains];
        chain = acc_position(n) < kChains ? acc_s[i] : fmaxf(chain, acc_s[i]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&p)[kChains] = partial[half];
        const float scale = scales[half % kRows][segment];
        tile_max[half] = fmaxf(tile_max[half], scale * fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3])));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile_max[half] = fmaxf(tile_max[half], __shfl_xor_sync(0xffffffffu, tile_max[half], 1));
      tile_max[half] = fmaxf(tile_max[half], __shfl_xor_sync(0xffffffffu, tile_max[half], 2));
      rescale[half] = fast_exp2(scaled_max[half] - tile_max[half]);
      scaled_max[half] = tile_max[half];
      subtrahend[half] = tile_max[half] - kWeightOffset;
    }
    float sums[2][kChains];
#pragma unroll
    for (int i = 0; i < kNumAcc; ++i) {
      acc_s[i] = fast_exp2(fmaf(acc_s[i], scales[acc_half(i) % kRows][i / kPerSegment], -subtrahend[acc_half(i)]));
      float& chain = sums[acc_half(i)][acc_position(i) % kChains];
      chain = acc_position(i) < kChains ? acc_s[i] : chain + acc_s[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&p)[kChains] = sums[half];
      row_sum[half] = fmaf(row_sum[half], rescale[half], (p[0] + p[1]) + (p[2] + p[3]));
    }
  }

  // Both rows with the same scales.
  template <int kNumAcc, int kSegments>
  __device__ __forceinline__ void update(float (&acc_s)[kNumAcc], const float (&scales)[kSegments], float (&rescale)[2]) {
    float of_both[1][kSegments];
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) of_both[0][segment] = scales[segment];
    update(acc_s, of_both, rescale);
  }

  // As OnlineSoftmax::finish.
  __device__ __forceinline__ void finish(const float (&sinks)[2], float (&normalise)[2], float (&lse)[2], float (&largest)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const bool empty = sum == 0.f;  // the largest weight of any other row is about 2^8; NaN stays NaN
      largest[half] = empty ? -INFINITY : sum == sum ? kLn2 * scaled_max[half] : NAN;
      const float sink = sinks[half] * kLog2e;
      const float reference = fmaxf(scaled_max[half], sink);  // finite, or a sink of +inf
      const float shrink = fast_exp2(scaled_max[half] - reference);
      const float total = fmaf(sum, shrink, fast_exp2(sink - reference + kWeightOffset));
      normalise[half] = empty ? 0.f : shrink * fast_reciprocal(total);
      lse[half] = kLn2 * (reference - kWeightOffset + fast_log2(total));
    }
  }
};

}  // namespace flash_ext
