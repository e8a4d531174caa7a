// A warp's share of a matrix product by mma.sync, with operands from tiles in shared memory (slabs of swizzle.cuh). A tile
// is known by its address, its number of rows and the place in it where the warp's share begins.
#pragma once

#include "common/fragment.cuh"
#include "common/swizzle.cuh"
#include "sm80/primitives.cuh"

namespace flash_ext::sm80 {

constexpr int kRowTileBytes = 16 * kSlabRowBytes;

// 16 x 16 pieces of a tile in the registers of a warp. The names say what runs along the tile's rows:
//   rows A (or B, two blocks of eight), columns the contraction: RowsA, RowsB;
//   columns A (or B), rows the contraction: ColumnsA, ColumnsB, transposed by the load.
// first_row: a multiple of 16. first_column: a multiple of 16, and of the number of columns that the warp takes where that is
// less than a slab; so its bits never carry into those of the steps.
enum class PieceLanes { kTall, kWide };          // which way a lane's number runs through the four 8 x 8 matrices first
enum class PieceLoad { kStraight, kTransposed };  // by ldmatrix

template <int kTileRows, PieceLanes kLanes, PieceLoad kLoad>
struct TilePieces {
  uint32_t lane_address;

  __device__ __forceinline__ TilePieces(uint32_t tile, int first_row, int first_column, int lane) {
    const uint32_t offset = kLanes == PieceLanes::kWide ? wide_offset(lane) : tall_offset(lane);
    lane_address = (tile + first_row * kSlabRowBytes + first_column / kSlabColumns * kTileRows * kSlabRowBytes + offset) ^
                   (first_column % kSlabColumns * 2);
  }
  // The piece at row 16 * row and column 16 * column of the warp's share.
  __device__ __forceinline__ void load(uint32_t (&registers)[4], int row, int column) const {
    // In this order few addresses are worth a register: ptxas would keep (lane_address ^ bits) of every step.
    const uint32_t address = ((lane_address + column / kStepsPerSlab * kTileRows * kSlabRowBytes) ^ step_bits(column)) +
                             row * kRowTileBytes;
    if constexpr (kLoad == PieceLoad::kTransposed) {
      load_matrices_transposed(registers, address);
    } else {
      load_matrices(registers, address);
    }
  }
};
template <int kTileRows>
using RowsA = TilePieces<kTileRows, PieceLanes::kTall, PieceLoad::kStraight>;
template <int kTileRows>
using RowsB = TilePieces<kTileRows, PieceLanes::kWide, PieceLoad::kStraight>;
template <int kTileRows>
using ColumnsA = TilePieces<kTileRows, PieceLanes::kWide, PieceLoad::kTransposed>;
template <int kTileRows>
using ColumnsB = TilePieces<kTileRows, PieceLanes::kTall, PieceLoad::kTransposed>;

// acc[r] += A B for kRowTiles row tiles and kPairs times 16 columns, over kSteps times 16 of the contraction.
// load_a(registers, row tile, step), load_b(registers, step, pair).
template <class Element, int kSteps, int kPairs, int kRowTiles, int kNumAcc, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&acc)[kRowTiles][kNumAcc], LoadA&& load_a, LoadB&& load_b) {
  static_assert(kNumAcc == 8 * kPairs, "16 columns are eight accumulators of a thread");
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_a(a[r], r, step);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t b[4];
      load_b(b, step, pair);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma<Element>(&acc[r][8 * pair], a[r], b);
        mma<Element>(&acc[r][8 * pair + 4], a[r], b + 2);
      }
    }
  }
}

template <int kRowTiles, int kNumAcc>
__device__ __forceinline__ void clear(float (&acc)[kRowTiles][kNumAcc]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (float& x : acc[r]) x = 0.f;
  }
}

}  // namespace flash_ext::sm80
