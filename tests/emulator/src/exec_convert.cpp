// cvt of every kind that nvcc writes for sm_80 and sm_90a.
#include <cfenv>
#include <cmath>
#include <limits>

#include "formats.h"
#include "lanes.h"

namespace flash_ext::emulator {

namespace {

// ---- integer to integer ----

template <class From, class To>
Status integer(Warp& w, const Inst& i, Mask mask) {
  const Slot<From>* a = in<Slot<From>>(w, i.a);
  alignas(64) Slot<To> result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    // Sign-extended to the slot, as a register may be wider than the type.
    using Signed = std::make_signed_t<Slot<To>>;
    const To value = static_cast<To>(static_cast<From>(a[l]));
    result[l] = std::is_signed_v<To> && sizeof(To) != 2 ? static_cast<Slot<To>>(static_cast<Signed>(value))
                                                        : to_slot<To>(value);
  }
  store_lanes(at<Slot<To>>(w, i.d), result, mask);
  return Status::kNext;
}
template <class From, class To>
Status integer_sat(Warp& w, const Inst& i, Mask mask) {
  const Slot<From>* a = in<Slot<From>>(w, i.a);
  alignas(64) Slot<To> result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const __int128 value = static_cast<From>(a[l]);
    const __int128 low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
    result[l] = to_slot<To>(static_cast<To>(value < low ? low : value > high ? high : value));
  }
  store_lanes(at<Slot<To>>(w, i.d), result, mask);
  return Status::kNext;
}
template <class From>
Handler pick_integer(PtxType to, bool sat) {
  switch (to) {
    case PtxType::kU8:
    case PtxType::kB8:
      return sat ? integer_sat<From, uint8_t> : integer<From, uint8_t>;
    case PtxType::kS8:
      return sat ? integer_sat<From, int8_t> : integer<From, int8_t>;
    case PtxType::kU16:
    case PtxType::kB16:
      return sat ? integer_sat<From, uint16_t> : integer<From, uint16_t>;
    case PtxType::kS16:
      return sat ? integer_sat<From, int16_t> : integer<From, int16_t>;
    case PtxType::kU32:
    case PtxType::kB32:
      return sat ? integer_sat<From, uint32_t> : integer<From, uint32_t>;
    case PtxType::kS32:
      return sat ? integer_sat<From, int32_t> : integer<From, int32_t>;
    case PtxType::kU64:
    case PtxType::kB64:
      return sat ? integer_sat<From, uint64_t> : integer<From, uint64_t>;
    case PtxType::kS64:
      return sat ? integer_sat<From, int64_t> : integer<From, int64_t>;
    default:
      return nullptr;
  }
}
Handler pick_integer(PtxType from, PtxType to, bool sat) {
  switch (from) {
    case PtxType::kU8:
    case PtxType::kB8:
      return pick_integer<uint8_t>(to, sat);
    case PtxType::kS8:
      return pick_integer<int8_t>(to, sat);
    case PtxType::kU16:
    case PtxType::kB16:
      return pick_integer<uint16_t>(to, sat);
    case PtxType::kS16:
      return pick_integer<int16_t>(to, sat);
    case PtxType::kU32:
    case PtxType::kB32:
      return pick_integer<uint32_t>(to, sat);
    case PtxType::kS32:
      return pick_integer<int32_t>(to, sat);
    case PtxType::kU64:
    case PtxType::kB64:
      return pick_integer<uint64_t>(to, sat);
    case PtxType::kS64:
      return pick_integer<int64_t>(to, sat);
    default:
      return nullptr;
  }
}

// ---- everything that touches a float, one lane at a time, through f64 ----

enum Modifier : uint32_t { kRelu = 1, kSat = 2, kFtz = 4, kIntegral = 8 };

