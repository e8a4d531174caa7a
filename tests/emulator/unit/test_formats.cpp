// Conversions against tables: every narrow code decoded by ldexp, and rounding by searching them.
#include "../src/formats.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "unit.h"

namespace {

using namespace flash_ext::emulator;

struct Narrow {
  const char* name;
  int exponent_bits, mantissa_bits;
  bool has_infinity;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const {  // or the NaN that follows the largest finite e4m3
    return has_infinity ? ((1u << exponent_bits) - 1) << mantissa_bits : (1u << (exponent_bits + mantissa_bits)) - 1;
  }
  uint32_t sign_bit() const { return 1u << (exponent_bits + mantissa_bits); }

  double value(uint32_t code) const {
    const uint32_t magnitude = code & (sign_bit() - 1);
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
    const double significand = exponent > 0 ? (1u << mantissa_bits) + mantissa : mantissa;
    const double x = std::ldexp(significand, std::max(exponent, 1) - bias() - mantissa_bits);
    return code & sign_bit() ? -x : x;
  }
};

constexpr Narrow kF16{"f16", 5, 10, true}, kBf16{"bf16", 8, 7, true}, kTf32{"tf32", 8, 10, true},
    kE4m3{"e4m3", 4, 3, false}, kE5m2{"e5m2", 5, 2, true};

// The code (without a canonical NaN) that x rounds to.
uint32_t reference(const Narrow& format, const std::vector<double>& magnitudes, float x, Round round, bool saturate) {
  const uint32_t sign = std::signbit(x) ? format.sign_bit() : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  const uint32_t last = format.infinity() - 1;
  if (std::isinf(x)) return sign | (saturate ? last : format.infinity());
  const auto above = std::upper_bound(magnitudes.begin(), magnitudes.end(), magnitude);
  uint32_t low = static_cast<uint32_t>(above - magnitudes.begin()) - 1;
  const double below_value = magnitudes[low];
  // The value after the largest finite one continues the pattern.
  const double above_value = low < last ? magnitudes[low + 1] : 2 * magnitudes[last] - magnitudes[last - 1];
  bool up = false;
  if (magnitude != below_value) {
    const double middle = below_value + (above_value - below_value) / 2;
    switch (round) {
      case Round::kNearest:
        up = magnitude > middle || (magnitude == middle && (low & 1));
        break;
      case Round::kAway:
        up = magnitude >= middle;
        break;
      case Round::kZero:
        break;
      case Round::kUp:
        up = !sign;
        break;
      case Round::kDown:
        up = sign != 0;
        break;
    }
    if (low == last && (round == Round::kUp || round == Round::kDown)) up = up && !saturate;
  }
  if (low == last && magnitude >= above_value) up = round == Round::kNearest || up;
  low += up ? 1 : 0;
  if (low > last && saturate) low = last;
  return sign | low;
}

template <class Convert>
void check_narrowing(const Narrow& format, Round round, bool saturate, Convert&& convert) {
  std::vector<double> magnitudes;
  for (uint32_t code = 0; code < format.infinity(); ++code) {
    magnitudes.push_back(format.value(code));
  }
  auto check = [&](float x) {
    if (std::isnan(x)) return;
    const uint32_t want = reference(format, magnitudes, x, round, saturate);
    const uint32_t got = convert(x);
    EXPECT(got == want, "%s round %d saturate %d: %a gave 0x%x, not 0x%x", format.name, static_cast<int>(round),
           saturate, x, got, want);
  };
  auto check_around = [&](float x) {
    for (float y : {x, -x}) {
      check(y);
      check(std::nextafterf(y, 0.0f));
      check(std::nextafterf(y, INFINITY));
      check(std::nextafterf(y, -INFINITY));
    }
  };
  const size_t step = magnitudes.size() > 4096 ? 61 : 1;
  for (size_t i = 0; i + 1 < magnitudes.size(); i += step) {
    check_around(static_cast<float>(magnitudes[i]));
    check_around(static_cast<float>(magnitudes[i] + (magnitudes[i + 1] - magnitudes[i]) / 2));
  }
  const double last = magnitudes.back(), gap = last - magnitudes[magnitudes.size() - 2];
  for (double x : {last, last + gap / 4, last + gap / 2, last + gap, last * 2}) {
    if (std::isfinite(static_cast<float>(x))) check_around(static_cast<float>(x));
  }
  check(INFINITY);
  check(-INFINITY);
  unit::Random random(1);
  for (int i = 0; i < 20000; ++i) check(bits_float(static_cast<uint32_t>(random.bits())));
}

template <Round kRound>
void check_rounding() {
  for (bool saturate : {false, true}) {
    check_narrowing(kF16, kRound, saturate, [&](float x) { return f32_to_f16<kRound>(x, false, saturate); });
    check_narrowing(kBf16, kRound, saturate, [&](float x) { return f32_to_bf16<kRound>(x, false, saturate); });
    check_narrowing(kTf32, kRound, saturate, [&](float x) {
      const uint32_t bits = f32_to_tf32<kRound>(x, false, saturate);
      EXPECT((bits & 0x1fff) == 0, "tf32 keeps low bits: 0x%x", bits);
      return bits >> 13;
    });
  }
}

template <class Widen>
void check_widening(const Narrow& format, Widen&& widen) {
  const uint32_t codes = 2 * format.sign_bit();
  for (uint32_t code = 0; code < codes; ++code) {
    const float got = widen(code);
    const uint32_t magnitude = code & (format.sign_bit() - 1);
    if (magnitude < format.infinity()) {
      EXPECT(static_cast<double>(got) == format.value(code), "%s 0x%x gave %a", format.name, code, got);
    } else {
      const bool infinite = format.has_infinity && magnitude == format.infinity();
      EXPECT(infinite ? std::isinf(got) : std::isnan(got), "%s 0x%x gave %a", format.name, code, got);
    }
    EXPECT(std::signbit(got) == ((code & format.sign_bit()) != 0), "%s 0x%x lost its sign", format.name, code);
  }
}

void check_special_values() {
  const float nan = bits_float(0xffc12345u);
  EXPECT(f32_to_f16(nan) == 0x7fff && f32_to_bf16(nan) == 0x7fff, "NaN is not canonical");
  EXPECT(f32_to_tf32(nan) == 0x7fffffffu, "tf32 NaN is not canonical");
  EXPECT(f32_to_e4m3(nan) == 0x7f && f32_to_e5m2(nan) == 0x7f, "fp8 NaN is not canonical");
  EXPECT(f32_to_f16(nan, true) == 0x7fff && f32_to_e4m3(nan, true) == 0x7f, "relu drops NaN");
  EXPECT(f32_to_f16(-2.0f, true) == 0 && f32_to_bf16(-2.0f, true) == 0, "relu keeps negatives");
  EXPECT(f32_to_e4m3(-2.0f, true) == 0 && f32_to_e5m2(-0.0f, true) == 0, "relu keeps negatives");
  EXPECT(f32_to_tf32(-2.0f, true) == 0, "relu keeps negatives");
  EXPECT(f32_to_e4m3(1e9f) == 0x7e && f32_to_e4m3(-INFINITY) == 0xfe, "e4m3 does not saturate");
  EXPECT(f32_to_e5m2(1e9f) == 0x7b && f32_to_e5m2(-INFINITY) == 0xfb, "e5m2 does not saturate");
  EXPECT(pack_f16x2(2.0f, 1.0f) == 0x40003c00u, "f16x2: the first operand is the high half");
  EXPECT(pack_bf16x2(2.0f, 1.0f) == 0x40003f80u, "bf16x2: the first operand is the high half");
  EXPECT(pack_e4m3x2(2.0f, 1.0f) == 0x4038, "e4m3x2: the first operand is the high half");
  EXPECT(pack_e5m2x2(2.0f, 1.0f) == 0x403c, "e5m2x2: the first operand is the high half");
}

// A double rounded to odd and then to f16 equals the double rounded once.
void check_round_to_odd() {
  unit::Random random(2);
  for (int i = 0; i < 20000; ++i) {
    const uint32_t code = static_cast<uint32_t>(random.below(0x7bff));
    const double low = kF16.value(code), high = kF16.value(code + 1);
    const double middle = (low + high) / 2;
    EXPECT(f32_to_f16(f64_to_f32_odd(std::nextafter(middle, 1e9))) == code + 1, "0x%x up", code);
    EXPECT(f32_to_f16(f64_to_f32_odd(std::nextafter(middle, -1e9))) == code, "0x%x down", code);
    EXPECT(f32_to_f16(f64_to_f32_odd(middle)) == code + (code & 1), "0x%x tie", code);
  }
}

}  // namespace

int main() {
  check_widening(kF16, [](uint32_t x) { return f16_to_f32(static_cast<uint16_t>(x)); });
  check_widening(kBf16, [](uint32_t x) { return bf16_to_f32(static_cast<uint16_t>(x)); });
  check_widening(kE4m3, [](uint32_t x) { return e4m3_to_f32(static_cast<uint8_t>(x)); });
  check_widening(kE5m2, [](uint32_t x) { return e5m2_to_f32(static_cast<uint8_t>(x)); });
  check_rounding<Round::kNearest>();
  check_rounding<Round::kZero>();
  check_rounding<Round::kDown>();
  check_rounding<Round::kUp>();
  check_rounding<Round::kAway>();
  check_narrowing(kE4m3, Round::kNearest, true, [](float x) { return f32_to_e4m3(x); });
  check_narrowing(kE5m2, Round::kNearest, true, [](float x) { return f32_to_e5m2(x); });
  check_special_values();
  check_round_to_odd();
  return unit::finish("formats");
}
