// Number formats of PTX against f32. Every function is exact and free of branches, so that a loop
// over 32 lanes vectorises. Narrow values travel as their bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace flash_ext::emulator {

// PTX: rn, rz, rm, rp, rna.
enum class Round : uint8_t { kNearest, kZero, kDown, kUp, kAway };

inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

namespace formats_detail {

// 0 or 1: whether a magnitude with kept low bit `odd` moves up when `rest` of 2 * `half` is cut.
template <Round kRound>
constexpr uint32_t round_up(uint32_t negative, uint32_t odd, uint32_t rest, uint32_t half) {
  switch (kRound) {
    case Round::kNearest:
      return (rest > half) | ((rest == half) & odd);
    case Round::kZero:
      return 0;
    case Round::kDown:
      return (rest != 0) & negative;
    case Round::kUp:
      return (rest != 0) & (negative ^ 1);
    case Round::kAway:
      return rest >= half;
  }
  return 0;
}

// Whether an overflow goes to the largest finite value under kRound.
template <Round kRound>
constexpr bool overflow_stays_finite(uint32_t negative) {
  if (kRound == Round::kZero) return true;
  if (kRound == Round::kDown) return !negative;
  if (kRound == Round::kUp) return negative;
  return false;
}

// f32 to a format of `kMantissa` bits, exponent bias `kBias`, overflow code `kOverflow` (infinity,
// or the first code after the largest finite one) and canonical NaN `kNan`. No sign in the result.
template <Round kRound, int kMantissa, int kBias, uint32_t kOverflow, uint32_t kNan, bool kHasInf>
constexpr uint32_t narrow_magnitude(uint32_t bits, bool saturate) {
  constexpr int32_t kMinExponent = 128 - kBias;  // of the smallest normal, as an f32 exponent field
  const uint32_t negative = bits >> 31;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const int32_t field = static_cast<int32_t>(magnitude >> 23);
  const uint32_t significand = (magnitude & 0x7fffffu) | (field > 0 ? 0x800000u : 0u);
  const int32_t exponent = field > 0 ? field : 1;
  const int32_t below = exponent < kMinExponent ? kMinExponent - exponent : 0;
  const uint32_t shift = 23 - kMantissa + (below < 8 + kMantissa ? below : 8 + kMantissa);
  const uint32_t rest = significand & ((1u << shift) - 1);
  uint32_t kept = significand >> shift;
  kept += round_up<kRound>(negative, kept & 1, rest, 1u << (shift - 1));
  const int32_t lifted = exponent > kMinExponent ? exponent - kMinExponent : 0;
  uint32_t code = kept + (static_cast<uint32_t>(lifted) << kMantissa);
  const bool infinite = magnitude == 0x7f800000u;
  const bool to_max = saturate || !kHasInf || (overflow_stays_finite<kRound>(negative) && !infinite);
  code = code >= kOverflow ? (to_max ? kOverflow - 1 : kOverflow) : code;
  return magnitude > 0x7f800000u ? kNan : code;
}

// Cuts kDrop low bits of an f32 whose exponent range the target shares. NaN is left to the caller.
template <Round kRound, int kDrop>
constexpr uint32_t cut_bits(uint32_t bits, bool saturate) {
  constexpr uint32_t kMask = (1u << kDrop) - 1;
  const uint32_t negative = bits >> 31;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t up = round_up<kRound>(negative, (magnitude >> kDrop) & 1, magnitude & kMask, 1u << (kDrop - 1));
  uint32_t kept = (magnitude >> kDrop) + up;
  kept = saturate && kept >= (0x7f800000u >> kDrop) ? (0x7f800000u >> kDrop) - 1 : kept;
  return kept | (negative << (31 - kDrop));
}

}  // namespace formats_detail

// ---- widening, exact -------------------------------------------------------------------------