// f64 holds every source exactly but 64-bit integers, which long double does.
long double read_lane(const Warp& w, Ref ref, PtxType type, int l) {
  switch (type) {
    case PtxType::kU8:
      return static_cast<uint8_t>(in<uint32_t>(w, ref)[l]);
    case PtxType::kS8:
      return static_cast<int8_t>(in<uint32_t>(w, ref)[l]);
    case PtxType::kU16:
      return static_cast<uint16_t>(in<uint32_t>(w, ref)[l]);
    case PtxType::kS16:
      return static_cast<int16_t>(in<uint32_t>(w, ref)[l]);
    case PtxType::kU32:
      return in<uint32_t>(w, ref)[l];
    case PtxType::kS32:
      return static_cast<int32_t>(in<uint32_t>(w, ref)[l]);
    case PtxType::kU64:
      return in<uint64_t>(w, ref)[l];
    case PtxType::kS64:
      return static_cast<int64_t>(in<uint64_t>(w, ref)[l]);
    case PtxType::kF16:
      return f16_to_f32(static_cast<uint16_t>(in<uint32_t>(w, ref)[l]));
    case PtxType::kBF16:
      return bf16_to_f32(static_cast<uint16_t>(in<uint32_t>(w, ref)[l]));
    case PtxType::kF64:
      return std::bit_cast<double>(in<uint64_t>(w, ref)[l]);
    default:
      return bits_float(in<uint32_t>(w, ref)[l]);
  }
}
int environment(Round round) {
  switch (round) {
    case Round::kZero:
      return FE_TOWARDZERO;
    case Round::kDown:
      return FE_DOWNWARD;
    case Round::kUp:
      return FE_UPWARD;
    default:
      return FE_TONEAREST;
  }
}
template <class T>
T round_to(long double value, Round round) {
  std::fesetround(environment(round));
  volatile long double from = value;
  volatile T to = static_cast<T>(from);
  std::fesetround(FE_TONEAREST);
  return to;
}
// An f32 that rounds to any narrower format as `value` does.
float odd_single(long double value) {
  const float cut = round_to<float>(value, Round::kZero);
  if (std::isnan(cut) || static_cast<long double>(cut) == value) return cut;
  return bits_float(float_bits(cut) | 1);
}
long double integral(long double value, Round round) {
  switch (round) {
    case Round::kZero:
      return std::trunc(value);
    case Round::kDown:
      return std::floor(value);
    case Round::kUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}
template <Round kRound>
uint32_t narrow_half(PtxType to, float x, bool relu, bool sat) {
  if (to == PtxType::kF16) return f32_to_f16<kRound>(x, relu, sat);
  if (to == PtxType::kBF16) return f32_to_bf16<kRound>(x, relu, sat);
  return f32_to_tf32<kRound>(x, relu, sat);
}

// aux: to | from << 8 | round << 16 | modifiers << 24.
Status general(Warp& w, const Inst& i, Mask mask) {
  const auto to = static_cast<PtxType>(i.aux & 0xff), from = static_cast<PtxType>(i.aux >> 8 & 0xff);
  const auto round = static_cast<Round>(i.aux >> 16 & 0xff);
  const uint32_t modifiers = i.aux >> 24;
  alignas(64) uint64_t result[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    long double value = read_lane(w, i.a, from, l);
    if ((modifiers & kFtz) && from == PtxType::kF32 && std::fabs(value) < 0x1p-126L) value = std::copysign(0.0L, value);
    if (modifiers & kIntegral) value = integral(value, round);
    if (!is_float(to) && to != PtxType::kTF32) {
      const uint32_t bits = 8 * type_bytes(to);
      if (std::isnan(value)) {
        result[l] = bits == 64 ? uint64_t(1) << 63 : 0;
        continue;
      }
      if (is_signed(to)) {
        const long double high = std::ldexp(1.0L, bits - 1);
        const int64_t top = static_cast<int64_t>((uint64_t(1) << (bits - 1)) - 1);
        result[l] = static_cast<uint64_t>(value >= high ? top : value < -high ? -top - 1 : static_cast<int64_t>(value));
        if (bits == 16) result[l] &= 0xffff;
      } else {
        const long double high = std::ldexp(1.0L, bits);
        const uint64_t top = bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
        result[l] = value >= high ? top : value <= 0 ? 0 : static_cast<uint64_t>(value);
      }
      continue;
    }
    if (modifiers & kSat) value = !(value > 0) ? 0 : value > 1 ? 1 : value;
    const Round narrowing = modifiers & kIntegral ? Round::kNearest : round;
    if (to == PtxType::kF64) {
      result[l] = std::bit_cast<uint64_t>(round_to<double>(value, narrowing));
    } else if (to == PtxType::kF32) {
      float single = round_to<float>(value, narrowing);
      if ((modifiers & kFtz) && std::fabs(single) < 0x1p-126f) single = std::copysign(0.0f, single);
      result[l] = float_bits(single);
    } else {
      const float single = odd_single(value);
      const bool relu = modifiers & kRelu;
      switch (narrowing) {
        case Round::kZero:
          result[l] = narrow_half<Round::kZero>(to, single, relu, false);
          break;
        case Round::kDown:
          result[l] = narrow_half<Round::kDown>(to, single, relu, false);
          break;
        case Round::kUp:
          result[l] = narrow_half<Round::kUp>(to, single, relu, false);
          break;
        case Round::kAway:
          result[l] = narrow_half<Round::kAway>(to, single, relu, false);
          break;
        default:
          result[l] = narrow_half<Round::kNearest>(to, single, relu, false);
          break;
      }
    }
  }
  if (type_bytes(to) == 8) {
    store_lanes(at<uint64_t>(w, i.d), result, mask);
  } else {
    alignas(64) uint32_t narrow[kLanes];
    for (int l = 0; l < kLanes; ++l) narrow[l] = static_cast<uint32_t>(result[l]);
    store_lanes(at<uint32_t>(w, i.d), narrow, mask);
  }
  return Status::kNext;
}

// ---- the common ones, vectorised ----

struct F32ToF16 {
  static uint32_t run(float a) { return f32_to_f16(a); }
};
struct F32ToBf16 {
  static uint32_t run(float a) { return f32_to_bf16(a); }
};
struct F16ToF32 {
  static float run(uint32_t a) { return f16_to_f32(static_cast<uint16_t>(a)); }
};
struct Bf16ToF32 {
  static float run(uint32_t a) { return bf16_to_f32(static_cast<uint16_t>(a)); }
};
struct S32ToF32 {
  static float run(int32_t a) { return static_cast<float>(a); }
};
struct U32ToF32 {
  static float run(uint32_t a) { return static_cast<float>(a); }
};
struct F32ToF64 {
  static double run(float a) { return a; }
};
struct F64ToF32 {
  static float run(double a) { return static_cast<float>(a); }
};

// Two f32 into a pair, and pairs into pairs. `bool` parameters: relu, satfinite.
struct PairF16 {
  static uint32_t run(float a, float b) { return pack_f16x2(a, b); }
};
struct PairBf16 {
  static uint32_t run(float a, float b) { return pack_bf16x2(a, b); }
};
struct PairE4m3 {
  static uint32_t run(float a, float b) { return pack_e4m3x2(a, b); }
};
struct PairE5m2 {
  static uint32_t run(float a, float b) { return pack_e5m2x2(a, b); }
};
struct PairF16Relu {
  static uint32_t run(float a, float b) { return pack_f16x2(a, b, true); }
};
struct PairBf16Relu {
  static uint32_t run(float a, float b) { return pack_bf16x2(a, b, true); }
};
struct PairE4m3Relu {
  static uint32_t run(float a, float b) { return pack_e4m3x2(a, b, true); }
};
struct PairE5m2Relu {
  static uint32_t run(float a, float b) { return pack_e5m2x2(a, b, true); }
};
struct PairF16Zero {
  static uint32_t run(float a, float b) { return pack_f16x2<Round::kZero>(a, b); }
};
struct PairBf16Zero {
  static uint32_t run(float a, float b) { return pack_bf16x2<Round::kZero>(a, b); }
};

template <bool kE5m2>
struct Fp8ToF16x2 {
  static uint32_t run(uint32_t a) {
    const auto low = static_cast<uint8_t>(a), high = static_cast<uint8_t>(a >> 8);
    return kE5m2 ? pack_f16x2(e5m2_to_f32(high), e5m2_to_f32(low)) : pack_f16x2(e4m3_to_f32(high), e4m3_to_f32(low));
  }
};
template <bool kE5m2>
struct F16x2ToFp8 {
  static uint32_t run(uint32_t a) {
    const float low = f16_to_f32(static_cast<uint16_t>(a)), high = f16_to_f32(static_cast<uint16_t>(a >> 16));
    return kE5m2 ? pack_e5m2x2(high, low) : pack_e4m3x2(high, low);
  }
};

Round find_round(const PtxInstruction& p) {
  if (p.has("rz") || p.has("rzi")) return Round::kZero;
  if (p.has("rm") || p.has("rmi")) return Round::kDown;
  if (p.has("rp") || p.has("rpi")) return Round::kUp;
  if (p.has("rna")) return Round::kAway;
  return Round::kNearest;
}

void decode_pair(Decoder& d, PtxType to, PtxType from) {
  const PtxInstruction& p = d.ptx();
  const bool relu = p.has("relu"), zero = p.has("rz");
  using T = uint32_t;
  Inst in;
  if (from == PtxType::kF32 && d.operand_count() == 3) {
    if (zero && relu) d.unsupported("mode");
    switch (to) {
      case PtxType::kF16x2:
        in.run = zero   ? binary<PairF16Zero, T, float, float>
                 : relu ? binary<PairF16Relu, T, float, float>
                        : binary<PairF16, T, float, float>;
        break;
      case PtxType::kBF16x2:
        in.run = zero   ? binary<PairBf16Zero, T, float, float>
                 : relu ? binary<PairBf16Relu, T, float, float>
                        : binary<PairBf16, T, float, float>;
        break;
      case PtxType::kE4M3x2:
        in.run = relu ? binary<PairE4m3Relu, T, float, float> : binary<PairE4m3, T, float, float>;
        break;
      default:
        in.run = relu ? binary<PairE5m2Relu, T, float, float> : binary<PairE5m2, T, float, float>;
        break;
    }
    in.b = d.source(2, from);
  } else if (to == PtxType::kF16x2 && !relu) {
    in.run = from == PtxType::kE5M2x2 ? unary<Fp8ToF16x2<true>, T, T> : unary<Fp8ToF16x2<false>, T, T>;
  } else if (from == PtxType::kF16x2 && !relu) {
    in.run = to == PtxType::kE5M2x2 ? unary<F16x2ToFp8<true>, T, T> : unary<F16x2ToFp8<false>, T, T>;
  } else {
    d.unsupported("types");
  }
  in.a = d.source(1, from);
  in.d = d.destination(0, to);
  d.emit(in);
}

bool is_pair(PtxType type) {
  return type == PtxType::kF16x2 || type == PtxType::kBF16x2 || type == PtxType::kE4M3x2 || type == PtxType::kE5M2x2;
}

}  // namespace

