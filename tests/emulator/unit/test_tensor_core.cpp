// Arithmetic of wgmma and mma.sync against double sums, for every format, N, source and layout.
// Most data are small integers, whose sums are exact: a wrong index cannot hide in a tolerance.
// (That descriptors and fragments mean what the hardware means is test_cute_layouts.cpp's part.)
#include "../src/tensor_core.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../src/formats.h"
#include "unit.h"

namespace {

using namespace flash_ext::emulator;
using F = MmaFormat;

const char* name(F format) {
  constexpr const char* kNames[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f32", "s32"};
  return kNames[static_cast<int>(format)];
}

uint32_t encode(F format, double x) {
  const float value = static_cast<float>(x);
  switch (format) {
    case F::kF16:
      return f32_to_f16(value);
    case F::kBf16:
      return f32_to_bf16(value);
    case F::kTf32:
      return f32_to_tf32(value);
    case F::kE4m3:
      return f32_to_e4m3(value);
    case F::kE5m2:
      return f32_to_e5m2(value);
    case F::kF32:
      return float_bits(value);
    case F::kS32:
      return static_cast<uint32_t>(static_cast<int32_t>(x));
    default:
      return static_cast<uint8_t>(static_cast<int32_t>(x));
  }
}

double decode(F format, uint32_t bits) {
  switch (format) {
    case F::kF16:
      return f16_to_f32(static_cast<uint16_t>(bits));
    case F::kBf16:
      return bf16_to_f32(static_cast<uint16_t>(bits));
    case F::kTf32:
      return tf32_operand(bits);
    case F::kE4m3:
      return e4m3_to_f32(static_cast<uint8_t>(bits));
    case F::kE5m2:
      return e5m2_to_f32(static_cast<uint8_t>(bits));
    case F::kS8:
      return static_cast<int8_t>(bits);
    case F::kU8:
      return static_cast<uint8_t>(bits);
    case F::kS32:
      return static_cast<int32_t>(bits);
    default:
      return bits_float(bits);
  }
}

// Random codes of small integers, or of real numbers.
struct Matrix {
  Matrix(F format, int rows, int cols, bool integers, unit::Random& random)
      : format(format), cols(cols), codes(static_cast<size_t>(rows * cols)) {
    for (uint32_t& code : codes) {
      const double x = integers ? random.between(format == F::kU8 ? 0 : -4, 4) : 4 * random.uniform() - 2;
      code = encode(format, x);
    }
  }
  uint32_t& code(int row, int col) { return codes[static_cast<size_t>(row * cols + col)]; }
  double value(int row, int col) { return decode(format, code(row, col)); }

  F format;
  int cols;
  std::vector<uint32_t> codes;
};

struct Registers {
  explicit Registers(int count) : words(static_cast<size_t>(count) * 32, 0xdeadbeefu) {
    for (int i = 0; i < count; ++i) pointers.push_back(&words[static_cast<size_t>(i) * 32]);
  }
  void put(int reg, int lane, int element, int bytes, uint32_t code) {
    const uint32_t mask = bytes == 4 ? ~0u : (1u << 8 * bytes) - 1;
    uint32_t& word = pointers[static_cast<size_t>(reg)][lane];
    word = (word & ~(mask << 8 * bytes * element)) | (code & mask) << 8 * bytes * element;
  }
  std::vector<uint32_t> words;
  std::vector<uint32_t*> pointers;
};

constexpr uint32_t kSharedBytes = 200 * 1024;
std::vector<uint8_t> shared_memory(kSharedBytes);

// An operand of `rows` x 32 bytes of k, at `start`, in a dense canonical layout.
MatrixDescriptor place(Matrix& matrix, int rows, bool mn_major, Swizzle swizzle, uint32_t start) {
  const uint32_t span = swizzle_span(swizzle);
  const uint32_t u_rows = static_cast<uint32_t>(rows);
  MatrixDescriptor d{start, 0, 0, 0, swizzle};
  if (!mn_major) {
    d.stride_offset = 8 * span;
    d.leading_offset = swizzle == Swizzle::kNone ? 16 * u_rows + 64 : 16;
    if (swizzle == Swizzle::kNone) d.stride_offset = 128;
  } else if (swizzle == Swizzle::kNone) {
    d.stride_offset = 128;
    d.leading_offset = 16 * u_rows + 32;
  } else {
    d.leading_offset = 16 * span;  // the next span of rows comes after both groups of 8 k
    d.stride_offset = 8 * span;
  }
  const int bytes = element_bytes(matrix.format);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < matrix.cols; ++k) {
      const int offset = (mn_major ? row : k) * bytes;
      const uint32_t chunk =
          chunk_address(d, mn_major, static_cast<uint32_t>(mn_major ? k : row), static_cast<uint32_t>(offset / 16));
      std::memcpy(&shared_memory[chunk + static_cast<uint32_t>(offset % 16)], &matrix.code(row, k),
                  static_cast<size_t>(bytes));
    }
  }
  return d;
}

