// f16, bf16 and their pairs: every operation widens to f32, computes, and rounds once. An f32 fma of
// 11-bit or 8-bit significands has room for the exact product, and the second rounding is exact
// enough through f64 with rounding to odd.
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace flash_ext::emulator {

namespace {

struct F16 {
  static float widen(uint32_t x) { return f16_to_f32(static_cast<uint16_t>(x)); }
  static uint32_t narrow(float x) { return f32_to_f16(x); }
};
struct BF16 {
  static float widen(uint32_t x) { return bf16_to_f32(static_cast<uint16_t>(x)); }
  static uint32_t narrow(float x) { return f32_to_bf16(x); }
};

// The sum of products of halves, rounded to odd in f32: one more rounding gives the right half.
inline float odd_fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * b;
  const double sum = product + c;
  // The error of the f64 sum, folded in as a sticky bit.
  const double back = sum - product;
  const double error = (product - (sum - back)) + (c - back);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  const bool inexact = error != 0 && std::isfinite(sum);
  if (inexact && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : uint64_t(-1);
  return f64_to_f32_odd(std::bit_cast<double>(bits));
}

struct Add {
  static float run(float a, float b) { return f64_to_f32_odd(static_cast<double>(a) + b); }
};
struct Sub {
  static float run(float a, float b) { return f64_to_f32_odd(static_cast<double>(a) - b); }
};
struct Mul {
  static float run(float a, float b) { return a * b; }
};
struct Fma {
  static float run(float a, float b, float c) { return odd_fma(a, b, c); }
};
struct FmaRelu {
  static float run(float a, float b, float c) {
    const float r = odd_fma(a, b, c);
    return r < 0 ? 0.0f : r;
  }
};
template <class Op>
struct Saturated {
  template <class... A>
  static float run(A... a) {
    float r = Op::run(a...);
    r = r > 0 ? r : 0.0f;
    return r < 1 ? r : 1.0f;
  }
};
struct Min {
  static float run(float a, float b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
};
struct Max {
  static float run(float a, float b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; }
};
struct MinNan {
  static float run(float a, float b) { return a != a || b != b ? a + b : Min::run(a, b); }
};
struct MaxNan {
  static float run(float a, float b) { return a != a || b != b ? a + b : Max::run(a, b); }
};
struct Ex2 {
  static float run(float a) { return std::exp2(a); }
};
struct Tanh {
  static float run(float a) { return std::tanh(a); }
};

// One half per 32-bit lane, or two.
template <class F, class Op, bool kPair>
struct Halves {
  template <class... A>
  static uint32_t run(A... a) {
    const uint32_t low = F::narrow(Op::run(F::widen(a & 0xffff)...));
    if constexpr (!kPair) return low;
    return low | F::narrow(Op::run(F::widen(a >> 16)...)) << 16;
  }
};
struct Neg {
  static uint32_t run(uint32_t a) { return a ^ 0x80008000u; }
};
struct NegOne {
  static uint32_t run(uint32_t a) { return a ^ 0x8000u; }
};
struct Abs {
  static uint32_t run(uint32_t a) { return a & 0x7fff7fffu; }
};

template <class Op, int kInputs, class F, bool kPair>
constexpr Handler handler() {
  using H = Halves<F, Op, kPair>;
  using T = uint32_t;
  if constexpr (kInputs == 1)
    return unary<H, T, T>;
  else if constexpr (kInputs == 2)
    return binary<H, T, T, T>;
  else
    return ternary<H, T, T, T, T>;
}
template <class Op, int kInputs>
Handler pick(PtxType type) {
  switch (type) {
    case PtxType::kF16:
      return handler<Op, kInputs, F16, false>();
    case PtxType::kF16x2:
      return handler<Op, kInputs, F16, true>();
    case PtxType::kBF16:
      return handler<Op, kInputs, BF16, false>();
    default:
      return handler<Op, kInputs, BF16, true>();
  }
}

}  // namespace

bool decode_half(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  const PtxType type = parse_type(p.parts.back());
  const bool pair = type == PtxType::kF16x2 || type == PtxType::kBF16x2;
  if (!pair && type != PtxType::kF16 && type != PtxType::kBF16) return false;
  const bool sat = p.has("sat"), relu = p.has("relu"), nan = p.has("NaN");
  int inputs = 2;
  Inst in;
  if (op == "add")
    in.run = sat ? pick<Saturated<Add>, 2>(type) : pick<Add, 2>(type);
  else if (op == "sub")
    in.run = sat ? pick<Saturated<Sub>, 2>(type) : pick<Sub, 2>(type);
  else if (op == "mul")
    in.run = sat ? pick<Saturated<Mul>, 2>(type) : pick<Mul, 2>(type);
  else if (op == "min")
    in.run = nan ? pick<MinNan, 2>(type) : pick<Min, 2>(type);
  else if (op == "max")
    in.run = nan ? pick<MaxNan, 2>(type) : pick<Max, 2>(type);
  else if (op == "fma") {
    inputs = 3;
    in.run = relu ? pick<FmaRelu, 3>(type) : sat ? pick<Saturated<Fma>, 3>(type) : pick<Fma, 3>(type);
  } else {
    inputs = 1;
    if (op == "neg")
      in.run = pair ? unary<Neg, uint32_t, uint32_t> : unary<NegOne, uint32_t, uint32_t>;
    else if (op == "abs")
      in.run = unary<Abs, uint32_t, uint32_t>;
    else if (op == "ex2")
      in.run = pick<Ex2, 1>(type);
    else if (op == "tanh")
      in.run = pick<Tanh, 1>(type);
    else
      return false;
  }
  if (p.has("xorsign") || p.has("oob")) d.unsupported("mode");
  in.a = d.source(1, type);
  if (inputs >= 2) in.b = d.source(2, type);
  if (inputs >= 3) in.c = d.source(3, type);
  in.d = d.destination(0, type);
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