bool decode_convert(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  if (p.parts[0] != "cvt") return false;
  if (p.parts.size() < 3 || p.has("pack")) d.unsupported();
  const PtxType to = parse_type(p.parts[p.parts.size() - 2]), from = parse_type(p.parts.back());
  if (to == PtxType::kNone || from == PtxType::kNone) d.unsupported("type");
  if (is_pair(to) || is_pair(from)) {
    decode_pair(d, to, from);
    return true;
  }
  const bool sat = p.has("sat"), ftz = p.has("ftz"), relu = p.has("relu");
  const bool integral = p.has("rni") || p.has("rzi") || p.has("rmi") || p.has("rpi");
  const bool plain = !sat && !ftz && !relu && !integral && !p.has("satfinite");
  const Round round = find_round(p);
  Inst in;
  using T = uint32_t;
  auto is = [&](PtxType t, PtxType f) { return plain && round == Round::kNearest && to == t && from == f; };
  if (!is_float(to) && !is_float(from) && to != PtxType::kTF32)
    in.run = pick_integer(from, to, sat);
  else if (is(PtxType::kF16, PtxType::kF32))
    in.run = unary<F32ToF16, T, float>;
  else if (is(PtxType::kBF16, PtxType::kF32))
    in.run = unary<F32ToBf16, T, float>;
  else if (is(PtxType::kF32, PtxType::kF16))
    in.run = unary<F16ToF32, float, T>;
  else if (is(PtxType::kF32, PtxType::kBF16))
    in.run = unary<Bf16ToF32, float, T>;
  else if (is(PtxType::kF32, PtxType::kS32))
    in.run = unary<S32ToF32, float, int32_t>;
  else if (is(PtxType::kF32, PtxType::kU32))
    in.run = unary<U32ToF32, float, T>;
  else if (is(PtxType::kF64, PtxType::kF32))
    in.run = unary<F32ToF64, double, float>;
  else if (is(PtxType::kF32, PtxType::kF64))
    in.run = unary<F64ToF32, float, double>;
  else {
    if (p.has("satfinite") && to != PtxType::kTF32) d.unsupported("satfinite");
    in.run = general;
    in.aux = static_cast<uint32_t>(to) | static_cast<uint32_t>(from) << 8 | static_cast<uint32_t>(round) << 16 |
             ((relu ? kRelu : 0u) | (sat ? kSat : 0u) | (ftz ? kFtz : 0u) | (integral ? kIntegral : 0u)) << 24;
  }
  if (!in.run) d.unsupported("types");
  in.a = d.source(1, from);
  in.d = d.destination(0, to);
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
