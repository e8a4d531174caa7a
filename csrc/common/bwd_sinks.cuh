// Gradient of the attention sinks from the backward's row statistics: a sink is a key without a value, so
//   dsinks[h] = -sum over the rows of exp(sinks[h] - lse) * delta
// One CTA a head, in an order that depends on nothing else: the sum is the same at every run.
#pragma once

#include <cuda_runtime.h>

#include "common/math.cuh"
#include "common/params.h"

namespace flash_ext {

struct BwdSinksConfig {
  static constexpr int kNumThreads = 512;
  static constexpr int kMinBlocksPerSm = 2;
  static constexpr int kBlockM = kNumThreads;
};

template <class Config>
__device__ __forceinline__ void bwd_sinks(const BwdSinksParams& params) {
  __shared__ float sums[Config::kNumThreads / 32];
  const int head = blockIdx.x;
  const float sink_log2 = params.sinks[head] * kLog2e;
  float sum = 0.f;
  for (int entry = 0; entry < params.num_entries; ++entry) {
    const int64_t first = (int64_t(entry) * params.num_heads + head) * params.stats_rows;
    for (int row = threadIdx.x; row < params.stats_rows; row += Config::kNumThreads) {
      sum = fmaf(-fast_exp2(sink_log2 - params.lse_log2[first + row]), params.delta[first + row], sum);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.f;
  for (const float part : sums) sum += part;
  params.dsinks[head] = sum;
}

// kernel: the variant's entry, an instance of bwd_sinks<Config>.
template <class Config, class Kernel>
cudaError_t launch_bwd_sinks(Kernel* kernel, const BwdSinksParams& params, cudaStream_t stream) {
  if (params.num_heads == 0) return cudaSuccess;
  void* arguments[] = {const_cast<BwdSinksParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(params.num_heads), dim3(Config::kNumThreads), arguments,
                          0, stream);
}

}  // namespace flash_ext
