// Backward, first step: row statistics that every key tile of the main kernel reads.
//
//   delta[i]    = sum_d dout[i,d] * out[i,d] - dlse[i]     the gradient of LSE costs this one subtraction
//   lse_log2[i] = lse[i] * log2(e)                         so that P = exp2(scale_log2 * s - lse_log2)
//
// Made safe here, once: a row that sees no key (lse = -inf) gets lse_log2 = 0 and delta = 0, so its P is exp2(-inf) = 0
// and no NaN can arise; rows that pad seqlen_q to kStatsRowAlignment get lse_log2 = +inf, so their P is 0 too.
//
// Bound by memory: 16-byte loads, kThreadsPerRow neighbouring threads share a row, no shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/params.h"

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
  constexpr float kLog2e = 1.4426950408889634f;
  const int thread_in_row = threadIdx.x % Config::kThreadsPerRow;
  const int row_in_block = threadIdx.x / Config::kThreadsPerRow;

  const int num_m_blocks = params.seqlen_q_rounded / Config::kBlockM;
  const int m_block = blockIdx.x % num_m_blocks;
  const int head_and_batch = blockIdx.x / num_m_blocks;
  const int head = head_and_batch % params.num_heads;
  const int batch = head_and_batch / params.num_heads;
  const int row = m_block * Config::kBlockM + row_in_block;
  const bool row_exists = row < params.seqlen_q;

  const int column = thread_in_row * Config::kElementsPerLoad;
  float delta = 0.f;
  if (row_exists && column < params.head_dim_v) {
    const auto address = [&](const void* base, const RowStrides& strides) {
      return reinterpret_cast<const uint4*>(
          static_cast<const Element*>(base) + int64_t(batch) * strides.batch +
          int64_t(row) * strides.row + int64_t(head) * strides.head + column);
    };
    delta = dot16<Element>(__ldg(address(params.dout, params.dout_strides)),
                           __ldg(address(params.out, params.out_strides)));
  }
#pragma unroll
  for (int offset = Config::kThreadsPerRow / 2; offset > 0; offset /= 2) {
    delta += __shfl_xor_sync(0xffffffffu, delta, offset);
  }
  if (thread_in_row != 0) return;

  const int64_t head_index = int64_t(batch) * params.num_heads + head;
  float lse_log2 = INFINITY;
  if (row_exists) {
    const float lse = params.lse[head_index * params.seqlen_q + row];
    if (lse == -INFINITY) {
      delta = 0.f;
      lse_log2 = 0.f;
    } else {
      lse_log2 = lse * kLog2e;
      if (params.dlse != nullptr) {
        const RowStrides& strides = params.dlse_strides;
        delta -= params.dlse[int64_t(batch) * strides.batch + int64_t(row) * strides.row +
                             int64_t(head) * strides.head];
      }
    }
  }
  const int64_t index = head_index * params.seqlen_q_rounded + row;
  params.delta[index] = delta;
  params.lse_log2[index] = lse_log2;
}

// kernel: the variant's entry, an instance of bwd_preprocess<Config>. The caller has checked that the grid fits 2^31 - 1.
template <class Config, class Kernel>
cudaError_t launch_bwd_preprocess(Kernel* kernel, const BwdPreprocessParams& params,
                                  cudaStream_t stream) {
  const int64_t num_blocks = int64_t(params.seqlen_q_rounded / Config::kBlockM) * params.num_heads *
                             params.batch;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {const_cast<BwdPreprocessParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(Config::kNumThreads), arguments, 0, stream);
}

}  // namespace flash_ext