struct Case {
  WgmmaOp op;
  Swizzle swizzle_a = Swizzle::k128B;
  Swizzle swizzle_b = Swizzle::k128B;
  bool scale_d = true;
  bool integers = true;
};

std::string describe(const Case& c) {
  char buffer[200];
  std::snprintf(buffer, sizeof buffer, "wgmma n%d %s.%s.%s %s ta%d tb%d na%d nb%d swizzle %d/%d scale_d %d", c.op.n,
                name(c.op.d), name(c.op.a), name(c.op.b), c.op.a_in_registers ? "RS" : "SS", c.op.mn_major_a,
                c.op.mn_major_b, c.op.negate_a, c.op.negate_b, static_cast<int>(c.swizzle_a),
                static_cast<int>(c.swizzle_b), c.scale_d);
  return buffer;
}

void check_element(const std::string& what, F d_format, bool integers, double want, double sum_abs, double got, int row,
                   int col) {
  // f32: one rounding per addition; f16: one more at the end.
  double bound = integers ? 0 : 34 * 0x1p-24 * sum_abs;
  if (d_format == F::kF16 && !integers) bound += 0x1p-11 * std::fabs(want) + 0x1p-25;
  EXPECT(std::fabs(got - want) <= bound, "%s: (%d, %d) is %g, not %g", what.c_str(), row, col, got, want);
}

void check_wgmma(const Case& c, unit::Random& random) {
  const WgmmaOp& op = c.op;
  const std::string what = describe(c);
  const char* invalid = invalid_wgmma(op);
  EXPECT(invalid == nullptr, "%s: %s", what.c_str(), invalid);
  const int bytes = element_bytes(op.a), k = 32 / bytes;
  Matrix a(op.a, 64, k, c.integers, random), b(op.b, op.n, k, c.integers, random);
  Matrix old(op.d, 64, op.n, c.integers, random);

  const bool half = op.d == F::kF16;
  const int d_count = wgmma_d_registers(op);
  Registers d(4 * d_count), a_registers(16);
  for (int i = 0; i < 4 * d_count; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < (half ? 2 : 1); ++h) {
        const Coord at = half ? accumulator_coord_f16(i / d_count, lane, i % d_count, h)
                              : accumulator_coord(i / d_count, lane, i % d_count);
        // Without scale_d the old D must not matter, whatever it is.
        const uint32_t poison = half ? 0x7fff : 0x7fffffff;
        d.put(i, lane, h, half ? 2 : 4, c.scale_d ? old.code(at.row, at.col) : poison);
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int element = 0; element < 4 / bytes; ++element) {
        const Coord at = fragment_a_coord(i / 4, lane, i % 4, element, bytes);
        a_registers.put(i, lane, element, bytes, a.code(at.row, at.col));
      }
    }
  }
  for (uint8_t& byte : shared_memory) byte = 0x7f;  // NaN or a large number in every format
  const MatrixDescriptor a_desc = place(a, 64, op.mn_major_a, c.swizzle_a, 1024);
  const MatrixDescriptor b_desc = place(b, op.n, op.mn_major_b, c.swizzle_b, 64 * 1024);

  wgmma(op, c.scale_d, d.pointers.data(), op.a_in_registers ? a_registers.pointers.data() : nullptr,
        encode_descriptor(a_desc), encode_descriptor(b_desc), {shared_memory.data(), kSharedBytes});

  const double sign = op.negate_a == op.negate_b ? 1 : -1;
  for (int i = 0; i < 4 * d_count; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < (half ? 2 : 1); ++h) {
        const Coord at = half ? accumulator_coord_f16(i / d_count, lane, i % d_count, h)
                              : accumulator_coord(i / d_count, lane, i % d_count);
        double want = c.scale_d ? old.value(at.row, at.col) : 0, sum_abs = std::fabs(want);
        for (int j = 0; j < k; ++j) {
          const double product = a.value(at.row, j) * b.value(at.col, j);
          want += sign * product;
          sum_abs += std::fabs(product);
        }
        const uint32_t word = d.pointers[static_cast<size_t>(i)][lane];
        check_element(what, op.d, c.integers, want, sum_abs, decode(op.d, half ? word >> 16 * h & 0xffff : word),
                      at.row, at.col);
      }
    }
  }
}

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32B, Swizzle::k64B, Swizzle::k128B};

