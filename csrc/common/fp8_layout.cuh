// Where e4m3 operands lie: the order of keys that makes the accumulators of S the A operand of P V without exchanging
// anything between threads, and the transposed tile of V that matches it. Index maps, tested on the host.
//
// A operand of wgmma m64nNk32 in registers: register r of a step holds row half r & 1 and four neighbouring places of the
// contraction, 16 (r >> 1) + 4 (thread % 4) + x. A thread owns columns 8 b + 2 (thread % 4) + {0, 1} of S for every block b
// of eight columns; so place 4 q + x of sixteen keys is given to key 8 (x >> 1) + 2 q + (x & 1), in P and in V alike.
//
// Even and odd columns of V come apart in the transposition (one byte permutation each) and are stored in separate groups
// of eight rows, which keeps the stores free of bank conflicts: row n of the transposed tile is not column n of V, and a
// thread's accumulators of O are four neighbouring columns in every sixteen.
#pragma once

#include "common/math.cuh"
#include "common/swizzle.cuh"

namespace flash_ext {

constexpr int kSlabBytes = kSlabRowBytes;  // columns of an e4m3 tile in one slab
constexpr int kKeysPerStep = 32;           // of one wgmma
FX_HOST_DEVICE constexpr int num_byte_slabs(int columns) { return ceil_div(columns, kSlabBytes); }

// The key at a place of the contraction, both counted within their tile.
FX_HOST_DEVICE constexpr int key_at_place(int place) {
  const int q = place % 16 / 4, x = place % 4;
  return place / 16 * 16 + 8 * (x >> 1) + 2 * q + (x & 1);
}

// The accumulator of S that starts the pair with register r of step `step`, and the pair's second half: both pairs make up
// the register's four places.
FX_HOST_DEVICE constexpr int fp8_operand_source(int step, int r, int pair) {
  return 4 * (4 * step + 2 * (r >> 1) + pair) + 2 * (r & 1);
}

// The column of V in row n of the transposed tile.
FX_HOST_DEVICE constexpr int column_of_transposed_row(int n) { return n / 16 * 16 + 2 * (n % 8) + n % 16 / 8; }

// The transposition works on units of 32 keys and 16 columns: lane l gives the address of a row of ldmatrix (key l of the
// unit) and of stmatrix (matrix l / 8: odd columns if it is odd, the second sixteen places if it is 2 or 3).
FX_HOST_DEVICE constexpr uint32_t transpose_read_offset(int rows, int key_unit, int column_unit, int lane) {
  return column_unit / 8 * rows * kSlabBytes + (key_unit * 32 + lane) * kSlabBytes +
         (((column_unit % 8) ^ (lane % 8)) << 4);
}
FX_HOST_DEVICE constexpr uint32_t transpose_write_offset(int columns, int key_unit, int column_unit, int lane) {
  const int matrix = lane / 8, chunk = (2 * key_unit + (matrix >> 1)) % 8;
  const int row = column_unit * 16 + 8 * (matrix & 1) + lane % 8;
  return key_unit / 4 * columns * kSlabBytes + row * kSlabBytes + ((chunk ^ (lane % 8)) << 4);
}

// Byte offset of (row, byte) in a tile with `rows` rows.
FX_HOST_DEVICE constexpr uint32_t byte_tile_offset(int rows, int row, int byte) {
  return byte / kSlabBytes * rows * kSlabBytes + swizzle_128b(row * kSlabBytes + byte % kSlabBytes);
}

// Accumulators of O: the four neighbouring columns 16 group + 4 (thread % 4) + {0 ... 3} of one row half.
FX_HOST_DEVICE constexpr int fp8_output_source(int group, int half, int column) {
  return 8 * group + 4 * (column & 1) + 2 * half + (column >> 1);
}

}  // namespace flash_ext
