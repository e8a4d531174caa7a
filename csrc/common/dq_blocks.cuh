// The float32 sum of dQ in memory: blocks of 64 rows x 64 columns, each in the order in which a warpgroup's threads hold
// wgmma accumulators, so that a block moves in 16-byte pieces without conflicts and is added to by one bulk reduction.
// The main kernel of the backward adds to it, bwd_postprocess puts its numbers into rows.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/swizzle.cuh"

namespace flash_ext {

constexpr int kDqBlockRows = kRowsPerWarpgroup;
constexpr int kDqBlockColumns = kSlabColumns;
constexpr int kDqBlockFloats = kDqBlockRows * kDqBlockColumns;
constexpr int kDqBlockBytes = kDqBlockFloats * 4;
constexpr int kDqAccumulators = kDqBlockFloats / 128;  // of a thread

// Within a block, the four accumulators that begin with number 4 * quad of this thread of the warpgroup.
FX_HOST_DEVICE constexpr int dq_quad_offset(int thread, int quad) { return (quad * 128 + thread) * 4; }

// Bytes of a block whose first so many columns count, a multiple of 8: they come first.
FX_HOST_DEVICE constexpr int dq_bytes_of_columns(int columns) { return min_of(columns, kDqBlockColumns) * kDqBlockRows * 4; }

// The order of kernels that add by scalar atomics, which a warp then does by whole lines: accumulator i of this thread.
FX_HOST_DEVICE constexpr int dq_scalar_offset(int thread, int i) { return i * 128 + thread; }

// First float of a block; head_index counts (batch, num_heads), rows_of_head is a multiple of 64.
FX_HOST_DEVICE constexpr int64_t dq_block_index(int64_t head_index, int rows_of_head, int row_block, int num_column_blocks,
                                                int column_block) {
  return (head_index * (rows_of_head / kDqBlockRows) + row_block) * num_column_blocks + column_block;
}

}  // namespace flash_ext
