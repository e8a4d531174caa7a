#include "tensor_core.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "formats.h"
#include "fp8_accumulator.h"
#include "mma_panels.h"

namespace flash_ext::emulator {

namespace {

using namespace panels;

constexpr uint32_t kAddressMask = 0x3ffff;  // descriptors address 18 bits

bool is_integer(MmaFormat format) { return format == MmaFormat::kS8 || format == MmaFormat::kU8; }
bool is_fp8(MmaFormat format) { return format == MmaFormat::kE4m3 || format == MmaFormat::kE5m2; }

// Null, or why these formats do not go together.
const char* invalid_formats(MmaFormat a, MmaFormat b, MmaFormat d) {
  if (is_integer(a) && is_integer(b)) {
    return d == MmaFormat::kS32 ? nullptr : "integer operands need s32 accumulators";
  }
  if (is_fp8(a) && is_fp8(b)) {
    const bool fits = d == MmaFormat::kF32 || d == MmaFormat::kF16;
    return fits ? nullptr : "fp8 operands need f32 or f16 accumulators";
  }
  if (a != b) return "operands A and B have formats that do not go together";
  if (a == MmaFormat::kF16) {
    const bool fits = d == MmaFormat::kF32 || d == MmaFormat::kF16;
    return fits ? nullptr : "f16 operands need f32 or f16 accumulators";
  }
  if (a == MmaFormat::kBf16 || a == MmaFormat::kTf32) {
    return d == MmaFormat::kF32 ? nullptr : "bf16 and tf32 operands need f32 accumulators";
  }
  return "not an operand format";
}

const uint8_t* chunk_at(SharedView shared, uint32_t address, const char* operand) {
  if (shared.size < 16 || address > shared.size - 16) {
    char text[128];
    std::snprintf(text, sizeof text, "wgmma: operand %s reads 16 bytes at shared 0x%x, beyond its %u bytes", operand,
                  address, shared.size);
    throw OperandFault(text);
  }
  return shared.data + address;
}

// Calls store(k, values) for every k with the widened values of the 8 rows that begin at 8 * group.
// For panel B the even rows (columns of D) come first.
template <class Decoder, bool kPanelB, class Store>
void load_group(const MatrixDescriptor& descriptor, bool mn_major, uint32_t group, SharedView shared, Store&& store) {
  using Value = typename Decoder::Value;
  constexpr const char* kName = kPanelB ? "B" : "A";
  constexpr uint32_t kElements = 16 / Decoder::kBytes;
  if (mn_major) {
    typedef uint16_t Row __attribute__((vector_size(16)));
    for (uint32_t k = 0; k < 2 * kElements; ++k) {
      Row row;
      std::memcpy(&row, chunk_at(shared, chunk_address(descriptor, true, k, group), kName), 16);
      if (kPanelB) row = __builtin_shufflevector(row, row, 0, 2, 4, 6, 1, 3, 5, 7);
      Value values[8];
      for (int r = 0; r < 8; ++r) values[r] = Decoder::widen(row[r]);
      store(k, values);
    }
    return;
  }
  for (uint32_t half = 0; half < 2; ++half) {
    const uint8_t* chunks[8];
    for (uint32_t r = 0; r < 8; ++r) {
      const uint32_t row = kPanelB ? (r % 4) * 2 + r / 4 : r;
      chunks[r] = chunk_at(shared, chunk_address(descriptor, false, 8 * group + row, half), kName);
    }
    Value values[kElements][8];
    widen_k_major<Decoder>(chunks, values);
    for (uint32_t k = 0; k < kElements; ++k) store(half * kElements + k, values[k]);
  }
}

template <class Decoder>
void fill_a(const WgmmaOp& op, const uint32_t* const* a, uint64_t a_desc, SharedView shared,
            WarpPanelA<typename Decoder::Value>* warps) {
  using Value = typename Decoder::Value;
  if (op.a_in_registers) {
    for (int warp = 0; warp < 4; ++warp) {
      fill_a_from_registers<Decoder>(a + 4 * warp, wgmma_a_registers, warps[warp]);
    }
  } else {
    const MatrixDescriptor descriptor = decode_descriptor(a_desc);
    for (uint32_t group = 0; group < 8; ++group) {
      load_group<Decoder, false>(descriptor, op.mn_major_a, group, shared, [&](uint32_t k, const Value(&rows)[8]) {
        store_rows<Value>(rows, warps[group >> 1][k][group & 1]);
      });
    }
  }
  if (op.negate_a != op.negate_b) {
    constexpr int kSteps = 32 / Decoder::kBytes;
    for (int warp = 0; warp < 4; ++warp) {
      Value* values = &warps[warp][0][0][0];
      for (int i = 0; i < kSteps * 64; ++i) values[i] = -values[i];
    }
  }
}

template <class Decoder>
void fill_b(const WgmmaOp& op, uint64_t b_desc, SharedView shared, BlockPanelB<typename Decoder::Value>* blocks) {
  using Value = typename Decoder::Value;
  const MatrixDescriptor descriptor = decode_descriptor(b_desc);
  for (uint32_t block = 0; block < static_cast<uint32_t>(op.n) / 8; ++block) {
    load_group<Decoder, true>(descriptor, op.mn_major_b, block, shared, [&](uint32_t k, const Value(&columns)[8]) {
      std::memcpy(blocks[block][k], columns, sizeof columns);
    });
  }
}

// One warp's product for all columns; `d` are lane arrays of 32-bit accumulators.
template <class Value>
void multiply_warp(const WarpPanelA<Value>& a, const BlockPanelB<Value>* b, int blocks, int k, bool keep,
                   uint32_t* const* d) {
  int block = 0;
  for (; block + kBlocksAtOnce <= blocks; block += kBlocksAtOnce) {
    multiply<Value, kBlocksAtOnce>(a, b + block, k, keep, d + 4 * block);
  }
  for (; block < blocks; ++block) multiply<Value, 1>(a, b + block, k, keep, d + 4 * block);
}

// multiply_into(pointers) adds the product to f32 copies of packed f16 accumulators, which are rounded once at the end.
template <class Multiply>
void multiply_warp_f16(int blocks, bool keep, uint32_t* const* d, Multiply&& multiply_into) {
  alignas(64) uint32_t wide[128][32];
  uint32_t* pointers[128];
  for (int reg = 0; reg < 2 * blocks; ++reg) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t bits = keep ? d[reg][lane] : 0;
      wide[2 * reg][lane] = float_bits(f16_to_f32(static_cast<uint16_t>(bits)));
      wide[2 * reg + 1][lane] = float_bits(f16_to_f32(static_cast<uint16_t>(bits >> 16)));
    }
    pointers[2 * reg] = wide[2 * reg];
    pointers[2 * reg + 1] = wide[2 * reg + 1];
  }
  multiply_into(pointers);
  for (int reg = 0; reg < 2 * blocks; ++reg) {
    for (int lane = 0; lane < 32; ++lane) {
      d[reg][lane] = pack_f16x2(bits_float(wide[2 * reg + 1][lane]), bits_float(wide[2 * reg][lane]));
    }
  }
}

