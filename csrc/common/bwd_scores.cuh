// Score policies of the backward, on tiles whose rows are keys and whose columns are queries (S^T): what makes exponents of
// raw scores, and what the gradient passes on its way back. The forward's policies are in scores.cuh.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/scores.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

// Statistics of the queries of the thread's columns lie in shared memory: two neighbours at a time.
__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

// The scale alone.
struct BwdPlainScore {
  static constexpr bool kModifies = false;
  float log2_scale;

  __device__ __forceinline__ explicit BwdPlainScore(const ScoreParams& params)
      : log2_scale(params.scale_log2) {}
  __device__ __forceinline__ void begin_item(const ScoreParams&, const RowRange&, int, int, int) {}
  __device__ __forceinline__ void begin_head(const ScoreParams&, int, int) {}

  // acc_s: scores in, exponents of P out (log2). lse: address of the statistics of the thread's first column.
  template <int kNumAcc>
  __device__ __forceinline__ void exponents(float (&acc_s)[kNumAcc], uint32_t lse, int /*distance*/) const {
#pragma unroll
    for (int i = 0; i < kNumAcc; i += 4) {
      const float2 pair = load_shared_pair(lse + acc_col_offset(i) * 4);
      acc_s[i] = fmaf(acc_s[i], log2_scale, -pair.x);
      acc_s[i + 1] = fmaf(acc_s[i + 1], log2_scale, -pair.y);
      acc_s[i + 2] = fmaf(acc_s[i + 2], log2_scale, -pair.x);
      acc_s[i + 3] = fmaf(acc_s[i + 3], log2_scale, -pair.y);
    }
  }
};

// Softcap, ALiBi and key bias, each switched on by its number.
struct BwdModifiedScore {
  static constexpr bool kModifies = true;
  ScoreNumbers numbers;
  float bias[2];      // of the thread's keys, log2 units
  float bias_sum[2];  // gradient of the bias of these keys: this thread's part
  float slope;        // of the query head, log2 units

  __device__ __forceinline__ explicit BwdModifiedScore(const ScoreParams& params) : numbers{params} {}

  // first_key: position of the thread's first key; the second is eight further.
  __device__ __forceinline__ void begin_item(const ScoreParams& params, const RowRange& keys, int /*index*/, int head_kv,
                                             int first_key) {
    const float* of_keys = first_bias(params, keys.batch, head_kv, keys.first_row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + 8 * half;
      bias[half] = of_keys != nullptr && key < keys.num_rows ? __ldg(of_keys + key) * kLog2e : 0.f;
      bias_sum[half] = 0.f;
    }
  }
  // index: of the sequence.
  __device__ __forceinline__ void begin_head(const ScoreParams& params, int index, int head) {
    slope = alibi_slope(params, index, head);
  }

  // distance: from the thread's first key to the query of its first column.
  template <int kNumAcc>
  __device__ __forceinline__ void exponents(float (&acc_s)[kNumAcc], uint32_t lse, int distance) const {
    if (numbers.has_large_softcap()) {
#pragma unroll
      for (float& score : acc_s) score = numbers.capped<true>(score);
    } else if (numbers.has_softcap()) {
#pragma unroll
      for (float& score : acc_s) score = numbers.capped<false>(score);
    } else {
#pragma unroll
      for (float& score : acc_s) score = numbers.scaled(score);
    }
    if (numbers.has_alibi()) {
      const float from = static_cast<float>(distance);
#pragma unroll
      for (int i = 0; i < kNumAcc; ++i) {
        acc_s[i] = ScoreNumbers::with_alibi(acc_s[i], slope, from + float(acc_col_offset(i) - 8 * acc_half(i)));
      }
    }
#pragma unroll
    for (int i = 0; i < kNumAcc; i += 4) {
      const float2 pair = load_shared_pair(lse + acc_col_offset(i) * 4);
      acc_s[i] += bias[0] - pair.x;
      acc_s[i + 1] += bias[0] - pair.y;
      acc_s[i + 2] += bias[1] - pair.x;
      acc_s[i + 3] += bias[1] - pair.y;
    }
  }

  // What softcap multiplies the gradient with, 1 - tanh^2, from the weight p itself: log2(p) is the exponent, which less
  // everything that came after softcap is softcap * tanh. No registers have to keep the scores. A weight of 0, whose
  // gradient is 0, gives a finite factor.
  __device__ __forceinline__ float softcap_factor(float p, float lse, int half, float distance) const {
    float capped = fast_log2(p) + lse - bias[half];
    if (numbers.has_alibi()) capped = fmaf(slope, fabsf(distance), capped);
    const float tanh = fmaxf(-1.f, fminf(1.f, capped * fast_reciprocal(numbers.params.cap_outer)));
    return 1.f - tanh * tanh;
  }
};

template <class Score>
struct BackwardOf;
template <>
struct BackwardOf<PlainScore> {
  using Type = BwdPlainScore;
};
template <>
struct BackwardOf<ModifiedScore> {
  using Type = BwdModifiedScore;
};

}  // namespace flash_ext
