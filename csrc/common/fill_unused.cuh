// Results of rows that no sequence shows (padding, beyond what is used, between and behind packed sequences) get their
// value: out, dq, dk, dv 0, lse -inf. Usually there are none, and the kernel reads a few numbers and ends.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include "common/params.h"

namespace flash_ext {

struct FillUnusedConfig {
  static constexpr int kNumThreads = 128;  // a thread asks about a row, its warp fills it
  static constexpr int kMinBlocksPerSm = 8;
  static constexpr int kBlockM = kNumThreads;
};

// Whether a sequence shows this row of the tensor. Of several empty ones before a row, the last owns what follows.
FX_HOST_DEVICE constexpr bool is_shown(const SeqlenParams& params, int batch, int entry, int row) {
  int index = entry;
  if (params.cu_seqlens != nullptr) {
    int low = 0, high = batch + 1;  // cu_seqlens[low] <= row < cu_seqlens[high], as far as they exist
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (params.cu_seqlens[middle] <= row ? low : high) = middle;
    }
    if (low == batch) return false;
    index = low;
  }
  const RowRange shown = rows_of_sequence(params, index);
  return shown.first_row <= row && row < shown.first_row + shown.num_rows;
}

#ifdef __CUDACC__
template <class Config>
__device__ __forceinline__ void fill_unused(const FillUnusedParams& params) {
  const bool packed = params.seqlens.cu_seqlens != nullptr;
  const int rows = params.seqlens.num_rows;
  const int64_t number = int64_t(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  const int entry = packed ? 0 : static_cast<int>(number / rows);
  const int row = static_cast<int>(number - int64_t(entry) * rows);
  const bool exists = packed ? number < rows : entry < params.batch;
  uint32_t unused = __ballot_sync(0xffffffffu, exists && !is_shown(params.seqlens, params.batch, entry, row));
  for (; unused != 0; unused &= unused - 1) {
    const int lane = __ffs(static_cast<int>(unused)) - 1;
    const int64_t of_entry = __shfl_sync(0xffffffffu, entry, lane), of_row = __shfl_sync(0xffffffffu, row, lane);
    for (int t = 0; t < params.num_targets; ++t) {
      const FillUnusedParams::Target& target = params.targets[t];
      for (int i = threadIdx.x % 32; i < target.heads * target.words; i += 32) {
        const int head = i / target.words;
        target.data[of_entry * target.strides.batch + of_row * target.strides.row + head * target.strides.head +
                    (i - head * target.words)] = target.value;
      }
    }
  }
}

// kernel: the variant's entry, an instance of fill_unused<Config>.
template <class Config, class Kernel>
cudaError_t launch_fill_unused(Kernel* kernel, const FillUnusedParams& params, cudaStream_t stream) {
  const int64_t entries = params.seqlens.cu_seqlens != nullptr ? 1 : params.batch;
  const int64_t num_blocks = ceil_div<int64_t>(entries * params.seqlens.num_rows, Config::kNumThreads);
  if (num_blocks == 0) return cudaSuccess;
  if (num_blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<FillUnusedParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(Config::kNumThreads), arguments, 0, stream);
}
#endif

}  // namespace flash_ext
