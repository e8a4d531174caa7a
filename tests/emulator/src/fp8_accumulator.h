// How the tensor cores of Hopper (and, as measured alike, of Ada) sum 8-bit floats, as a model: one instruction adds its 32 products and the old accumulator at
// once, each truncated to a multiple of 2^(largest exponent - fraction_bits), and truncates the sum's significand to
// fraction_bits bits (13 on Hopper, by the papers and simulators that docs/numerics.md cites). Exponents are those of the
// operands as coded: a product of significands lies in [1, 4), subnormal operands have the format's smallest exponent.
//
// Off by default; Options::fp8_fraction_bits turns it on. Compared with no GPU so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "formats.h"
#include "mma_panels.h"
#include "tensor_core.h"

namespace flash_ext::emulator::panels {

constexpr int kNotFinite = 1000;     // stands for the exponent of infinities and NaN
constexpr int kZeroExponent = -126;  // of a zero operand or accumulator
constexpr int kSmallestScale = -110;  // exponents below it count as this one, so that scales stay in float32

inline int smallest_exponent(MmaFormat format) { return format == MmaFormat::kE4m3 ? -6 : -14; }

inline int exponent_of(float value, int smallest) {
  const uint32_t bits = float_bits(value);
  const int field = static_cast<int>(bits >> 23 & 255);
  if (field == 255) return kNotFinite;
  if ((bits << 1) == 0) return kZeroExponent;
  return std::max(field - 127, smallest);
}

using WarpExponentsA = int32_t[kMaxK][2][32];
using BlockExponentsB = int32_t[kMaxK][2][4];

template <class Panel, class Exponents>
inline void fill_exponents(const Panel& panel, int smallest, Exponents& exponents) {
  const float* values = &panel[0][0][0];
  int32_t* out = &exponents[0][0][0];
  for (size_t i = 0; i < sizeof panel / sizeof(float); ++i) out[i] = exponent_of(values[i], smallest);
}

// The 32 lanes of accumulator `i` (of four) of one column block. `out` holds the old values if `keep`.
inline void sum_truncated(const WarpPanelA<float>& a, const WarpExponentsA& a_exponents, const BlockPanelB<float>& b,
                          const BlockExponentsB& b_exponents, int i, int fraction_bits, bool keep, bool truncate_result,
                          uint32_t* out) {
  const int half = i >> 1, parity = i & 1;
  alignas(64) int32_t largest[32], sum[32];
  alignas(64) float scale[32], old[32];
  for (int lane = 0; lane < 32; ++lane) {
    old[lane] = keep ? bits_float(out[lane]) : 0.f;
    largest[lane] = exponent_of(old[lane], kZeroExponent);
  }
  for (int k = 0; k < kMaxK; ++k) {
    for (int lane = 0; lane < 32; ++lane) {
      largest[lane] = std::max(largest[lane], a_exponents[k][half][lane] + b_exponents[k][parity][lane % 4]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int exponent = std::max(std::min(largest[lane], 127), kSmallestScale);
    scale[lane] = bits_float(static_cast<uint32_t>(fraction_bits - exponent + 127) << 23);
    sum[lane] = static_cast<int32_t>(largest[lane] < 128 ? old[lane] * scale[lane] : 0.f);
  }
  for (int k = 0; k < kMaxK; ++k) {
    for (int lane = 0; lane < 32; ++lane) {
      const float product = a[k][half][lane] * b[k][parity][lane % 4];
      sum[lane] += static_cast<int32_t>(largest[lane] < 128 ? product * scale[lane] : 0.f);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float result;
    if (largest[lane] < 128) {
      uint32_t bits = float_bits(static_cast<float>(sum[lane]));  // exact: far below 2^24
      if (truncate_result) bits &= ~0u << (23 - fraction_bits);
      result = bits_float(bits) / scale[lane];
    } else {  // infinity or NaN, by float32's rules
      result = old[lane];
      for (int k = 0; k < kMaxK; ++k) result += a[k][half][lane] * b[k][parity][lane % 4];
    }
    out[lane] = float_bits(result);
  }
}

// One warp's product for all columns, as multiply_warp; a and b of the two formats.
inline void multiply_warp_truncated(const WarpPanelA<float>& a, MmaFormat a_format, const BlockPanelB<float>* b,
                                    MmaFormat b_format, int blocks, int fraction_bits, bool keep, bool truncate_result,
                                    uint32_t* const* d) {
  alignas(64) WarpExponentsA a_exponents;
  fill_exponents(a, smallest_exponent(a_format), a_exponents);
  for (int block = 0; block < blocks; ++block) {
    alignas(64) BlockExponentsB b_exponents;
    fill_exponents(b[block], smallest_exponent(b_format), b_exponents);
    for (int i = 0; i < 4; ++i) {
      sum_truncated(a, a_exponents, b[block], b_exponents, i, fraction_bits, keep, truncate_result, d[4 * block + i]);
    }
  }
}

}  // namespace flash_ext::emulator::panels
