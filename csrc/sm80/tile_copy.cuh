// How the threads of a CTA copy tiles of rows from global memory into the slabs of swizzle.cuh by cp.async: eight lanes a
// row of a slab, so that a warp reads four lines of 128 bytes and writes 512 bytes without bank conflicts.
#pragma once

#include "common/params.h"
#include "common/seqlens.cuh"
#include "common/swizzle.cuh"
#include "sm80/primitives.cuh"

namespace flash_ext::sm80 {

#ifdef __CUDACC__
// Address of a head's first row in a sequence.
template <int kElementBytes = 2>
__device__ __forceinline__ const uint8_t* rows_of(const void* tensor, const RowStrides& strides, const RowRange& rows, int head) {
  return static_cast<const uint8_t*>(tensor) +
         kElementBytes * (rows.batch * strides.batch + rows.first_row * strides.row + head * strides.head);
}
#endif

template <int kRows, int kColumns, int kThreads>
struct TileCopy {
  static constexpr int kLanesPerRow = kSlabRowBytes / 16;
  static constexpr int kRowsPerPass = kThreads / kLanesPerRow;
  static constexpr int kPasses = kRows / kRowsPerPass;
  static_assert(kRows % kRowsPerPass == 0, "passes must cover the tile");
  static_assert(kRowsPerPass % 8 == 0, "a thread's rows must have one place in the swizzle");

  FX_HOST_DEVICE static constexpr int row(int thread, int pass) { return thread / kLanesPerRow + pass * kRowsPerPass; }
  FX_HOST_DEVICE static constexpr int column(int thread, int slab) { return slab * kSlabColumns + thread % kLanesPerRow * 8; }
  FX_HOST_DEVICE static constexpr uint32_t offset(int thread, int pass, int slab) {
    return tile_offset(kRows, row(thread, 0), column(thread, 0)) + pass * kRowsPerPass * kSlabRowBytes +
           slab * kRows * kSlabRowBytes;
  }

#ifdef __CUDACC__
  // So that rows of a whole tile need no comparison.
  __device__ __forceinline__ static int thread_of_cta() {
    const int thread = read_thread();
    __builtin_assume(thread < kThreads);
    return thread;
  }

  // row_address(row of the tile) -> address of the row's first column, or null: the row becomes zero, as do columns from
  // num_columns on (a multiple of 8).
  template <class RowAddress>
  __device__ __forceinline__ static void copy(uint32_t tile, int num_columns, RowAddress&& row_address) {
    const int thread = thread_of_cta();
    const int columns_left = num_columns - column(thread, 0);
    const uint32_t to = tile + offset(thread, 0, 0);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint8_t* from = row_address(row(thread, pass));
      copy_row(to, from + column(thread, 0) * 2, pass, from != nullptr, columns_left);
    }
  }

  // The same for rows one stride apart, of which there are num_rows.
  __device__ __forceinline__ static void copy(uint32_t tile, int num_rows, int num_columns, const uint8_t* first_row,
                                              int64_t row_bytes) {
    const int thread = thread_of_cta();
    const int columns_left = num_columns - column(thread, 0);
    const uint32_t to = tile + offset(thread, 0, 0);
    const uint8_t* from = first_row + row(thread, 0) * row_bytes + column(thread, 0) * 2;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, from += kRowsPerPass * row_bytes) {
      copy_row(to, from, pass, row(thread, pass) < num_rows, columns_left);
    }
  }

  // Each thread's own words, once they have arrived, become (word & keep) ^ flip.
  __device__ __forceinline__ static void rewrite(uint8_t* tile, uint32_t keep, uint32_t flip) {
    const int thread = read_thread();
#pragma unroll 1
    for (int slab = 0; slab < num_slabs(kColumns); ++slab) {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) {
        uint4& chunk = *reinterpret_cast<uint4*>(tile + offset(thread, pass, slab));
        uint4 words = chunk;
        for (uint32_t* word : {&words.x, &words.y, &words.z, &words.w}) *word = (*word & keep) ^ flip;
        chunk = words;
      }
    }
  }

 private:
  __device__ __forceinline__ static void copy_row(uint32_t to, const uint8_t* from, int pass, bool inside, int columns_left) {
#pragma unroll
    for (int slab = 0; slab < num_slabs(kColumns); ++slab) {
      copy_16_bytes(to + (offset(0, pass, slab) - offset(0, 0, 0)), from + slab * kSlabRowBytes,
                    inside && slab * kSlabColumns < columns_left);
    }
  }
#endif
};

}  // namespace flash_ext::sm80
