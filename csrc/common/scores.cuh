// Score policy: what happens to q.k before the softmax, in this order (natural units):
//   s = softmax_scale * q.k;  s = softcap * tanh(s / softcap);  s -= slope * |distance to the diagonal|;  s += k_bias[key]
#pragma once

#include <cfloat>

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

struct ScoreParams {
  float softmax_scale;
  float softcap;  // 0: off
  // What follows from the two, see with_factors; read as constants by every instruction that needs them.
  float scale_log2;  // softmax_scale * log2(e), of any sign
  float cap_inner;   // softmax_scale / softcap
  float cap_outer;   // softcap * log2(e)
  const float* alibi_slopes;     // (batch, num_heads), natural-log units; null: off
  int64_t alibi_batch_stride;    // 0: one for all of the batch
  const float* k_bias;           // (batch, num_heads_kv, seqlen_k) or packed (num_heads_kv, total_k), natural-log units; null: off
  int64_t k_bias_batch_stride;   // 0 when packed
  int64_t k_bias_head_stride;
};

constexpr ScoreParams with_factors(ScoreParams params) {
  params.scale_log2 = params.softmax_scale * kLog2e;
  params.cap_inner = params.softcap > 0 ? params.softmax_scale / params.softcap : 0.f;
  params.cap_outer = params.softcap * kLog2e;
  return params;
}

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

#ifdef __CUDACC__
// tanh in two MUFU, off by about 2^-23; tanh.approx would leave 2^-11 of the cap, percents of a weight.
__device__ __forceinline__ float accurate_tanh(float x) {
  return 1.f - 2.f * fast_reciprocal(1.f + fast_exp2(2.f * kLog2e * x));
}
// With a small relative error near 0 too, by the first terms of the series.
__device__ __forceinline__ float precise_tanh(float x) {
  const float square = x * x;
  const float near_zero = fmaf(x, square * fmaf(square, 2.f / 15.f, -1.f / 3.f), x);
  return fabsf(x) < 0.1f ? near_zero : accurate_tanh(x);
}

// The modifications of one element, in the order of their use; scores in log2 units. What forward and backward share.
struct ScoreNumbers {
  const ScoreParams& params;

  __device__ __forceinline__ bool has_softcap() const { return params.softcap > 0.f; }
  // A large cap magnifies the errors of tanh near 0, where the scores then are.
  __device__ __forceinline__ bool has_large_softcap() const { return params.softcap > 512.f; }
  __device__ __forceinline__ bool has_alibi() const { return params.alibi_slopes != nullptr; }
  __device__ __forceinline__ bool has_bias() const { return params.k_bias != nullptr; }

  __device__ __forceinline__ float scaled(float qk) const { return qk * params.scale_log2; }
  // The capped score is cap_outer * tanh; its derivative by the scaled one is 1 - tanh^2.
  template <bool kPrecise>
  __device__ __forceinline__ float tanh_of(float qk) const {
    return kPrecise ? precise_tanh(params.cap_inner * qk) : accurate_tanh(params.cap_inner * qk);
  }
  template <bool kPrecise>
  __device__ __forceinline__ float capped(float qk) const {
    return params.cap_outer * tanh_of<kPrecise>(qk);
  }
  // distance: query position + diagonal - key position, exact up to 2^24. slope: log2 units.
  __device__ __forceinline__ static float with_alibi(float score, float slope, float distance) {
    return fmaf(-slope, fabsf(distance), score);
  }
};

// Slope of a query head in log2 units; 0 without ALiBi.
__device__ __forceinline__ float alibi_slope(const ScoreParams& params, int batch, int head) {
  if (params.alibi_slopes == nullptr) return 0.f;
  return params.alibi_slopes[batch * params.alibi_batch_stride + head] * kLog2e;
}

// The bias of a sequence's key at position 0, for one KV head; null without bias. batch: that of the keys' RowRange.
__device__ __forceinline__ const float* first_bias(const ScoreParams& params, int batch, int head_kv, int first_row) {
  if (params.k_bias == nullptr) return nullptr;
  return params.k_bias + batch * params.k_bias_batch_stride + head_kv * params.k_bias_head_stride + first_row;
}

