// The arithmetic under wgmma and mma.sync: operands widened into panels, accumulators in place.
//
// For a fixed accumulator register the 32 lanes are 8 rows x 4 columns. Panel A therefore repeats
// every row 4 times, panel B holds 4 columns that are broadcast 8 times, and one step of k is a
// plain vector multiply-add on whole registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "formats.h"
#include "tensor_core.h"

namespace flash_ext::emulator::panels {

constexpr int kMaxK = 32;

// AVX-512 holds the accumulators of two column blocks in registers, smaller machines those of one.
#if defined(__AVX512F__)
constexpr int kWideLanes = 16;
constexpr int kBlocksAtOnce = 2;
#elif defined(__AVX2__)
constexpr int kWideLanes = 8;
constexpr int kBlocksAtOnce = 1;
#else
constexpr int kWideLanes = 4;
constexpr int kBlocksAtOnce = 1;
#endif

// Value types of the panels. Integers are unsigned, so that they wrap as the hardware does.
template <class Value>
struct VectorOf {
  typedef Value Wide __attribute__((vector_size(4 * kWideLanes), aligned(4), may_alias));
};

// Panel A of one warp: [k][row half][lane]. Panel B of 8 columns: [k][column parity][column / 2].
template <class Value>
using WarpPanelA = Value[kMaxK][2][32];
template <class Value>
using BlockPanelB = Value[kMaxK][2][4];

// ---- formats: how the bits of an element become a panel value --------------------------------

struct DecodeF16 {
  using Value = float;
  static constexpr int kBytes = 2;
  static Value widen(uint32_t bits) { return f16_to_f32(static_cast<uint16_t>(bits)); }
};
struct DecodeBf16 {
  using Value = float;
  static constexpr int kBytes = 2;
  static Value widen(uint32_t bits) { return bits_float(bits << 16); }
};
struct DecodeTf32 {
  using Value = float;
  static constexpr int kBytes = 4;
  static Value widen(uint32_t bits) { return tf32_operand(bits); }
};
struct DecodeE4m3 {
  using Value = float;
  static constexpr int kBytes = 1;
  static Value widen(uint32_t bits) { return e4m3_to_f32(static_cast<uint8_t>(bits)); }
};
struct DecodeE5m2 {
  using Value = float;
  static constexpr int kBytes = 1;
  static Value widen(uint32_t bits) { return e5m2_to_f32(static_cast<uint8_t>(bits)); }
};
struct DecodeS8 {
  using Value = uint32_t;
  static constexpr int kBytes = 1;
  static Value widen(uint32_t bits) { return static_cast<uint32_t>(static_cast<int8_t>(bits)); }
};
struct DecodeU8 {
  using Value = uint32_t;
  static constexpr int kBytes = 1;
  static Value widen(uint32_t bits) { return bits & 0xffu; }
};

// Calls body(Decoder{}) with the decoder of `format`.
template <class Body>
void with_decoder(MmaFormat format, Body&& body) {
  switch (format) {
    case MmaFormat::kF16:
      return body(DecodeF16{});
    case MmaFormat::kBf16:
      return body(DecodeBf16{});
    case MmaFormat::kTf32:
      return body(DecodeTf32{});
    case MmaFormat::kE4m3:
      return body(DecodeE4m3{});
    case MmaFormat::kE5m2:
      return body(DecodeE5m2{});
    case MmaFormat::kS8:
      return body(DecodeS8{});
    case MmaFormat::kU8:
      return body(DecodeU8{});
    default:
      throw OperandFault("matrix instruction: not an operand format");
  }
}

// ---- filling panels from registers -------------------------------------------------------------

template <class Decoder>
inline void widen_register(const uint32_t* lanes, int element, typename Decoder::Value* values) {
  for (int lane = 0; lane < 32; ++lane) {
    values[lane] = Decoder::widen(lanes[lane] >> (8 * Decoder::kBytes * element));
  }
}

// Spelled out where it is used: `auto` would lose may_alias.
typedef uint32_t LaneHalf __attribute__((vector_size(64), aligned(4), may_alias));
typedef int LaneIndex __attribute__((vector_size(64)));

// Panel A from a warp's fragment: lane l holds row l / 4 of the k that l % 4 stands for.
template <class Decoder>
inline void fill_a_from_registers(const uint32_t* const* registers, int count,
                                  WarpPanelA<typename Decoder::Value>& panel) {
  constexpr int kPacked = 4 / Decoder::kBytes;
  constexpr LaneIndex kGroups = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  for (int reg = 0; reg < count; ++reg) {
    for (int element = 0; element < kPacked; ++element) {
      typename Decoder::Value values[32];
      widen_register<Decoder>(registers[reg], element, values);
      const LaneHalf* halves = reinterpret_cast<const LaneHalf*>(values);
      for (int quad = 0; quad < 4; ++quad) {
        const int k = fragment_a_coord(0, quad, reg, element, Decoder::kBytes).col;
        LaneHalf* rows = reinterpret_cast<LaneHalf*>(panel[k][reg & 1]);
        rows[0] = __builtin_shuffle(halves[0], kGroups + quad);
        rows[1] = __builtin_shuffle(halves[1], kGroups + quad);
      }
    }
  }
}

// Panel B of mma.sync from a warp's fragment: lane l holds column l / 4.
template <class Decoder>
inline void fill_b_from_registers(const uint32_t* const* registers, int count,
                                  BlockPanelB<typename Decoder::Value>& panel) {
  constexpr int kPacked = 4 / Decoder::kBytes;
  // Columns 0, 2, 4, 6, 1, 3, 5, 7 of two neighbours in k.
  constexpr LaneIndex kColumns = {0, 8, 16, 24, 4, 12, 20, 28, 1, 9, 17, 25, 5, 13, 21, 29};
  for (int reg = 0; reg < count; ++reg) {
    for (int element = 0; element < kPacked; ++element) {
      typename Decoder::Value values[32];
      widen_register<Decoder>(registers[reg], element, values);
      const LaneHalf* halves = reinterpret_cast<const LaneHalf*>(values);
      for (int quad = 0; quad < 4; quad += 2) {
        const LaneHalf pair = __builtin_shuffle(halves[0], halves[1], kColumns + quad);
        for (int next = 0; next < 2; ++next) {
          const int k = fragment_b_coord(quad + next, reg, element, Decoder::kBytes).row;
          std::memcpy(panel[k], reinterpret_cast<const uint32_t*>(&pair) + 8 * next, 32);
        }
      }
    }
  }
}

// ---- filling panels from shared memory: 8 chunks of 16 bytes at a time -------------------------

template <int kBytes>
struct UnsignedOf {
  using Type = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;
};

// Interleaves the elements of two rows: one round of a transposition.
template <class Row>
inline void interleave(Row a, Row b, Row& low, Row& high) {
  if constexpr (sizeof(a[0]) == 1) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (sizeof(a[0]) == 2) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
}

// `chunks` are 16 bytes along k of 8 rows: values[k][row] for the 16 / kBytes elements of k.
template <class Decoder>
inline void widen_k_major(const uint8_t* const (&chunks)[8],
                          typename Decoder::Value (&values)[16 / Decoder::kBytes][8]) {
  using Unsigned = typename UnsignedOf<Decoder::kBytes>::Type;
  typedef Unsigned Row __attribute__((vector_size(16)));
  Row rows[8], mixed[8];
  for (int r = 0; r < 8; ++r) std::memcpy(&rows[r], chunks[r], 16);
  // The index of an element is (row, k) in bits; each round rotates it by one bit, and after
  // three the row's bits are the low ones.
  for (int round = 0; round < 3; ++round) {
    for (int r = 0; r < 4; ++r) interleave(rows[r], rows[r + 4], mixed[2 * r], mixed[2 * r + 1]);
    for (int r = 0; r < 8; ++r) rows[r] = mixed[r];
  }
  Unsigned flat[128 / Decoder::kBytes];
  std::memcpy(flat, rows, sizeof flat);
  for (int i = 0; i < 128 / Decoder::kBytes; ++i) (&values[0][0])[i] = Decoder::widen(flat[i]);
}

// Spreads the values of 8 rows over the 32 lanes of one register.
template <class Value>
inline void store_rows(const Value (&rows)[8], Value* lanes) {
  typedef Value Quad __attribute__((vector_size(16), aligned(4), may_alias));
  for (int row = 0; row < 8; ++row) *reinterpret_cast<Quad*>(lanes + 4 * row) = Quad{} + rows[row];
}

// ---- the product ------------------------------------------------------------------------------

// 4 columns, repeated over the lanes of a vector.
template <class Value>
inline typename VectorOf<Value>::Wide broadcast_columns(const Value* columns) {
  using Wide = typename VectorOf<Value>::Wide;
  // gcc 12 would build a generic shuffle through memory, and warns about its own unmasked form.
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(
      _mm512_maskz_broadcast_i32x4(0xffff, _mm_load_si128(reinterpret_cast<const __m128i*>(columns))));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(columns))));
