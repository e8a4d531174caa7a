// Backward, last step: the float32 sum of dQ, block by block (dq_blocks.cuh), becomes scaled rows of q's dtype.
//
// Bound by memory: a warpgroup takes one block, 16-byte loads without gaps, whole 128-byte lines out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dq_blocks.cuh"
#include "common/outputs.cuh"
#include "common/params.h"
#include "common/seqlens.cuh"

namespace flash_ext {

// kScalarOrder: the sums come from a kernel that adds by scalar atomics.
template <class Element_, bool kScalarOrder_>
struct BwdPostprocessConfig {
  using Element = Element_;
  static constexpr bool kScalarOrder = kScalarOrder_;
  static constexpr int kBlockM = kDqBlockRows;  // rows of a CTA
  static constexpr int kNumThreads = 128;
  static constexpr int kMinBlocksPerSm = 6;  // 32 loads in flight, or 8 of four floats
};

template <class Config>
__device__ __forceinline__ void bwd_postprocess(const BwdPostprocessParams& params) {
  using Element = typename Config::Element;
  __shared__ alignas(128) uint8_t staging[4][kStagingBytesPerWarp];
  const int thread = threadIdx.x;
  const int row_blocks = params.stats_rows / kDqBlockRows;
  const int row_block = blockIdx.x % row_blocks;
  const int head_index = blockIdx.x / row_blocks;
  const int head = head_index % params.num_heads;

  // Packed sequences: which one owns this slot, and which of its rows.
  SequenceBlock place{head_index / params.num_heads, row_block};
  if (params.seqlens_q.cu_seqlens != nullptr) {
    constexpr int kBlocksPerSlot = kStatsRowAlignment / kDqBlockRows;
    place = block_at_slot(params.seqlens_q, params.batch, kStatsRowAlignment, row_block / kBlocksPerSlot);
    place.block = place.block * kBlocksPerSlot + row_block % kBlocksPerSlot;
  }
  const RowRange rows = rows_of_sequence(params.seqlens_q, place.index);
  if (place.block * kDqBlockRows >= rows.num_rows) return;

  Element* dq = static_cast<Element*>(params.dq) + rows.batch * params.dq_strides.batch +
                rows.first_row * params.dq_strides.row + head * params.dq_strides.head;
  const int first_row = place.block * kDqBlockRows + thread / 32 * kRowsPerWarp;
  const uint32_t area = static_cast<uint32_t>(__cvta_generic_to_shared(staging[thread / 32]));
  for (int column = 0; column < params.head_dim; column += kDqBlockColumns) {
    const float* block = params.dq_blocks + kDqBlockFloats * dq_block_index(head_index, params.stats_rows, row_block,
                                                                            params.column_blocks, column / kDqBlockColumns);
    float acc[kDqAccumulators];
    if constexpr (Config::kScalarOrder) {
#pragma unroll
      for (int i = 0; i < kDqAccumulators; ++i) acc[i] = __ldcs(block + dq_scalar_offset(thread, i)) * params.softmax_scale;
    }
#pragma unroll
    for (int quad = 0; quad < (Config::kScalarOrder ? 0 : kDqAccumulators / 4); ++quad) {
      float4 x{};
      if (column + 8 * quad < params.head_dim) x = __ldcs(reinterpret_cast<const float4*>(block + dq_quad_offset(thread, quad)));
      acc[4 * quad] = x.x * params.softmax_scale;
      acc[4 * quad + 1] = x.y * params.softmax_scale;
      acc[4 * quad + 2] = x.z * params.softmax_scale;
      acc[4 * quad + 3] = x.w * params.softmax_scale;
    }
    store_warp_rows<Element>(acc, area, thread % 32, params.head_dim - column, [&](int row_of_warp) -> Element* {
      const int row = first_row + row_of_warp;
      return row < rows.num_rows ? dq + row * params.dq_strides.row + column : nullptr;
    });
  }
}

// kernel: the variant's entry, an instance of bwd_postprocess<Config>. The caller has checked that the grid fits 2^31 - 1.
template <class Config, class Kernel>
cudaError_t launch_bwd_postprocess(Kernel* kernel, const BwdPostprocessParams& params, cudaStream_t stream) {
  const bool packed = params.seqlens_q.cu_seqlens != nullptr;
  const int64_t num_blocks = int64_t(params.stats_rows / kDqBlockRows) * params.num_heads * (packed ? 1 : params.batch);
  if (num_blocks == 0) return cudaSuccess;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {const_cast<BwdPostprocessParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(Config::kNumThreads), arguments, 0, stream);
}

}  // namespace flash_ext
