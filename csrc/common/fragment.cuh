// Where the elements of a 64-row warpgroup tile live in registers: index maps, compared with CuTe in tests/layouts.
//
// Accumulator of wgmma m64nNk16 (float32): thread t of the warpgroup holds N/2 values, two rows of N/4 column pairs.
// A operand in registers (16-bit): four 32-bit registers a thread, each a pair of neighbouring columns.
#pragma once

#include "common/math.cuh"

namespace flash_ext {

constexpr int kRowsPerWarpgroup = 64;

// An accumulator register belongs to the thread's upper (0) or lower (1) row, eight rows apart.
FX_HOST_DEVICE constexpr int acc_half(int i) { return (i >> 1) & 1; }

FX_HOST_DEVICE constexpr int acc_row(int thread, int half) {
  return 16 * (thread / 32) + (thread % 32) / 4 + 8 * half;
}

// Its place among the accumulators of its row.
FX_HOST_DEVICE constexpr int acc_position(int i) { return 2 * (i >> 2) + (i & 1); }

FX_HOST_DEVICE constexpr int acc_at(int half, int position) { return 4 * (position >> 1) + 2 * half + (position & 1); }

// Column of accumulator register i, less the part that depends on the thread.
FX_HOST_DEVICE constexpr int acc_col_offset(int i) { return 8 * (i >> 2) + (i & 1); }
FX_HOST_DEVICE constexpr int acc_first_col(int thread) { return 2 * (thread % 4); }
FX_HOST_DEVICE constexpr int acc_col(int thread, int i) {
  return acc_first_col(thread) + acc_col_offset(i);
}

// Register r (0..3), half x of the A operand of one k16 step.
FX_HOST_DEVICE constexpr int a_operand_row(int thread, int r) { return acc_row(thread, r & 1); }
FX_HOST_DEVICE constexpr int a_operand_col(int thread, int r, int x) {
  return 2 * (thread % 4) + x + 8 * (r >> 1);
}

// P stays in registers: the A register r of k16 step `step` is the pair of accumulators that starts here.
FX_HOST_DEVICE constexpr int a_operand_source(int step, int r) { return 8 * step + 2 * r; }

}  // namespace flash_ext