struct Types {
  F a, b, d;
};
constexpr Types kTypes[] = {
    {F::kF16, F::kF16, F::kF32},   {F::kF16, F::kF16, F::kF16},   {F::kBf16, F::kBf16, F::kF32},
    {F::kTf32, F::kTf32, F::kF32}, {F::kE4m3, F::kE4m3, F::kF32}, {F::kE4m3, F::kE5m2, F::kF32},
    {F::kE5m2, F::kE4m3, F::kF16}, {F::kE5m2, F::kE5m2, F::kF32}, {F::kS8, F::kS8, F::kS32},
    {F::kS8, F::kU8, F::kS32},     {F::kU8, F::kU8, F::kS32},
};

void check_all_wgmma() {
  unit::Random random(3);
  for (const Types& types : kTypes) {
    const bool integer = types.d == F::kS32;
    for (int n = 8; n <= 256; n += 8) {
      if (integer && n > 32 && n % 16 != 0) continue;
      Case c;
      c.op.a = types.a, c.op.b = types.b, c.op.d = types.d, c.op.n = n;
      // Every N once with SS and once with RS; swizzles and flags go round.
      const int turn = n / 8;
      c.swizzle_a = kSwizzles[turn % 4];
      c.swizzle_b = kSwizzles[turn / 4 % 4];
      c.scale_d = turn % 3 != 0;
      check_wgmma(c, random);
      c.op.a_in_registers = true;
      c.integers = integer || turn % 2 == 0;
      check_wgmma(c, random);
    }
    for (Swizzle swizzle_a : kSwizzles) {
      for (Swizzle swizzle_b : kSwizzles) {
        for (int transposed = 0; transposed < (element_bytes(types.a) == 2 ? 4 : 1); ++transposed) {
          for (int negated = 0; negated < (integer ? 1 : 4); ++negated) {
            Case c;
            c.op.a = types.a, c.op.b = types.b, c.op.d = types.d;
            c.op.n = 64 << random.below(3);
            c.swizzle_a = swizzle_a, c.swizzle_b = swizzle_b;
            c.op.mn_major_a = transposed & 1, c.op.mn_major_b = transposed & 2;
            c.op.negate_a = negated & 1, c.op.negate_b = negated & 2;
            c.scale_d = random.below(2) != 0;
            check_wgmma(c, random);
            c.op.a_in_registers = true, c.op.mn_major_a = false;
            check_wgmma(c, random);
          }
        }
      }
    }
  }
}