// The product alone is at most 32 * 255 * 255, so that only the last addition can overflow.
void multiply_warp_saturating(const WarpPanelA<uint32_t>& a, const BlockPanelB<uint32_t>* b, int blocks, int k,
                              bool keep, const uint32_t* const* c, uint32_t* const* d) {
  for (int block = 0; block < blocks; ++block) {
    alignas(64) uint32_t product[4][32];
    uint32_t* pointers[4] = {product[0], product[1], product[2], product[3]};
    multiply<uint32_t, 1>(a, b + block, k, false, pointers);
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        const int64_t old = keep ? static_cast<int32_t>(c[4 * block + i][lane]) : 0;
        const int64_t sum = old + static_cast<int32_t>(product[i][lane]);
        d[4 * block + i][lane] = static_cast<uint32_t>(std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX));
      }
    }
  }
}

}  // namespace

MatrixDescriptor decode_descriptor(uint64_t bits) {
  constexpr Swizzle kModes[4] = {Swizzle::kNone, Swizzle::k128B, Swizzle::k64B, Swizzle::k32B};
  return {static_cast<uint32_t>(bits & 0x3fff) << 4, static_cast<uint32_t>((bits >> 16) & 0x3fff) << 4,
          static_cast<uint32_t>((bits >> 32) & 0x3fff) << 4, static_cast<uint32_t>((bits >> 49) & 7),
          kModes[bits >> 62]};
}

uint64_t encode_descriptor(const MatrixDescriptor& descriptor) {
  constexpr uint64_t kModes[4] = {0, 3, 2, 1};
  return static_cast<uint64_t>((descriptor.start >> 4) & 0x3fff) |
         static_cast<uint64_t>((descriptor.leading_offset >> 4) & 0x3fff) << 16 |
         static_cast<uint64_t>((descriptor.stride_offset >> 4) & 0x3fff) << 32 |
         static_cast<uint64_t>(descriptor.base_offset & 7) << 49 | kModes[static_cast<int>(descriptor.swizzle)] << 62;
}

