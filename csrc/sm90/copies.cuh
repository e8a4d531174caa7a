// Tiles into shared memory by TMA: which coordinates name the rows of a sequence. The maps come from host/tma.h. One thread
// calls these; every copy completes its bytes, zeros included, on the barrier.
#pragma once

#include "common/seqlens.cuh"
#include "common/swizzle.cuh"
#include "common/work.cuh"
#include "sm90/barriers.h"
#include "sm90/cluster.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

constexpr int kThreadsPerWarpgroup = 128;

// Rows [row, row + kRows) of a range of rows of one head, slab by slab from `first_column` on: copy(slab of the tile,
// coordinates). Rows beyond the range are zeros, all of them too.
template <int kRows, int kColumns, class Copy>
__device__ __forceinline__ void for_each_slab(const TmaTensor& tensor, const RowRange& range, int row, int head, int first_column,
                                              Copy&& copy) {
  int place = range.first_row + row, end = 0;
  if (tensor.ragged_rows != 0) {
    const int inside = min_of(kRows, range.num_rows - row);
    end = place + inside;
    place = kRows - inside;
  }
#pragma unroll
  for (int slab = 0; slab < num_slabs(kColumns); ++slab) {
    const int coordinates[] = {first_column + slab * kSlabColumns, place, head * tensor.head_step, range.batch * tensor.batch_step,
                               end};
    copy(slab * kRows * kSlabRowBytes, coordinates);
  }
}

template <int kRows, int kColumns>
__device__ __forceinline__ void load_rows(const TmaTensor& tensor, uint64_t* barrier, uint8_t* tile, const RowRange& range,
                                          int row, int head, CacheHint hint, int first_column = 0) {
  for_each_slab<kRows, kColumns>(tensor, range, row, head, first_column, [&](int offset, const int (&coordinates)[5]) {
    tma_load(tensor.map, barrier, tile + offset, coordinates, hint);
  });
}

// The same into both CTAs of a pair.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_rows_into_pair(const TmaTensor& tensor, uint64_t* barrier, uint8_t* tile,
                                                    const RowRange& range, int row, int head, CacheHint hint, int first_column) {
  for_each_slab<kRows, kColumns>(tensor, range, row, head, first_column, [&](int offset, const int (&coordinates)[5]) {
    tma_load_multicast(tensor.map, barrier, tile + offset, coordinates, 0b11, hint);
  });
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

// Q, in place, for a scale that is not positive (FoldedScale): the rows of one consumer warpgroup in a tile of kBlockM rows and
// kSlabs slabs, 16 bytes a thread at a time.
template <int kBlockM, int kSlabs>
__device__ __forceinline__ void rewrite_q(uint32_t q, int warpgroup, int thread, uint32_t keep, uint32_t flip) {
  constexpr int kBytesPerSlab = kRowsPerWarpgroup * kSlabRowBytes;
  for (int slab = 0; slab < kSlabs; ++slab) {
    const uint32_t start = q + slab * kBlockM * kSlabRowBytes + warpgroup * kBytesPerSlab;
    for (int offset = thread * 16; offset < kBytesPerSlab; offset += kThreadsPerWarpgroup * 16) {
      uint32_t w[4];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "r"(start + offset)
                   : "memory");
      for (uint32_t& word : w) word = (word & keep) ^ flip;
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                   ::"r"(start + offset), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                   : "memory");
    }
  }
  fence_async_proxy();
  named_barrier_sync(query_rewritten_by(warpgroup), kThreadsPerWarpgroup);
}

}  // namespace flash_ext::sm90
