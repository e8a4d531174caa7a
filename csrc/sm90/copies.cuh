// Tiles into shared memory by TMA: which coordinates name the rows of a sequence. The maps come from host/tma.h. One thread
// calls these; every copy completes its bytes, zeros included, on the barrier.
#pragma once

#include "common/seqlens.cuh"
#include "common/swizzle.cuh"
#include "common/work.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

// Rows [row, row + kRows) of a range of rows of one head, slab by slab. The range has the first of them.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_rows(const TmaTensor& tensor, uint64_t* barrier, uint8_t* tile, const RowRange& range,
                                          int row, int head, CacheHint hint) {
  int place = range.first_row + row, end = 0;
  if (tensor.ragged_rows != 0) {
    const int inside = min_of(kRows, range.num_rows - row);
    end = place + inside;
    place = kRows - inside;
  }
#pragma unroll
  for (int slab = 0; slab < num_slabs(kColumns); ++slab) {
    tma_load(tensor.map, barrier, tile + slab * kRows * kSlabRowBytes,
             {slab * kSlabColumns, place, head * tensor.head_step, range.batch * tensor.batch_step, end}, hint);
  }
}

// A tile of queries.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_queries(const TmaTensor& tensor, uint64_t* barrier, uint8_t* tile,
                                             const QueryTile& queries, CacheHint hint) {
  const RowRange& range = queries.sequence.q;
#pragma unroll
  for (int slab = 0; slab < num_slabs(kColumns); ++slab) {
    tma_load(tensor.map, barrier, tile + slab * kRows * kSlabRowBytes,
             {slab * kSlabColumns, queries.first_in_group * tensor.head_step, range.first_row + queries.first_position,
              queries.head_kv * tensor.head_step, range.batch * tensor.batch_step},
             hint);
  }
}

}  // namespace flash_ext::sm90