// The bias of a tile of keys, spread over a warp: lane l loads that of keys l, l + 32, ... Loaded early, it costs few
// registers while the product runs; the lanes then fetch from one another what their columns need.
template <int kBlockN>
struct WarpBias {
  float values[ceil_div(kBlockN, 32)];

  // bias: of the tile's first key; keys from num_keys on, counted from there, do not exist.
  __device__ __forceinline__ void load(const float* bias, int num_keys, int lane) {
#pragma unroll
    for (int part = 0; part < ceil_div(kBlockN, 32); ++part) {
      const int key = 32 * part + lane;
      values[part] = key < num_keys ? __ldg(bias + key) * kLog2e : 0.f;
    }
  }
  // Of the columns of one accumulator of the fragment (fragment.cuh), whose offset is a constant after unrolling.
  __device__ __forceinline__ float of_column(int offset, int lane) const {
    return __shfl_sync(0xffffffffu, values[offset / 32], (offset + acc_first_col(lane)) % 32);
  }
};

// ---- score policies: a thread's two rows of a tile of queries ----

// The scale alone, which the softmax folds into its exponent.
struct PlainScore {
  static constexpr bool kModifies = false;
  template <int kBlockN>
  struct Tile {};
  __device__ __forceinline__ PlainScore(const ScoreParams&, const RowRange&, int, int, const int (&)[2]) {}
  template <int kBlockN>
  __device__ __forceinline__ Tile<kBlockN> load_tile(const RowRange&, int, int) const {
    return {};
  }
  template <int kBlockN, int kNumAcc>
  __device__ __forceinline__ void modify(float (&)[kNumAcc], const Tile<kBlockN>&, const int (&)[2], int) const {}
};

// Every modification, each switched on by its number: branches that a whole warp takes alike, once for each tile. Scores
// leave in log2 units, so that the softmax's own scale is 1.
struct ModifiedScore {
  static constexpr bool kModifies = true;
  template <int kBlockN>
  using Tile = WarpBias<kBlockN>;

  ScoreNumbers numbers;
  const float* bias;  // of key position 0
  float slopes[2];    // of the thread's rows

  // heads: query heads of the thread's rows. batch: number of the sequence.
  __device__ __forceinline__ ModifiedScore(const ScoreParams& params, const RowRange& keys, int batch, int head_kv,
                                           const int (&heads)[2])
      : numbers{params},
        bias(first_bias(params, keys.batch, head_kv, keys.first_row)),
        slopes{alibi_slope(params, batch, heads[0]), alibi_slope(params, batch, heads[1])} {}

  template <int kBlockN>
  __device__ __forceinline__ Tile<kBlockN> load_tile(const RowRange& keys, int n_block, int lane) const {
    Tile<kBlockN> tile;
    if (numbers.has_bias()) {
      tile.load(bias + n_block * kBlockN, keys.num_rows - n_block * kBlockN, lane);
    } else {
#pragma unroll
      for (float& value : tile.values) value = 0.f;
    }
    return tile;
  }

  // distance: of the thread's rows to the column of its first accumulator.
  template <int kBlockN, int kNumAcc>
  __device__ __forceinline__ void modify(float (&acc_s)[kNumAcc], const Tile<kBlockN>& tile, const int (&distance)[2],
                                         int lane) const {
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
      const float from[2] = {static_cast<float>(distance[0]), static_cast<float>(distance[1])};
#pragma unroll
      for (int i = 0; i < kNumAcc; ++i) {
        const int half = acc_half(i);
        acc_s[i] = ScoreNumbers::with_alibi(acc_s[i], slopes[half], from[half] - static_cast<float>(acc_col_offset(i)));
      }
    }
    if (numbers.has_bias()) {
#pragma unroll
      for (int i = 0; i < kNumAcc; ++i) {
        if (acc_half(i) != 0) continue;
        const float of_key = tile.of_column(acc_col_offset(i), lane);
        acc_s[i] += of_key;
        acc_s[i + 2] += of_key;
      }
    }
  }
};
#endif

}  // namespace flash_ext
