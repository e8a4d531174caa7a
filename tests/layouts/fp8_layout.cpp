// The FP8 forward's maps on the host: a tile of V, taken apart and put together as the kernel does it with ldmatrix.trans,
// byte permutations and stmatrix, meets weights in the order of the A operand; and the rotation's numbers.
#include <cmath>
#include <cstdio>
#include <vector>

#include "common/fp8_layout.cuh"
#include "common/fragment.cuh"
#include "common/quantize_params.h"

namespace {

using namespace flash_ext;

int failures = 0;

#define EXPECT(condition, ...)         \
  do {                                 \
    if (!(condition)) {                \
      ++failures;                      \
      std::printf("%s: ", #condition); \
      std::printf(__VA_ARGS__);        \
      std::printf("\n");               \
    }                                  \
  } while (0)

uint8_t value_of(int key, int column) { return static_cast<uint8_t>(37 * key + 11 * column + key * column % 7); }

// Bytes 0, 2 (or 1, 3) of a and of b.
uint32_t every_other_byte(uint32_t a, uint32_t b, int first) {
  const auto byte = [](uint32_t x, int i) { return x >> (8 * i) & 255; };
  return byte(a, first) | byte(a, first + 2) << 8 | byte(b, first) << 16 | byte(b, first + 2) << 24;
}

// One warp's work on one unit: registers as PTX defines the matrix instructions.
void transpose_unit(const std::vector<uint8_t>& v, std::vector<uint8_t>& out, int rows, int columns, int key_unit, int column_unit) {
  uint32_t loaded[4][32], stored[4][32];
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      loaded[matrix][lane] = 0;
      for (int half = 0; half < 2; ++half) {  // transposed: row 2 (lane % 4) + half, 16-bit column lane / 4
        const int source = 8 * matrix + 2 * (lane % 4) + half;
        const uint32_t at = transpose_read_offset(rows, key_unit, column_unit, source) + 2 * (lane / 4);
        loaded[matrix][lane] |= (v[at] | uint32_t(v[at + 1]) << 8) << 16 * half;
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int pair = matrix / 2 * 2;
      stored[matrix][lane] = every_other_byte(loaded[pair][lane], loaded[pair + 1][lane], matrix % 2);
    }
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t at = transpose_write_offset(columns, key_unit, column_unit, 8 * matrix + lane / 4) + 4 * (lane % 4);
      for (int byte = 0; byte < 4; ++byte) out[at + byte] = static_cast<uint8_t>(stored[matrix][lane] >> 8 * byte);
    }
  }
}

void check_transposition(int rows, int columns) {
  std::vector<uint8_t> v(num_byte_slabs(columns) * rows * kSlabBytes);
  std::vector<uint8_t> out(num_byte_slabs(rows) * columns * kSlabBytes);
  for (int key = 0; key < rows; ++key) {
    for (int column = 0; column < columns; ++column) v[byte_tile_offset(rows, key, column)] = value_of(key, column);
  }
  for (int key_unit = 0; key_unit < rows / 32; ++key_unit) {
    for (int column_unit = 0; column_unit < columns / 16; ++column_unit) {
      transpose_unit(v, out, rows, columns, key_unit, column_unit);
    }
  }
  for (int n = 0; n < columns; ++n) {
    for (int place = 0; place < rows; ++place) {
      const uint8_t want = value_of(key_at_place(place), column_of_transposed_row(n));
      EXPECT(out[byte_tile_offset(columns, n, place)] == want, "%d x %d, row %d, place %d", rows, columns, n, place);
    }
  }
}

// The register's four places hold the accumulators of the keys that stand there, of the same row.
void check_weights(int keys) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int step = 0; step < keys / kKeysPerStep; ++step) {
      for (int r = 0; r < 4; ++r) {
        for (int x = 0; x < 4; ++x) {
          const int i = fp8_operand_source(step, r, x / 2) + x % 2;
          const int place = kKeysPerStep * step + 4 * (thread % 4) + x + 16 * (r >> 1);
          EXPECT(acc_col(thread, i) == key_at_place(place), "thread %d, step %d, register %d, %d", thread, step, r, x);
          EXPECT(acc_half(i) == (r & 1), "thread %d, step %d, register %d, %d", thread, step, r, x);
        }
      }
    }
  }
}

void check_output(int columns) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int group = 0; group < columns / 16; ++group) {
      for (int half = 0; half < 2; ++half) {
        for (int x = 0; x < 4; ++x) {
          const int i = fp8_output_source(group, half, x);
          EXPECT(column_of_transposed_row(acc_col(thread, i)) == 16 * group + 4 * (thread % 4) + x && acc_half(i) == half,
                 "thread %d, group %d, half %d, column %d", thread, group, half, x);
        }
      }
    }
  }
}

void check_bank_conflicts(int rows, int columns) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned read = 0, written = 0;  // 16-byte columns of banks
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
      read |= 1u << transpose_read_offset(rows, 0, 1, lane) / 16 % 8;
      written |= 1u << transpose_write_offset(columns, 1, 0, lane) / 16 % 8;
    }
    EXPECT(read == 255 && written == 255, "matrix %d", matrix);
  }
}

void check_rotation() {
  for (const int dim : {8, 24, 64, 96, 128, 192, 256}) {
    const Hadamard hadamard = make_hadamard(dim);
    EXPECT(dim % hadamard.block == 0 && dim / hadamard.block % 2 == 1, "%d", dim);
    EXPECT(hadamard.factor == static_cast<float>(1 / std::sqrt(double(hadamard.block))), "%d", dim);
  }
  const Hadamard hadamard = make_hadamard(128);
  EXPECT(hadamard.flips[0] == 0x8D3B2B58u, "%08x: the same as in Python", hadamard.flips[0]);
}

}  // namespace

int main() {
  for (const int columns : {64, 96, 128, 192, 256}) {
    for (const int rows : {64, 128, 192, 224}) check_transposition(rows, columns);
    check_output(columns);
    check_bank_conflicts(128, columns);
  }
  for (const int keys : {64, 128, 192, 224}) check_weights(keys);
  check_rotation();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