uint32_t chunk_address(const MatrixDescriptor& descriptor, bool mn_major, uint32_t outer, uint32_t chunk) {
  const uint32_t span = swizzle_span(descriptor.swizzle);
  const bool swizzled = descriptor.swizzle != Swizzle::kNone;
  uint32_t offset;
  if (!mn_major) {
    offset =
        outer / 8 * descriptor.stride_offset + outer % 8 * span + chunk * (swizzled ? 16 : descriptor.leading_offset);
  } else if (swizzled) {
    const uint32_t chunks_per_span = span / 16;
    offset = chunk % chunks_per_span * 16 + chunk / chunks_per_span * descriptor.leading_offset + outer % 8 * span +
             outer / 8 * descriptor.stride_offset;
  } else {
    offset = chunk * descriptor.stride_offset + outer % 8 * 16 + outer / 8 * descriptor.leading_offset;
  }
  const uint32_t linear = (descriptor.start + offset) & kAddressMask;
  return swizzle_address(descriptor.swizzle, linear, descriptor.base_offset);
}

void append_operand_ranges(const MatrixDescriptor& descriptor, bool mn_major, int extent,
                           std::vector<ByteRange>& ranges) {
  const uint32_t outer_count = mn_major ? 16 : static_cast<uint32_t>(extent);
  const uint32_t chunk_count = mn_major ? static_cast<uint32_t>(extent) / 8 : 2;
  const size_t first = ranges.size();
  for (uint32_t outer = 0; outer < outer_count; ++outer) {
    for (uint32_t chunk = 0; chunk < chunk_count; ++chunk) {
      const uint32_t address = chunk_address(descriptor, mn_major, outer, chunk);
      if (ranges.size() > first && ranges.back().begin + ranges.back().size == address) {
        ranges.back().size += 16;
      } else if (ranges.size() > first && address + 16 == ranges.back().begin) {
        ranges.back().begin = address;
        ranges.back().size += 16;
      } else {
        ranges.push_back({address, 16});
      }
    }
  }
}

void append_wgmma_ranges(const WgmmaOp& op, uint64_t a_desc, uint64_t b_desc, std::vector<ByteRange>& ranges) {
  if (!op.a_in_registers) {
    append_operand_ranges(decode_descriptor(a_desc), op.mn_major_a, 64, ranges);
  }
  append_operand_ranges(decode_descriptor(b_desc), op.mn_major_b, op.n, ranges);
}

const char* invalid_wgmma(const WgmmaOp& op) {
  if (op.n < 8 || op.n > 256 || op.n % 8 != 0) return "wgmma: N must be 8, 16, ... 256";
  if (const char* reason = invalid_formats(op.a, op.b, op.d)) return reason;
  const bool integer = is_integer(op.a);
  if (integer && op.n > 32 && op.n % 16 != 0) {
    return "wgmma: integer N above 32 must be a multiple of 16";
  }
  if (integer && (op.negate_a || op.negate_b)) return "wgmma: integer operands cannot be negated";
  if (!integer && op.satfinite) return "wgmma: satfinite is for integers";
  if ((op.mn_major_a || op.mn_major_b) && element_bytes(op.a) != 2) {
    return "wgmma: only 16-bit operands can be transposed";
  }
  if (op.mn_major_a && op.a_in_registers) return "wgmma: A in registers cannot be transposed";
  return nullptr;
}

void wgmma(const WgmmaOp& op, bool scale_d, uint32_t* const* d, const uint32_t* const* a, uint64_t a_desc,
           uint64_t b_desc, SharedView shared, int fp8_fraction_bits) {
  const bool truncates = fp8_fraction_bits > 0 && is_fp8(op.a);
  const int blocks = op.n / 8;
  const int k = 32 / element_bytes(op.a);
  const int d_registers = wgmma_d_registers(op);
  auto run = [&]<class Value>(Value) {
    alignas(64) WarpPanelA<Value> panel_a[4];
    alignas(64) BlockPanelB<Value> panel_b[32];
    with_decoder(op.a, [&]<class Decoder>(Decoder) {
      if constexpr (std::is_same_v<typename Decoder::Value, Value>) {
        fill_a<Decoder>(op, a, a_desc, shared, panel_a);
      }
    });
    with_decoder(op.b, [&]<class Decoder>(Decoder) {
      if constexpr (std::is_same_v<typename Decoder::Value, Value>) {
        fill_b<Decoder>(op, b_desc, shared, panel_b);
      }
    });
    for (int warp = 0; warp < 4; ++warp) {
      uint32_t* const* warp_d = d + warp * d_registers;
      if constexpr (std::is_same_v<Value, float>) {
        const bool half = op.d == MmaFormat::kF16;
        const auto product = [&](uint32_t* const* sums) {
          if (truncates) {
            multiply_warp_truncated(panel_a[warp], op.a, panel_b, op.b, blocks, fp8_fraction_bits, half || scale_d, !half, sums);
          } else {
            multiply_warp<float>(panel_a[warp], panel_b, blocks, k, half || scale_d, sums);
          }
        };
        if (half) {
          multiply_warp_f16(blocks, scale_d, warp_d, product);
        } else {
          product(warp_d);
        }
        continue;
      } else if (op.satfinite) {
        multiply_warp_saturating(panel_a[warp], panel_b, blocks, k, scale_d, warp_d, warp_d);
        continue;
      }
      multiply_warp<Value>(panel_a[warp], panel_b, blocks, k, scale_d, warp_d);
    }
  };
  if (is_integer(op.a)) {
    run(uint32_t{});
  } else {
    run(float{});
  }
}