inline float bf16_to_f32(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

// Moving the fields into an f32 leaves an exponent that is too small by the difference of the
// biases; a multiplication mends it, subnormals included.
inline float f16_to_f32(uint16_t x) {
  const uint32_t magnitude = (x & 0x7fffu) << 13;
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return bits_float(value | (x & 0x8000u) << 16);
}

inline float e5m2_to_f32(uint8_t x) { return f16_to_f32(static_cast<uint16_t>(x << 8)); }

inline float e4m3_to_f32(uint8_t x) {
  const uint32_t scaled = float_bits(bits_float((x & 0x7fu) << 20) * 0x1p120f);
  const uint32_t value = (x & 0x7fu) == 0x7fu ? 0x7fffffffu : scaled;
  return bits_float(value | (x & 0x80u) << 24);
}

// What the tensor cores see of a 32-bit register that should hold tf32.
inline float tf32_operand(uint32_t bits) { return bits_float(bits & 0xffffe000u); }

// ---- narrowing. `relu` maps negative values to +0; NaN becomes the canonical NaN ----------------

template <Round kRound = Round::kNearest>
inline uint16_t f32_to_f16(float x, bool relu = false, bool saturate = false) {
  const uint32_t bits = float_bits(x);
  const uint32_t code = formats_detail::narrow_magnitude<kRound, 10, 15, 0x7c00, 0x7fff, true>(bits, saturate);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t negative = nan ? 0 : bits >> 31;
  return static_cast<uint16_t>(relu && negative ? 0 : code | negative << 15);
}

template <Round kRound = Round::kNearest>
inline uint16_t f32_to_bf16(float x, bool relu = false, bool saturate = false) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t code = formats_detail::cut_bits<kRound, 16>(bits, saturate);
  return static_cast<uint16_t>(nan ? 0x7fffu : relu && bits >> 31 ? 0 : code);
}

// The bits of an f32 whose 13 low bits are zero (NaN: canonical).
template <Round kRound = Round::kAway>
inline uint32_t f32_to_tf32(float x, bool relu = false, bool saturate = false) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t code = formats_detail::cut_bits<kRound, 13>(bits, saturate) << 13;
  return nan ? 0x7fffffffu : relu && bits >> 31 ? 0 : code;
}

// PTX has fp8 conversions only with satfinite.
inline uint8_t f32_to_e4m3(float x, bool relu = false) {
  const uint32_t bits = float_bits(x);
  const uint32_t code = formats_detail::narrow_magnitude<Round::kNearest, 3, 7, 0x7f, 0x7f, false>(bits, true);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t negative = nan ? 0 : bits >> 31;
  return static_cast<uint8_t>(relu && negative ? 0 : code | negative << 7);
}

inline uint8_t f32_to_e5m2(float x, bool relu = false) {
  const uint32_t bits = float_bits(x);
  const uint32_t code = formats_detail::narrow_magnitude<Round::kNearest, 2, 15, 0x7c, 0x7f, true>(bits, true);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t negative = nan ? 0 : bits >> 31;
  return static_cast<uint8_t>(relu && negative ? 0 : code | negative << 7);
}

// Rounding to odd: an f32 from which any narrower format is then reached with a single rounding.
inline float f64_to_f32_odd(double x) {
  const float nearest = static_cast<float>(x);
  const uint32_t bits = float_bits(nearest);
  if (std::isnan(x) || std::isinf(x) || static_cast<double>(nearest) == x || (bits & 1)) {
    return nearest;
  }
  // The neighbour on the other side of x has an odd significand.
  const bool up = std::fabs(static_cast<double>(nearest)) < std::fabs(x);
  return bits_float(up ? bits + 1 : bits - 1);
}

// ---- two or four to a register; `high` first as in PTX's cvt ------------------------------------

template <Round kRound = Round::kNearest>
inline uint32_t pack_f16x2(float high, float low, bool relu = false, bool saturate = false) {
  return static_cast<uint32_t>(f32_to_f16<kRound>(high, relu, saturate)) << 16 |
         f32_to_f16<kRound>(low, relu, saturate);
}

template <Round kRound = Round::kNearest>
inline uint32_t pack_bf16x2(float high, float low, bool relu = false, bool saturate = false) {
  return static_cast<uint32_t>(f32_to_bf16<kRound>(high, relu, saturate)) << 16 |
         f32_to_bf16<kRound>(low, relu, saturate);
}

inline uint16_t pack_e4m3x2(float high, float low, bool relu = false) {
  return static_cast<uint16_t>(f32_to_e4m3(high, relu) << 8 | f32_to_e4m3(low, relu));
}

inline uint16_t pack_e5m2x2(float high, float low, bool relu = false) {
  return static_cast<uint16_t>(f32_to_e5m2(high, relu) << 8 | f32_to_e5m2(low, relu));
}

// ---- whole registers, for the interpreter ------------------------------------------------------

// out = {high, low} rounded to nearest; inputs and output may alias.
inline void pack_f16x2_lanes(uint32_t* out, const float* high, const float* low) {
  for (int lane = 0; lane < 32; ++lane) out[lane] = pack_f16x2(high[lane], low[lane]);
}

inline void pack_bf16x2_lanes(uint32_t* out, const float* high, const float* low) {
  for (int lane = 0; lane < 32; ++lane) out[lane] = pack_bf16x2(high[lane], low[lane]);
}

}  // namespace flash_ext::emulator
