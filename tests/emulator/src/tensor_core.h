// Matrix instructions on registers kept as lane arrays: wgmma, mma.sync, ldmatrix, stmatrix.
//
// One 32-bit register of one warp is `uint32_t[32]`. Operands are arrays of pointers to such
// arrays. Nothing here knows about warps that wait, groups or proxies: a call computes at once.
#pragma once

#include <cstdint>
#include <vector>

#include "shared_view.h"

namespace flash_ext::emulator {

enum class MmaFormat : uint8_t { kF16, kBf16, kTf32, kE4m3, kE5m2, kS8, kU8, kF32, kS32 };

constexpr int element_bytes(MmaFormat format) {
  switch (format) {
    case MmaFormat::kF16:
    case MmaFormat::kBf16:
      return 2;
    case MmaFormat::kTf32:
    case MmaFormat::kF32:
    case MmaFormat::kS32:
      return 4;
    default:
      return 1;
  }
}

struct Coord {
  int row;
  int col;
  bool operator==(const Coord&) const = default;
};

// The 64xN (wgmma) and 16x8 (mma.sync, warp 0) accumulator of 32-bit elements.
constexpr Coord accumulator_coord(int warp, int lane, int reg) {
  return {16 * warp + lane / 4 + 8 * ((reg >> 1) & 1), 8 * (reg >> 2) + 2 * (lane % 4) + (reg & 1)};
}

// The same for packed f16 accumulators: `half` 0 is the low half of the register.
constexpr Coord accumulator_coord_f16(int warp, int lane, int reg, int half) {
  return accumulator_coord(warp, lane, 2 * reg + half);
}

// A in registers, for every instruction and type; `col` is k. `bytes` is the size of an element.
constexpr Coord fragment_a_coord(int warp, int lane, int reg, int element, int bytes) {
  const int packed = 4 / bytes;
  return {16 * warp + lane / 4 + 8 * (reg & 1), packed * (lane % 4) + element + 4 * packed * (reg >> 1)};
}

// B of mma.sync; `row` is k, `col` is n.
constexpr Coord fragment_b_coord(int lane, int reg, int element, int bytes) {
  const int packed = 4 / bytes;
  return {packed * (lane % 4) + element + 4 * packed * reg, lane / 4};
}

// ---- shared-memory matrix descriptors --------------------------------------------------------

struct MatrixDescriptor {
  uint32_t start;           // bytes
  uint32_t leading_offset;  // bytes
  uint32_t stride_offset;   // bytes
  uint32_t base_offset;
  Swizzle swizzle;
};

MatrixDescriptor decode_descriptor(uint64_t bits);
uint64_t encode_descriptor(const MatrixDescriptor& descriptor);

// Shared address of a 16-byte chunk of an operand. K-major: `outer` is the row (m or n), `chunk`
// counts 16 bytes along k. MN-major (16-bit types): `outer` is k, `chunk` counts 8 rows.
uint32_t chunk_address(const MatrixDescriptor& descriptor, bool mn_major, uint32_t outer, uint32_t chunk);

// Appends the byte ranges that one wgmma reads for an operand of `extent` rows (64 for A, N for B).
void append_operand_ranges(const MatrixDescriptor& descriptor, bool mn_major, int extent,
                           std::vector<ByteRange>& ranges);

// ---- wgmma.mma_async -------------------------------------------------------------------------

struct WgmmaOp {
  int n = 8;                       // 8, 16, ... 256; M is 64, K is 32 bytes
  MmaFormat a = MmaFormat::kBf16;  // kF16 kBf16 kTf32 kE4m3 kE5m2 kS8 kU8
  MmaFormat b = MmaFormat::kBf16;
  MmaFormat d = MmaFormat::kF32;  // kF32, kF16 (not for bf16, tf32), kS32
  bool a_in_registers = false;
  bool mn_major_a = false;  // the instruction's tnspA, tnspB
  bool mn_major_b = false;
  bool negate_a = false;  // imm-scale-a, imm-scale-b are -1
  bool negate_b = false;
  bool satfinite = false;  // kS32 only
};

constexpr int wgmma_a_registers = 4;
constexpr int wgmma_d_registers(const WgmmaOp& op) { return op.d == MmaFormat::kF16 ? op.n / 4 : op.n / 2; }

// Empty when the combination exists, else what is wrong with it. For the decoder.
const char* invalid_wgmma(const WgmmaOp& op);

// d[warp * wgmma_d_registers(op) + reg] and a[warp * 4 + reg] are lane arrays of the 4 warps.
// `a` may be null unless a_in_registers; `a_desc` is ignored when a_in_registers.
// Throws OperandFault when an operand leaves shared memory. D is undefined after a throw.
// fp8_fraction_bits: 8-bit floats are summed as fp8_accumulator.h says; 0: in float32.
void wgmma(const WgmmaOp& op, bool scale_d, uint32_t* const* d, const uint32_t* const* a, uint64_t a_desc,
           uint64_t b_desc, SharedView shared, int fp8_fraction_bits = 0);

// Appends what A (if in shared memory) and B read.
void append_wgmma_ranges(const WgmmaOp& op, uint64_t a_desc, uint64_t b_desc, std::vector<ByteRange>& ranges);

// ---- mma.sync --------------------------------------------------------------------------------

struct MmaOp {  // shape m16n8
  int k = 16;   // elements
  MmaFormat a = MmaFormat::kBf16;
  MmaFormat b = MmaFormat::kBf16;
  MmaFormat c = MmaFormat::kF32;  // C and D: kF32, kF16, kS32
  MmaFormat d = MmaFormat::kF32;
  bool satfinite = false;  // kS32 only
};

constexpr int mma_a_registers(const MmaOp& op) { return op.k * element_bytes(op.a) / 8; }
constexpr int mma_b_registers(const MmaOp& op) { return op.k * element_bytes(op.b) / 16; }
constexpr int mma_c_registers(const MmaOp& op) { return op.c == MmaFormat::kF16 ? 2 : 4; }
constexpr int mma_d_registers(const MmaOp& op) { return op.d == MmaFormat::kF16 ? 2 : 4; }

const char* invalid_mma(const MmaOp& op);

// All registers of one warp; d may alias c, a or b. fp8_fraction_bits: as of wgmma.
void mma_sync(const MmaOp& op, uint32_t* const* d, const uint32_t* const* a, const uint32_t* const* b,
              const uint32_t* const* c, int fp8_fraction_bits = 0);

// ---- ldmatrix, stmatrix: 8x8 matrices of 16-bit elements -------------------------------------

// rows[8 * m + r] points to the 16 bytes of row r of matrix m (the address of lane 8 * m + r).
// `count` is 1, 2 or 4; matrix m is register m.
void ldmatrix(const uint8_t* const* rows, int count, bool transposed, uint32_t* const* d);
void stmatrix(uint8_t* const* rows, int count, bool transposed, const uint32_t* const* s);

}  // namespace flash_ext::emulator