const char* invalid_mma(const MmaOp& op) {
  if (const char* reason = invalid_formats(op.a, op.b, op.d)) return reason;
  if (const char* reason = invalid_formats(op.a, op.b, op.c)) return reason;
  const int k_bytes = op.k * element_bytes(op.a);
  if (k_bytes != 16 && k_bytes != 32) return "mma.sync: K must be 16 or 32 bytes";
  if (op.satfinite && !is_integer(op.a)) return "mma.sync: satfinite is for integers";
  return nullptr;
}

void mma_sync(const MmaOp& op, uint32_t* const* d, const uint32_t* const* a, const uint32_t* const* b,
              const uint32_t* const* c, int fp8_fraction_bits) {
  auto run = [&]<class Value>(Value) {
    alignas(64) WarpPanelA<Value> panel_a;
    alignas(64) BlockPanelB<Value> panel_b;
    with_decoder(op.a, [&]<class Decoder>(Decoder) {
      if constexpr (std::is_same_v<typename Decoder::Value, Value>) {
        fill_a_from_registers<Decoder>(a, mma_a_registers(op), panel_a);
      }
    });
    with_decoder(op.b, [&]<class Decoder>(Decoder) {
      if constexpr (std::is_same_v<typename Decoder::Value, Value>) {
        fill_b_from_registers<Decoder>(b, mma_b_registers(op), panel_b);
      }
    });
    if constexpr (std::is_same_v<Value, uint32_t>) {
      if (op.satfinite) {
        multiply_warp_saturating(panel_a, &panel_b, 1, op.k, true, c, d);
        return;
      }
    }
    // C may be packed where D is not, and the reverse.
    alignas(64) uint32_t wide[4][32];
    uint32_t* pointers[4] = {wide[0], wide[1], wide[2], wide[3]};
    for (int i = 0; i < 4; ++i) {
      if (op.c == MmaFormat::kF16) {
        for (int lane = 0; lane < 32; ++lane) {
          wide[i][lane] = float_bits(f16_to_f32(static_cast<uint16_t>(c[i >> 1][lane] >> (16 * (i & 1)))));
        }
      } else {
        std::memcpy(wide[i], c[i], sizeof wide[i]);
      }
    }
    bool truncates = false;
    if constexpr (std::is_same_v<Value, float>) {
      truncates = fp8_fraction_bits > 0 && is_fp8(op.a) && op.k == kMaxK;
      if (truncates) {
        multiply_warp_truncated(panel_a, op.a, &panel_b, op.b, 1, fp8_fraction_bits, true, op.d != MmaFormat::kF16, pointers);
      }
    }
    if (!truncates) multiply<Value, 1>(panel_a, &panel_b, op.k, true, pointers);
    for (int i = 0; i < 4; ++i) {
      if (op.d != MmaFormat::kF16) {
        std::memcpy(d[i], wide[i], sizeof wide[i]);
      } else if (i % 2 == 0) {
        for (int lane = 0; lane < 32; ++lane) {
          d[i >> 1][lane] = pack_f16x2(bits_float(wide[i + 1][lane]), bits_float(wide[i][lane]));
        }
      }
    }
  };
  if (is_integer(op.a)) {
    run(uint32_t{});
  } else {
    run(float{});
  }
}

void ldmatrix(const uint8_t* const* rows, int count, bool transposed, uint32_t* const* d) {
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(values[row], rows[8 * matrix + row], 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      const uint32_t low = transposed ? values[j][i] : values[i][j];
      const uint32_t high = transposed ? values[j + 1][i] : values[i][j + 1];
      d[matrix][lane] = high << 16 | low;
    }
  }
}

void stmatrix(uint8_t* const* rows, int count, bool transposed, const uint32_t* const* s) {
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t values[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      (transposed ? values[j][i] : values[i][j]) = static_cast<uint16_t>(s[matrix][lane]);
      (transposed ? values[j + 1][i] : values[i][j + 1]) = static_cast<uint16_t>(s[matrix][lane] >> 16);
    }
    for (int row = 0; row < 8; ++row) std::memcpy(rows[8 * matrix + row], values[row], 16);
  }
}

}  // namespace flash_ext::emulator