void check_mma(const MmaOp& op, bool integers, unit::Random& random) {
  char what[100];
  std::snprintf(what, sizeof what, "mma m16n8k%d %s.%s.%s.%s", op.k, name(op.d), name(op.a), name(op.b), name(op.c));
  const char* invalid = invalid_mma(op);
  EXPECT(invalid == nullptr, "%s: %s", what, invalid);
  const int bytes = element_bytes(op.a);
  Matrix a(op.a, 16, op.k, integers, random), b(op.b, 8, op.k, integers, random);
  Matrix c(op.c, 16, 8, integers, random);
  const bool c_half = op.c == F::kF16, d_half = op.d == F::kF16;
  Registers a_regs(mma_a_registers(op)), b_regs(mma_b_registers(op)), d_regs(4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int element = 0; element < 4 / bytes; ++element) {
      for (int reg = 0; reg < mma_a_registers(op); ++reg) {
        const Coord at = fragment_a_coord(0, lane, reg, element, bytes);
        a_regs.put(reg, lane, element, bytes, a.code(at.row, at.col));
      }
      for (int reg = 0; reg < mma_b_registers(op); ++reg) {
        const Coord at = fragment_b_coord(lane, reg, element, bytes);
        b_regs.put(reg, lane, element, bytes, b.code(at.col, at.row));
      }
    }
    for (int reg = 0; reg < mma_c_registers(op); ++reg) {
      for (int h = 0; h < (c_half ? 2 : 1); ++h) {
        const Coord at = c_half ? accumulator_coord_f16(0, lane, reg, h) : accumulator_coord(0, lane, reg);
        d_regs.put(reg, lane, h, c_half ? 2 : 4, c.code(at.row, at.col));
      }
    }
  }
  mma_sync(op, d_regs.pointers.data(), a_regs.pointers.data(), b_regs.pointers.data(), d_regs.pointers.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < mma_d_registers(op); ++reg) {
      for (int h = 0; h < (d_half ? 2 : 1); ++h) {
        const Coord at = d_half ? accumulator_coord_f16(0, lane, reg, h) : accumulator_coord(0, lane, reg);
        double want = c.value(at.row, at.col), sum_abs = std::fabs(want);
        for (int k = 0; k < op.k; ++k) {
          want += a.value(at.row, k) * b.value(at.col, k);
          sum_abs += std::fabs(a.value(at.row, k) * b.value(at.col, k));
        }
        const uint32_t word = d_regs.pointers[static_cast<size_t>(reg)][lane];
        check_element(what, op.d, integers, want, sum_abs, decode(op.d, d_half ? word >> 16 * h & 0xffff : word),
                      at.row, at.col);
      }
    }
  }
}

void check_all_mma() {
  unit::Random random(4);
  for (const Types& types : kTypes) {
    for (int k_bytes : {16, 32}) {
      for (int repeat = 0; repeat < 8; ++repeat) {
        MmaOp op;
        op.k = k_bytes / element_bytes(types.a);
        op.a = types.a, op.b = types.b, op.c = types.d, op.d = types.d;
        check_mma(op, types.d == F::kS32 || repeat % 2 == 0, random);
        if (types.a != F::kF16 && types.a != F::kE4m3) continue;
        op.c = F::kF32, op.d = F::kF16;
        check_mma(op, true, random);
        op.c = F::kF16, op.d = F::kF32;
        check_mma(op, true, random);
      }
    }
  }
}

// Integer accumulators wrap, or stop at the ends of the range with .satfinite.
void check_integer_overflow() {
  MmaOp op;
  op.a = op.b = F::kU8, op.c = op.d = F::kS32, op.k = 32;
  for (bool satfinite : {false, true}) {
    op.satfinite = satfinite;
    Registers a(4), b(2), d(4);
    for (uint32_t& word : a.words) word = 0xffffffffu;
    for (uint32_t& word : b.words) word = 0xffffffffu;
    for (uint32_t& word : d.words) word = 0x7fffffffu;
    mma_sync(op, d.pointers.data(), a.pointers.data(), b.pointers.data(), d.pointers.data());
    const uint32_t want = satfinite ? 0x7fffffffu : 0x7fffffffu + 32 * 255 * 255;
    for (uint32_t word : d.words) EXPECT(word == want, "s32 overflow: 0x%x, not 0x%x", word, want);
  }
}

// A pattern that starts at line `base` of 128 bytes, written relative to its start.
void check_base_offset() {
  for (Swizzle swizzle : {Swizzle::k32B, Swizzle::k64B, Swizzle::k128B}) {
    const uint32_t span = swizzle_span(swizzle);
    for (uint32_t base = 0; base < span / 16; ++base) {
      const MatrixDescriptor at_line{4096 + 128 * base, 16, 8 * span, base, swizzle};
      const MatrixDescriptor aligned{4096, 16, 8 * span, 0, swizzle};
      for (uint32_t row = 0; row < 32; ++row) {
        for (uint32_t chunk = 0; chunk < 2; ++chunk) {
          EXPECT(chunk_address(at_line, false, row, chunk) - 128 * base == chunk_address(aligned, false, row, chunk),
                 "base offset %u, row %u", base, row);
        }
      }
    }
  }
}

