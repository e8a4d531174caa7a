// f32 and f64 arithmetic. The approximate functions are as accurate as f32 allows or nearly so; their
// last bits differ from the hardware's.
#include <cfenv>
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace flash_ext::emulator {

namespace {

inline float flush(float x) {
  const uint32_t bits = float_bits(x);
  return bits_float(bits & 0x7f800000u ? bits : bits & 0x80000000u);
}
template <bool kFtz, class T>
inline T maybe_flush(T x) {
  if constexpr (kFtz && sizeof(T) == 4) return flush(x);
  return x;
}
// NaN becomes +0.
template <class T>
inline T saturate(T x) {
  x = x > T(0) ? x : T(0);
  return x < T(1) ? x : T(1);
}
// The hardware returns one canonical NaN.
inline float canonical(float x) { return x != x ? bits_float(0x7fffffffu) : x; }
inline double canonical(double x) { return x; }

struct Add {
  template <class T>
  static T run(T a, T b) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T run(T a, T b) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T run(T a, T b) {
    return a * b;
  }
};
struct Div {
  template <class T>
  static T run(T a, T b) {
    return a / b;
  }
};
struct Fma {
  template <class T>
  static T run(T a, T b, T c) {
    return __builtin_fma(a, b, c);
  }
};
template <>
inline float Fma::run<float>(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}

// One or the other if only one is NaN, and -0 below +0.
struct Min {
  template <class T>
  static T run(T a, T b) {
    const T least = a < b || (a == b && std::signbit(a)) ? a : b;
    return a != a ? b : b != b ? a : least;
  }
};
struct Max {
  template <class T>
  static T run(T a, T b) {
    const T most = a > b || (a == b && !std::signbit(a)) ? a : b;
    return a != a ? b : b != b ? a : most;
  }
};
template <class Op>
struct PassNan {
  template <class T>
  static T run(T a, T b) {
    return a != a || b != b ? a + b : Op::run(a, b);
  }
};
template <class Op>
struct XorSign {
  template <class T>
  static T run(T a, T b) {
    const T size = Op::run(std::fabs(a), std::fabs(b));
    return std::signbit(a) != std::signbit(b) ? -size : size;
  }
};
struct Neg {
  template <class T>
  static T run(T a) {
    return -a;
  }
};
struct Abs {
  template <class T>
  static T run(T a) {
    return std::fabs(a);
  }
};
struct Rcp {
  template <class T>
  static T run(T a) {
    return T(1) / a;
  }
};
struct Sqrt {
  template <class T>
  static T run(T a) {
    return std::sqrt(a);
  }
};
struct Rsqrt {
  template <class T>
  static T run(T a) {
    return static_cast<T>(1.0 / std::sqrt(static_cast<double>(a)));
  }
};
struct Lg2 {
  template <class T>
  static T run(T a) {
    return std::log2(a);
  }
};
struct Sin {
  template <class T>
  static T run(T a) {
    return static_cast<T>(std::sin(static_cast<double>(a)));
  }
};
struct Cos {
  template <class T>
  static T run(T a) {
    return static_cast<T>(std::cos(static_cast<double>(a)));
  }
};
struct Tanh {
  template <class T>
  static T run(T a) {
    return static_cast<T>(std::tanh(static_cast<double>(a)));
  }
};

// 2^x: a polynomial on [-1/2, 1/2], scaled in two steps so that subnormal results come out rounded.
struct Ex2 {
  static float run(float x) {
    const float clamped = x < -160.0f ? -160.0f : x > 140.0f ? 140.0f : x;
    const float whole = __builtin_rintf(clamped);
    const float f = clamped - whole;
    float p = 1.5403530e-4f;
    p = __builtin_fmaf(p, f, 1.3333558e-3f);
    p = __builtin_fmaf(p, f, 9.6181291e-3f);
    p = __builtin_fmaf(p, f, 5.5504109e-2f);
    p = __builtin_fmaf(p, f, 2.4022651e-1f);
    p = __builtin_fmaf(p, f, 6.9314718e-1f);
    p = __builtin_fmaf(p, f, 1.0f);
    const int32_t n = x == x ? static_cast<int32_t>(whole) : 0, half = n >> 1;
    const float first = bits_float(static_cast<uint32_t>(half + 127) << 23);
    const float second = bits_float(static_cast<uint32_t>(n - half + 127) << 23);
    return x == x ? p * first * second : x;
  }
  static double run(double x) { return std::exp2(x); }
};

template <class Op, class T, bool kFtz, bool kSat>
struct Dressed {
  template <class... A>
  static T run(A... a) {
    T result = Op::run(maybe_flush<kFtz>(a)...);
    result = maybe_flush<kFtz>(result);
    if constexpr (kSat) return saturate(result);
    return canonical(result);
  }
};

template <class Op, class T, bool kFtz, bool kSat>
Handler handler_of(int inputs) {
  using D = Dressed<Op, T, kFtz, kSat>;
  if constexpr (std::is_invocable_v<decltype([](auto a) -> decltype(Op::run(a)) { return Op::run(a); }), T>) {
    if (inputs == 1) return unary<D, T, T>;
  }
  if constexpr (std::is_invocable_v<decltype([](auto a) -> decltype(Op::run(a, a)) { return Op::run(a, a); }), T>) {
    if (inputs == 2) return binary<D, T, T, T>;
  }
  if constexpr (std::is_invocable_v<decltype([](auto a) -> decltype(Op::run(a, a, a)) { return Op::run(a, a, a); }),
                                    T>) {
    if (inputs == 3) return ternary<D, T, T, T, T>;
  }
  return nullptr;
}
template <class Op>
Handler pick(PtxType type, int inputs, bool ftz, bool sat) {
  if (type == PtxType::kF64) return handler_of<Op, double, false, false>(inputs);
  if (type != PtxType::kF32) return nullptr;
  if (ftz) return sat ? handler_of<Op, float, true, true>(inputs) : handler_of<Op, float, true, false>(inputs);
  return sat ? handler_of<Op, float, false, true>(inputs) : handler_of<Op, float, false, false>(inputs);
}

// Directed rounding, lane by lane. `imm` is the mode for fesetround, aux bit 0 flushes, bit 1 saturates.
template <class Op, class T, int kInputs>
__attribute__((noinline)) Status directed(Warp& w, const Inst& i, Mask mask) {
  using S = Slot<T>;
  const bool ftz = (i.aux & 1) && sizeof(T) == 4;
  alignas(64) S result[kLanes];
  std::fesetround(static_cast<int>(i.imm));
  for (int l = 0; l < kLanes; ++l) {
    const Ref refs[3] = {i.a, i.b, i.c};
    volatile T v[3] = {};
    for (int k = 0; k < kInputs; ++k) {
      T value = from_slot<T>(in<S>(w, refs[k])[l]);
      if (ftz) value = maybe_flush<true>(value);
      v[k] = value;
    }
    volatile T value;
    if constexpr (kInputs == 1) value = Op::run(T(v[0]));
    if constexpr (kInputs == 2) value = Op::run(T(v[0]), T(v[1]));
    if constexpr (kInputs == 3) value = Op::run(T(v[0]), T(v[1]), T(v[2]));
    T out = canonical(T(value));
    if (ftz) out = maybe_flush<true>(out);
    if (i.aux & 2) out = saturate(out);
    result[l] = to_slot<T>(out);
  }
  std::fesetround(FE_TONEAREST);
  store_lanes(at<S>(w, i.d), result, mask);
  return Status::kNext;
}
template <class Op, int kInputs>
Handler pick_directed(PtxType type) {
  return type == PtxType::kF64 ? directed<Op, double, kInputs> : directed<Op, float, kInputs>;
}

struct Entry {
  std::string_view name;
  int inputs;
  Handler (*pick)(PtxType, int, bool, bool);
  Handler (*directed)(PtxType);
};
constexpr Entry kEntries[] = {
    {"add", 2, pick<Add>, pick_directed<Add, 2>},
    {"sub", 2, pick<Sub>, pick_directed<Sub, 2>},
    {"mul", 2, pick<Mul>, pick_directed<Mul, 2>},
    {"div", 2, pick<Div>, pick_directed<Div, 2>},
    {"fma", 3, pick<Fma>, pick_directed<Fma, 3>},
    {"mad", 3, pick<Fma>, pick_directed<Fma, 3>},
    {"neg", 1, pick<Neg>, nullptr},
    {"abs", 1, pick<Abs>, nullptr},
    {"rcp", 1, pick<Rcp>, pick_directed<Rcp, 1>},
    {"sqrt", 1, pick<Sqrt>, pick_directed<Sqrt, 1>},
    {"rsqrt", 1, pick<Rsqrt>, nullptr},
    {"lg2", 1, pick<Lg2>, nullptr},
    {"ex2", 1, pick<Ex2>, nullptr},
    {"sin", 1, pick<Sin>, nullptr},
    {"cos", 1, pick<Cos>, nullptr},
    {"tanh", 1, pick<Tanh>, nullptr},
};

template <bool kDouble>
Status copysign_lanes(Warp& w, const Inst& i, Mask mask) {
  using S = std::conditional_t<kDouble, uint64_t, uint32_t>;
  constexpr S kSign = S(1) << (8 * sizeof(S) - 1);
  const S* a = in<S>(w, i.a);
  const S* b = in<S>(w, i.b);
  alignas(64) S result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = (a[l] & kSign) | (b[l] & ~kSign);
  store_lanes(at<S>(w, i.d), result, mask);
  return Status::kNext;
}

Handler pick_min_max(Decoder& d, PtxType type) {
  const PtxInstruction& p = d.ptx();
  const bool min = p.parts[0] == "min", ftz = p.has("ftz"), nan = p.has("NaN");
  if (p.has("xorsign")) {
    if (nan) d.unsupported("mode");
    return min ? pick<XorSign<Min>>(type, 2, ftz, false) : pick<XorSign<Max>>(type, 2, ftz, false);
  }
  if (nan) return min ? pick<PassNan<Min>>(type, 2, ftz, false) : pick<PassNan<Max>>(type, 2, ftz, false);
  return min ? pick<Min>(type, 2, ftz, false) : pick<Max>(type, 2, ftz, false);
}

}  // namespace

bool decode_float(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  const PtxType type = parse_type(p.parts.back());
  if (type != PtxType::kF32 && type != PtxType::kF64) return false;
  Inst in;
  int inputs = 2;
  if (op == "min" || op == "max") {
    inputs = d.operand_count() == 4 ? 3 : 2;
    if (inputs == 3) d.unsupported("three inputs");
    in.run = pick_min_max(d, type);
  } else if (op == "copysign") {
    in.run = type == PtxType::kF64 ? copysign_lanes<true> : copysign_lanes<false>;
  } else {
    const Entry* entry = nullptr;
    for (const Entry& e : kEntries) {
      if (e.name == op) entry = &e;
    }
    if (!entry) return false;
    inputs = entry->inputs;
    const int mode = p.has("rz") ? FE_TOWARDZERO : p.has("rm") ? FE_DOWNWARD : p.has("rp") ? FE_UPWARD : FE_TONEAREST;
    if (mode != FE_TONEAREST) {
      if (!entry->directed) d.unsupported("rounding");
      in.run = entry->directed(type);
      in.imm = mode;
      in.aux = (p.has("ftz") ? 1 : 0) | (p.has("sat") ? 2 : 0);
    } else {
      in.run = entry->pick(type, inputs, p.has("ftz"), p.has("sat"));
    }
  }
  if (!in.run) d.unsupported("type");
  in.a = d.source(1, type);
  if (inputs >= 2) in.b = d.source(2, type);
  if (inputs >= 3) in.c = d.source(3, type);
  in.d = d.destination(0, type);
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
