// Backward, first step: row statistics that every key tile of the main kernel reads.
//
//   delta[i]    = sum_d dout[i,d] * out[i,d] - dlse[i]     the gradient of LSE costs this one subtraction
//   lse_log2[i] = lse[i] * log2(e)                         so that P = exp2(scale_log2 * s - lse_log2)
//
// Made safe here, once: a row that sees no key (lse = -inf) gets lse_log2 = 0 and delta = 0, so its P is exp2(-inf) = 0
// and no NaN can arise; rows that pad a sequence to kStatsRowAlignment get lse_log2 = +inf, so their P is 0 too.
//
// Bound by memory: 16-byte loads, kThreadsPerRow neighbouring threads share a row, no shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/math.cuh"
#include "common/params.h"
#include "common/seqlens.cuh"

namespace flash_ext {

template <class Element_, int kHeadDimV_>
struct BwdPreprocessConfig {
  using Element = Element_;
  static constexpr int kHeadDimV = kHeadDimV_;  // head_dim_v rounded up; narrower rows are predicated
  static constexpr int kElementsPerLoad = 16 / sizeof(Element);
  static constexpr int kThreadsPerRow = kHeadDimV / kElementsPerLoad;
  static constexpr int kNumThreads = 256;
  static constexpr int kMinBlocksPerSm = 4;
  static constexpr int kBlockM = kNumThreads / kThreadsPerRow;  // rows of a CTA
  static_assert(kThreadsPerRow > 0 && kThreadsPerRow <= 32 && 32 % kThreadsPerRow == 0,
                "a row must be shared by threads of one warp");
  static_assert(kStatsRowAlignment % kBlockM == 0, "a CTA must not straddle two heads' statistics");
};

__device__ inline float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ inline float2 to_float2(__half2 x) { return __half22float2(x); }

template <class Element>
struct PackedPair;
template <>
struct PackedPair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PackedPair<__half> {
  using Type = __half2;
};

// Dot product of eight elements in float32.
template <class Element>
__device__ inline float dot16(const uint4& a, const uint4& b) {
  using Pair = typename PackedPair<Element>::Type;
  const Pair* a_pairs = reinterpret_cast<const Pair*>(&a);
  const Pair* b_pairs = reinterpret_cast<const Pair*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = to_float2(a_pairs[i]);
    const float2 y = to_float2(b_pairs[i]);
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  return sum;
}

template <class Config>
__device__ __forceinline__ void bwd_preprocess(const BwdPreprocessParams& params) {
  using Element = typename Config::Element;
  const int thread_in_row = threadIdx.x % Config::kThreadsPerRow;
  const int row_in_block = threadIdx.x / Config::kThreadsPerRow;

  const int num_m_blocks = params.stats_rows / Config::kBlockM;
  const int m_block = blockIdx.x % num_m_blocks;
  const int head_and_batch = blockIdx.x / num_m_blocks;
  const int head = head_and_batch % params.num_heads;
  const int stats_row = m_block * Config::kBlockM + row_in_block;

  // The sequence, and the position among its visible rows.
  SequenceBlock place{head_and_batch / params.num_heads, 0};
  int row = stats_row;
  if (params.seqlens_q.cu_seqlens != nullptr) {
    place = block_at_slot(params.seqlens_q, params.batch, kStatsRowAlignment, stats_row / kStatsRowAlignment);
    row = place.block * kStatsRowAlignment + stats_row % kStatsRowAlignment;
  }
  const RowRange rows = rows_of_sequence(params.seqlens_q, place.index);
  const bool row_exists = row < rows.num_rows;
  const auto offset = [&](const RowStrides& strides) {
    return int64_t(rows.batch) * strides.batch + int64_t(rows.first_row + row) * strides.row + int64_t(head) * strides.head;
  };

  const int column = thread_in_row * Config::kElementsPerLoad;
  float delta = 0.f;
  if (row_exists && column < params.head_dim_v) {
    const auto address = [&](const void* base, const RowStrides& strides) {
      return reinterpret_cast<const uint4*>(static_cast<const Element*>(base) + offset(strides) + column);
    };
    delta = dot16<Element>(__ldg(address(params.dout, params.dout_strides)),
                           __ldg(address(params.out, params.out_strides)));
  }
#pragma unroll
  for (int lane_step = Config::kThreadsPerRow / 2; lane_step > 0; lane_step /= 2) {
    delta += __shfl_xor_sync(0xffffffffu, delta, lane_step);
  }
  if (thread_in_row != 0) return;

  float lse_log2 = INFINITY;
  if (row_exists) {
    const float lse = params.lse[offset(params.lse_strides)];
    if (lse == -INFINITY) {
      delta = 0.f;
      lse_log2 = 0.f;
    } else {
      lse_log2 = lse * kLog2e;
      if (params.dlse != nullptr) delta -= params.dlse[offset(params.dlse_strides)];
    }
  }
  const int64_t index = int64_t(head_and_batch) * params.stats_rows + stats_row;
  params.delta[index] = delta;
  params.lse_log2[index] = lse_log2;
}

// kernel: the variant's entry, an instance of bwd_preprocess<Config>. The caller has checked that the grid fits 2^31 - 1.
template <class Config, class Kernel>
cudaError_t launch_bwd_preprocess(Kernel* kernel, const BwdPreprocessParams& params,
                                  cudaStream_t stream) {
  const int entries = params.seqlens_q.cu_seqlens != nullptr ? 1 : params.batch;
  const int64_t num_blocks = int64_t(params.stats_rows / Config::kBlockM) * params.num_heads * entries;
  if (num_blocks == 0) return cudaSuccess;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {const_cast<BwdPreprocessParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(Config::kNumThreads), arguments, 0, stream);
}

}  // namespace flash_ext