void check_ranges_and_faults() {
  for (bool mn_major : {false, true}) {
    for (Swizzle swizzle : kSwizzles) {
      unit::Random random(5);
      Matrix matrix(F::kBf16, 64, 16, true, random);
      const MatrixDescriptor d = place(matrix, 64, mn_major, swizzle, 2048);
      std::vector<ByteRange> ranges;
      append_operand_ranges(d, mn_major, 64, ranges);
      std::vector<int> seen(kSharedBytes);
      uint32_t bytes = 0;
      for (const ByteRange& range : ranges) {
        bytes += range.size;
        for (uint32_t i = 0; i < range.size; ++i) ++seen[range.begin + i];
      }
      EXPECT(bytes == 64 * 32, "ranges cover %u bytes", bytes);
      bool exact = true;
      for (uint32_t outer = 0; outer < (mn_major ? 16u : 64u); ++outer) {
        for (uint32_t chunk = 0; chunk < (mn_major ? 8u : 2u); ++chunk) {
          for (uint32_t i = 0; i < 16; ++i) {
            exact = exact && seen[chunk_address(d, mn_major, outer, chunk) + i] == 1;
          }
        }
      }
      EXPECT(exact, "ranges miss a chunk (mn_major %d, swizzle %d)", mn_major, static_cast<int>(swizzle));
    }
  }
  WgmmaOp op;
  Registers d(4 * wgmma_d_registers(op));
  const uint64_t inside = encode_descriptor({1024, 16, 1024, 0, Swizzle::k128B});
  const uint64_t outside = encode_descriptor({kSharedBytes - 512, 16, 1024, 0, Swizzle::k128B});
  for (auto [a_desc, b_desc] : {std::pair{inside, outside}, std::pair{outside, inside}}) {
    bool thrown = false;
    try {
      wgmma(op, true, d.pointers.data(), nullptr, a_desc, b_desc, {shared_memory.data(), kSharedBytes});
    } catch (const OperandFault&) {
      thrown = true;
    }
    EXPECT(thrown, "an operand beyond shared memory was read");
  }
}

void check_invalid() {
  auto refused = [](auto change) {
    WgmmaOp op;
    change(op);
    return invalid_wgmma(op) != nullptr;
  };
  EXPECT(!refused([](WgmmaOp&) {}), "the default is valid");
  EXPECT(refused([](WgmmaOp& op) { op.n = 264; }), "n264");
  EXPECT(refused([](WgmmaOp& op) { op.n = 12; }), "n12");
  EXPECT(refused([](WgmmaOp& op) { op.d = F::kF16; }), "bf16 into f16");
  EXPECT(refused([](WgmmaOp& op) { op.b = F::kF16; }), "bf16 with f16");
  EXPECT(refused([](WgmmaOp& op) { op.a = op.b = F::kE4m3, op.mn_major_b = true; }), "fp8 tnsp");
  EXPECT(refused([](WgmmaOp& op) { op.a_in_registers = op.mn_major_a = true; }), "RS tnspA");
  EXPECT(refused([](WgmmaOp& op) { op.a = op.b = F::kS8, op.d = F::kS32, op.n = 40; }), "s8 n40");
}

// stmatrix after ldmatrix restores the rows; .trans is the transposition (CuTe checks the map).
void check_matrix_moves() {
  unit::Random random(6);
  for (int count : {1, 2, 4}) {
    for (bool load_transposed : {false, true}) {
      for (bool store_transposed : {false, true}) {
        uint16_t source[4][8][8], result[4][8][8];
        for (auto& matrix : source) {
          for (auto& row : matrix) {
            for (uint16_t& x : row) x = static_cast<uint16_t>(random.bits());
          }
        }
        const uint8_t* from[32];
        uint8_t* to[32];
        for (int i = 0; i < 32; ++i) {
          from[i] = reinterpret_cast<const uint8_t*>(source[i / 8][i % 8]);
          to[i] = reinterpret_cast<uint8_t*>(result[i / 8][i % 8]);
        }
        Registers registers(4);
        ldmatrix(from, count, load_transposed, registers.pointers.data());
        stmatrix(to, count, store_transposed, registers.pointers.data());
        for (int i = 0; i < count * 64; ++i) {
          const int m = i / 64, row = i / 8 % 8, col = i % 8;
          const bool swapped = load_transposed != store_transposed;
          EXPECT(result[m][row][col] == (swapped ? source[m][col][row] : source[m][row][col]),
                 "matrix %d (%d, %d) of %d, trans %d %d", m, row, col, count, load_transposed, store_transposed);
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_all_wgmma();
  check_all_mma();
  check_integer_overflow();
  check_base_offset();
  check_ranges_and_faults();
  check_invalid();
  check_matrix_moves();
  return unit::finish("tensor_core");
}
