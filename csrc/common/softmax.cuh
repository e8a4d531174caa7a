// Online softmax over the accumulator fragment of fragment.cuh: a thread keeps the running maximum and sum of its two
// rows, four neighbouring threads share a row. Scores s are raw; weights are exp2(scale * s - scale * max).
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"

namespace flash_ext {

// Whether a row may have seen no key yet after the tile at hand: only masked tiles pay for the guard.
struct RowsMayBeEmpty {
  __device__ __forceinline__ static float subtrahend(float scaled_max) {
    return scaled_max == -INFINITY ? 0.f : scaled_max;
  }
};
struct RowsSeeKeys {
  __device__ __forceinline__ static float subtrahend(float scaled_max) { return scaled_max; }
};

struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};     // of raw scores, equal in the four threads
  float scaled_max[2] = {-INFINITY, -INFINITY};  // row_max * scale, rounded once: what weights refer to
  float row_sum[2] = {0.f, 0.f};                 // this thread's part of the sum of weights

  // acc_s: scores in, weights out. Returns in `rescale` what earlier results of the two rows are multiplied with.
  template <class Guard, int kNumAcc>
  __device__ __forceinline__ void update(float (&acc_s)[kNumAcc], float scale, float (&rescale)[2]) {
    // Independent chains hide the latency; a tree of maxima costs no more instructions than a chain.
    constexpr int kChains = 4;
    static_assert(kNumAcc >= 4 * kChains, "each row must fill every chain");
    float partial[2][kChains];
#pragma unroll
    for (int i = 0; i < kNumAcc; ++i) {
      float& chain = partial[acc_half(i)][position(i) % kChains];
      chain = position(i) < kChains ? acc_s[i] : fmaxf(chain, acc_s[i]);
    }
    float subtrahend[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float (&p)[kChains] = partial[half];
      float tile_max = fmaxf(fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3])), row_max[half]);
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
      row_max[half] = tile_max;
      const float before = scaled_max[half];
      scaled_max[half] = tile_max * scale;
      subtrahend[half] = Guard::subtrahend(scaled_max[half]);
      rescale[half] = fast_exp2(before - subtrahend[half]);
    }
#pragma unroll
    for (int i = 0; i < kNumAcc; ++i) {
      acc_s[i] = fast_exp2(fmaf(acc_s[i], scale, -subtrahend[acc_half(i)]));
      float& chain = partial[acc_half(i)][position(i) % kChains];
      chain = position(i) < kChains ? acc_s[i] : chain + acc_s[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&p)[kChains] = partial[half];
      row_sum[half] = fmaf(row_sum[half], rescale[half], (p[0] + p[1]) + (p[2] + p[3]));
    }
  }

  // After the last tile: completes the sums. `normalise`: what the output rows are multiplied with, 0 for rows that saw
  // no key; `lse`: natural logarithm of the sum of exp(scale * s), -inf for such rows.
  __device__ __forceinline__ void finish(float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const bool empty = sum == 0.f;  // the largest weight of any other row is about 1; NaN stays NaN
      normalise[half] = empty ? 0.f : fast_reciprocal(sum);
      lse[half] = empty ? -INFINITY : kLn2 * (scaled_max[half] + fast_log2(sum));
    }
  }

 private:
  // Position of an accumulator among those of its row.
  __device__ __forceinline__ static constexpr int position(int i) { return 2 * (i >> 2) + (i & 1); }
};

}  // namespace flash_ext