#else
  return *reinterpret_cast<const Wide*>(columns);
#endif
}

// Written out, since the emulator is compiled without contraction.
template <class Value>
inline void multiply_add(typename VectorOf<Value>::Wide& sum, typename VectorOf<Value>::Wide a,
                         typename VectorOf<Value>::Wide b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Value, float>) {
    sum = _mm512_fmadd_ps(a, b, sum);
    return;
  }
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<Value, float>) {
    sum = _mm256_fmadd_ps(a, b, sum);
    return;
  }
#endif
  sum += a * b;
}

// d[4 * block + i] += A * B for kBlocks column blocks; without `keep`, the old d counts as zero.
template <class Value, int kBlocks>
inline void multiply(const WarpPanelA<Value>& a, const BlockPanelB<Value>* b, int k, bool keep, uint32_t* const* d) {
  using Wide = typename VectorOf<Value>::Wide;
  constexpr int kParts = 2;  // vectors of one register that are in flight together
  for (int lane = 0; lane < 32; lane += kParts * kWideLanes) {
    Wide acc[kBlocks][4][kParts];
    for (int block = 0; block < kBlocks; ++block) {
      for (int i = 0; i < 4; ++i) {
        const Wide* old = reinterpret_cast<const Wide*>(d[4 * block + i] + lane);
        for (int part = 0; part < kParts; ++part) acc[block][i][part] = keep ? old[part] : Wide{};
      }
    }
    for (int step = 0; step < k; ++step) {
      for (int block = 0; block < kBlocks; ++block) {
        for (int parity = 0; parity < 2; ++parity) {
          const Wide columns = broadcast_columns<Value>(b[block][step][parity]);
          for (int half = 0; half < 2; ++half) {
            const Wide* rows = reinterpret_cast<const Wide*>(a[step][half] + lane);
            for (int part = 0; part < kParts; ++part) {
              multiply_add<Value>(acc[block][2 * half + parity][part], rows[part], columns);
            }
          }
        }
      }
    }
    for (int block = 0; block < kBlocks; ++block) {
      for (int i = 0; i < 4; ++i) {
        Wide* out = reinterpret_cast<Wide*>(d[4 * block + i] + lane);
        for (int part = 0; part < kParts; ++part) out[part] = acc[block][i][part];
      }
    }
  }
}

}  // namespace flash_ext::emulator::panels
