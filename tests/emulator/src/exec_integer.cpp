// Integer arithmetic and bit operations.
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace flash_ext::emulator {

namespace {

template <class T>
using U = std::make_unsigned_t<T>;
// Arithmetic that wraps, at no less than 32 bits so that nothing is promoted to int.
template <class T>
using Wrap = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
struct Widened;
template <>
struct Widened<uint16_t> {
  using type = uint32_t;
};
template <>
struct Widened<int16_t> {
  using type = int32_t;
};
template <>
struct Widened<uint32_t> {
  using type = uint64_t;
};
template <>
struct Widened<int32_t> {
  using type = int64_t;
};
template <>
struct Widened<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Widened<int64_t> {
  using type = __int128;
};
template <class T>
using Wide = typename Widened<T>::type;

#define FLASH_EXT_BINARY(Name, expression)                        \
  template <class T>                                              \
  struct Name {                                                   \
    static T run(T a, T b) { return static_cast<T>(expression); } \
    static constexpr Handler handler = binary<Name, T, T, T>;     \
  };
#define FLASH_EXT_TERNARY(Name, expression)                            \
  template <class T>                                                   \
  struct Name {                                                        \
    static T run(T a, T b, T c) { return static_cast<T>(expression); } \
    static constexpr Handler handler = ternary<Name, T, T, T, T>;      \
  };
#define FLASH_EXT_UNARY(Name, Result, expression)                      \
  template <class T>                                                   \
  struct Name {                                                        \
    static Result run(T a) { return static_cast<Result>(expression); } \
    static constexpr Handler handler = unary<Name, Result, T>;         \
  };

FLASH_EXT_BINARY(Add, Wrap<T>(a) + Wrap<T>(b))
FLASH_EXT_BINARY(Sub, Wrap<T>(a) - Wrap<T>(b))
FLASH_EXT_BINARY(MulLo, Wrap<T>(a) * Wrap<T>(b))
FLASH_EXT_BINARY(MulHi, (Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T)))
FLASH_EXT_BINARY(Min, a < b ? a : b)
FLASH_EXT_BINARY(Max, a > b ? a : b)
FLASH_EXT_BINARY(And, a& b)
FLASH_EXT_BINARY(Or, a | b)
FLASH_EXT_BINARY(Xor, a ^ b)
FLASH_EXT_TERNARY(MadLo, Wrap<T>(a) * Wrap<T>(b) + Wrap<T>(c))
FLASH_EXT_TERNARY(MadHi, Wrap<T>((Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T))) + Wrap<T>(c))
FLASH_EXT_UNARY(Not, T, ~a)
FLASH_EXT_UNARY(Cnot, T, a == 0)
FLASH_EXT_UNARY(Neg, T, Wrap<T>(0) - Wrap<T>(a))
FLASH_EXT_UNARY(Abs, T, a < 0 ? Wrap<T>(0) - Wrap<T>(a) : Wrap<T>(a))
FLASH_EXT_UNARY(Popc, uint32_t, std::popcount(U<T>(a)))
FLASH_EXT_UNARY(Clz, uint32_t, std::countl_zero(U<T>(a)))

template <class T>
struct MinRelu {
  static T run(T a, T b) { return std::max<T>(0, std::min(a, b)); }
  static constexpr Handler handler = binary<MinRelu, T, T, T>;
};
template <class T>
struct MaxRelu {
  static T run(T a, T b) { return std::max<T>(0, std::max(a, b)); }
  static constexpr Handler handler = binary<MaxRelu, T, T, T>;
};

// Division by zero gives all ones on the hardware; so does the remainder's dividend.
template <class T>
struct Div {
  static T run(T a, T b) {
    if (b == 0) return static_cast<T>(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return static_cast<T>(Wrap<T>(0) - Wrap<T>(a));
    return static_cast<T>(a / b);
  }
  static constexpr Handler handler = binary<Div, T, T, T>;
};
template <class T>
struct Rem {
  static T run(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return static_cast<T>(a % b);
  }
  static constexpr Handler handler = binary<Rem, T, T, T>;
};

template <class T>
struct MulWide {
  using R = std::conditional_t<sizeof(T) == 8, T, Wide<T>>;
  static R run(T a, T b) { return R(a) * R(b); }
  static constexpr Handler handler = binary<MulWide, R, T, T>;
};
template <class T>
struct MadWide {
  using R = std::conditional_t<sizeof(T) == 8, T, Wide<T>>;
  static R run(T a, T b, R c) { return static_cast<R>(static_cast<U<R>>(R(a) * R(b)) + static_cast<U<R>>(c)); }
  static constexpr Handler handler = ternary<MadWide, R, T, T, R>;
};

template <class T>
struct Shl {
  static T run(T a, uint32_t n) {
    return n < 8 * sizeof(T) ? static_cast<T>(Wrap<T>(a) << (n & (8 * sizeof(Wrap<T>) - 1))) : T(0);
  }
  static constexpr Handler handler = binary<Shl, T, T, uint32_t>;
};
template <class T>
struct Shr {
  static T run(T a, uint32_t n) {
    const uint32_t last = 8 * sizeof(T) - 1;
    if (std::is_signed_v<T>) return static_cast<T>(a >> (n > last ? last : n));
    return n > last ? T(0) : static_cast<T>(a >> n);
  }
  static constexpr Handler handler = binary<Shr, T, T, uint32_t>;
};

struct ShfLeftWrap {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c) {
    return static_cast<uint32_t>(((uint64_t(b) << 32 | a) << (c & 31)) >> 32);
  }
};
struct ShfLeftClamp {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t n = c > 32 ? 32 : c;
    return static_cast<uint32_t>(n == 32 ? a : ((uint64_t(b) << 32 | a) << n) >> 32);
  }
};
struct ShfRightWrap {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c) {
    return static_cast<uint32_t>((uint64_t(b) << 32 | a) >> (c & 31));
  }
};
struct ShfRightClamp {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c) {
    return static_cast<uint32_t>((uint64_t(b) << 32 | a) >> (c > 32 ? 32 : c));
  }
};

template <class T>
struct Bfind {
  static uint32_t run(T a) {
    U<T> value = static_cast<U<T>>(a);
    if (std::is_signed_v<T> && a < 0) value = static_cast<U<T>>(~value);
    return value ? 8 * sizeof(T) - 1 - std::countl_zero(value) : 0xffffffffu;
  }
  static constexpr Handler handler = unary<Bfind, uint32_t, T>;
};
template <class T>
struct BfindShift {
  static uint32_t run(T a) {
    const uint32_t bit = Bfind<T>::run(a);
    return bit == 0xffffffffu ? bit : 8 * sizeof(T) - 1 - bit;
  }
  static constexpr Handler handler = unary<BfindShift, uint32_t, T>;
};
template <class T>
struct Brev {
  static T run(T a) {
    T result = 0;
    for (size_t i = 0; i < 8 * sizeof(T); ++i) result |= ((a >> i) & 1) << (8 * sizeof(T) - 1 - i);
    return result;
  }
  static constexpr Handler handler = unary<Brev, T, T>;
};
template <class T>
struct Bfe {
  static T run(T a, uint32_t pos, uint32_t len) {
    const uint32_t bits = 8 * sizeof(T), last = bits - 1;
    pos &= 0xff;
    len &= 0xff;
    if (len == 0) return 0;
    const U<T> value = static_cast<U<T>>(a);
    const uint32_t top = std::min(pos + len - 1, last);
    const bool sign = std::is_signed_v<T> && (value >> top & 1);
    U<T> field = pos > last ? U<T>(0) : static_cast<U<T>>(value >> pos);
    const uint32_t kept = pos > last ? 0 : std::min(len, bits - pos);
    const U<T> mask = kept >= bits ? ~U<T>(0) : static_cast<U<T>>((U<T>(1) << kept) - 1);
    field &= mask;
    return static_cast<T>(sign ? field | static_cast<U<T>>(~mask) : field);
  }
  static constexpr Handler handler = ternary<Bfe, T, T, uint32_t, uint32_t>;
};

template <class T>
Status bfi(Warp& w, const Inst& i, Mask mask) {
  const T* a = in<T>(w, i.a);
  const T* b = in<T>(w, i.b);
  const uint32_t* pos = in<uint32_t>(w, i.c);
  const uint32_t* len = in<uint32_t>(w, w.launch->program->refs[i.extra]);
  alignas(64) T result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t bits = 8 * sizeof(T), p = pos[l] & 0xff, n = len[l] & 0xff;
    T field = n >= bits ? ~T(0) : (T(1) << n) - 1;
    field = p >= bits ? T(0) : field << p;
    result[l] = (b[l] & ~field) | ((p >= bits ? T(0) : a[l] << p) & field);
  }
  store_lanes(at<T>(w, i.d), result, mask);
  return Status::kNext;
}

template <class T>
struct Sad {
  static T run(T a, T b, T c) {
    return static_cast<T>(Wrap<T>(c) + (a < b ? Wrap<T>(b) - Wrap<T>(a) : Wrap<T>(a) - Wrap<T>(b)));
  }
  static constexpr Handler handler = ternary<Sad, T, T, T, T>;
};
struct AddSat {
  static int32_t run(int32_t a, int32_t b) {
    const int64_t sum = int64_t(a) + b;
    return static_cast<int32_t>(std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX));
  }
};
struct SubSat {
  static int32_t run(int32_t a, int32_t b) {
    const int64_t sum = int64_t(a) - b;
    return static_cast<int32_t>(std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX));
  }
};
struct Bmsk {
  static uint32_t run(uint32_t a, uint32_t b) {
    const uint64_t field = (uint64_t(1) << (b > 32 ? 32 : b)) - 1;
    return a > 31 ? 0 : static_cast<uint32_t>(field << a);
  }
};

struct Prmt {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t nibble = selector >> (4 * k) & 0xf;
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
      const uint32_t sign = (byte >> 7) * 0xff;
      byte = nibble & 8 ? sign : byte;
      result |= byte << (8 * k);
    }
    return result;
  }
};

Status lop3(Warp& w, const Inst& i, Mask mask) {
  const uint32_t* a = in<uint32_t>(w, i.a);
  const uint32_t* b = in<uint32_t>(w, i.b);
  const uint32_t* c = in<uint32_t>(w, i.c);
  uint32_t terms[8];
  for (int t = 0; t < 8; ++t) terms[t] = i.aux >> t & 1 ? kFullMask : 0;
  alignas(64) uint32_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t x = a[l], y = b[l], z = c[l];
    result[l] = (terms[0] & ~x & ~y & ~z) | (terms[1] & ~x & ~y & z) | (terms[2] & ~x & y & ~z) |
                (terms[3] & ~x & y & z) | (terms[4] & x & ~y & ~z) | (terms[5] & x & ~y & z) | (terms[6] & x & y & ~z) |
                (terms[7] & x & y & z);
  }
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

template <bool kSignedA, bool kSignedB>
struct Dp4a {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c) {
    for (int k = 0; k < 4; ++k) {
      const int32_t x = kSignedA ? int32_t(int8_t(a >> (8 * k))) : int32_t(uint8_t(a >> (8 * k)));
      const int32_t y = kSignedB ? int32_t(int8_t(b >> (8 * k))) : int32_t(uint8_t(b >> (8 * k)));
      c += static_cast<uint32_t>(x * y);
    }
    return c;
  }
};

// add.cc, addc, sub.cc, subc: the carry of each lane is a bit of Warp::carry.
template <class T, bool kSubtract>
Status add_carry(Warp& w, const Inst& i, Mask mask) {
  const T* a = in<T>(w, i.a);
  const T* b = in<T>(w, i.b);
  const bool uses = i.aux & 1, sets = i.aux & 2;
  alignas(64) T result[kLanes];
  Mask carry = 0;
  for (int l = 0; l < kLanes; ++l) {
    const T incoming = uses ? w.carry >> l & 1 : T(0);
    T sum, total;
    bool over;
    if (kSubtract) {
      over = __builtin_sub_overflow(a[l], b[l], &sum);
      over |= __builtin_sub_overflow(sum, incoming, &total);
    } else {
      over = __builtin_add_overflow(a[l], b[l], &sum);
      over |= __builtin_add_overflow(sum, incoming, &total);
    }
    result[l] = total;
    carry |= Mask(over) << l;
  }
  if (sets) w.carry = (w.carry & ~mask) | (carry & mask);
  store_lanes(at<T>(w, i.d), result, mask);
  return Status::kNext;
}

// mad.lo.cc, madc.hi and their kin. aux: 1 uses the carry, 2 sets it, 4 the high half.
template <class T>
Status mad_carry(Warp& w, const Inst& i, Mask mask) {
  const T* a = in<T>(w, i.a);
  const T* b = in<T>(w, i.b);
  const T* c = in<T>(w, i.c);
  alignas(64) T result[kLanes];
  Mask carry = 0;
  for (int l = 0; l < kLanes; ++l) {
    const Wide<T> product = Wide<T>(a[l]) * b[l];
    const T part = static_cast<T>(i.aux & 4 ? product >> (8 * sizeof(T)) : product);
    const Wide<T> sum = Wide<T>(part) + c[l] + (i.aux & 1 ? w.carry >> l & 1 : 0);
    result[l] = static_cast<T>(sum);
    carry |= Mask(static_cast<Mask>(sum >> (8 * sizeof(T))) & 1) << l;
  }
  if (i.aux & 2) w.carry = (w.carry & ~mask) | (carry & mask);
  store_lanes(at<T>(w, i.d), result, mask);
  return Status::kNext;
}

template <class Op>
struct BinaryU32 {
  static constexpr Handler handler = binary<Op, uint32_t, uint32_t, uint32_t>;
};

void emit_binary(Decoder& d, Handler handler, PtxType r, PtxType a, PtxType b) {
  if (!handler) d.unsupported("type");
  Inst in;
  in.run = handler;
  in.a = d.source(1, a);
  in.b = d.source(2, b);
  in.d = d.destination(0, r);
  d.emit(in);
}
void emit_ternary(Decoder& d, Handler handler, PtxType r, PtxType a, PtxType b, PtxType c) {
  if (!handler) d.unsupported("type");
  Inst in;
  in.run = handler;
  in.a = d.source(1, a);
  in.b = d.source(2, b);
  in.c = d.source(3, c);
  in.d = d.destination(0, r);
  d.emit(in);
}
void emit_unary(Decoder& d, Handler handler, PtxType r, PtxType a) {
  if (!handler) d.unsupported("type");
  Inst in;
  in.run = handler;
  in.a = d.source(1, a);
  in.d = d.destination(0, r);
  d.emit(in);
}

PtxType widened(PtxType type) {
  switch (type) {
    case PtxType::kU16:
      return PtxType::kU32;
    case PtxType::kS16:
      return PtxType::kS32;
    case PtxType::kU32:
      return PtxType::kU64;
    case PtxType::kS32:
      return PtxType::kS64;
    default:
      return type;
  }
}

// 16-bit halves of 32-bit registers: add, min and max of u16x2 and s16x2.
template <class T, template <class> class Op>
struct Halves {
  static uint32_t run(uint32_t a, uint32_t b) {
    const T low = Op<T>::run(static_cast<T>(a), static_cast<T>(b));
    const T high = Op<T>::run(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
    return uint32_t(uint16_t(high)) << 16 | uint16_t(low);
  }
};
template <template <class> class Op>
Handler packed(std::string_view type) {
  using S = Halves<int16_t, Op>;
  using N = Halves<uint16_t, Op>;
  if (type == "s16x2") return binary<S, uint32_t, uint32_t, uint32_t>;
  if (type == "u16x2") return binary<N, uint32_t, uint32_t, uint32_t>;
  return nullptr;
}

bool decode_logic(Decoder& d, std::string_view op, PtxType type) {
  const PtxType u32 = PtxType::kU32;
  if (op == "and" || op == "or" || op == "xor") {
    if (type == PtxType::kPred) return false;
    emit_binary(d,
                op == "and"  ? for_bits<And>(type)
                : op == "or" ? for_bits<Or>(type)
                             : for_bits<Xor>(type),
                type, type, type);
  } else if (op == "not" || op == "cnot") {
    if (type == PtxType::kPred) return false;
    emit_unary(d, op == "not" ? for_bits<Not>(type) : for_bits<Cnot>(type), type, type);
  } else if (op == "shl") {
    emit_binary(d, for_bits<Shl>(type), type, type, u32);
  } else if (op == "shr") {
    emit_binary(d, for_integer<Shr>(type), type, type, u32);
  } else if (op == "shf") {
    const bool left = d.ptx().has("l"), wrap = d.ptx().has("wrap");
    using T = uint32_t;
    emit_ternary(d,
                 left ? (wrap ? ternary<ShfLeftWrap, T, T, T, T> : ternary<ShfLeftClamp, T, T, T, T>)
                      : (wrap ? ternary<ShfRightWrap, T, T, T, T> : ternary<ShfRightClamp, T, T, T, T>),
                 u32, u32, u32, u32);
  } else if (op == "prmt") {
    if (d.ptx().parts.size() != 2) d.unsupported("mode");
    emit_ternary(d, ternary<Prmt, uint32_t, uint32_t, uint32_t, uint32_t>, u32, u32, u32, u32);
  } else if (op == "lop3") {
    Inst in;
    if (d.ptx().parts.size() != 2) d.unsupported("predicate form");
    in.run = lop3;
    in.a = d.source(1, u32);
    in.b = d.source(2, u32);
    in.c = d.source(3, u32);
    in.aux = static_cast<uint32_t>(d.integer(d.operand(4)));
    in.d = d.destination(0, u32);
    d.emit(in);
  } else if (op == "popc" || op == "clz") {
    emit_unary(d, op == "popc" ? for_bits<Popc>(type) : for_bits<Clz>(type), u32, type);
  } else if (op == "bfind") {
    emit_unary(d, d.ptx().has("shiftamt") ? for_integer<BfindShift>(type) : for_integer<Bfind>(type), u32, type);
  } else if (op == "brev") {
    emit_unary(d, type_bytes(type) == 8 ? Brev<uint64_t>::handler : Brev<uint32_t>::handler, type, type);
  } else if (op == "bfe") {
    emit_ternary(d, for_integer<Bfe>(type), type, type, u32, u32);
  } else if (op == "bfi") {
    Inst in;
    in.run = type_bytes(type) == 8 ? bfi<uint64_t> : bfi<uint32_t>;
    in.a = d.source(1, type);
    in.b = d.source(2, type);
    in.c = d.source(3, u32);
    d.add_extra(in, d.source(4, u32));
    in.d = d.destination(0, type);
    d.emit(in);
  } else if (op == "bmsk") {
    if (!d.ptx().has("clamp")) d.unsupported("mode");
    emit_binary(d, BinaryU32<Bmsk>::handler, u32, u32, u32);
  } else {
    return false;
  }
  return true;
}

}  // namespace

Handler add_handler(bool wide) { return wide ? Add<uint64_t>::handler : Add<uint32_t>::handler; }

bool decode_integer(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  const PtxType type = parse_type(p.parts.back());
  const PtxType u32 = PtxType::kU32;
  if (decode_logic(d, op, type)) return true;
  if (is_float(type)) return false;
  if (type == PtxType::kNone) {
    const std::string_view name = p.parts.back();
    Handler handler = op == "add"                          ? packed<Add>(name)
                      : op == "min" && p.parts.size() == 2 ? packed<Min>(name)
                      : op == "max" && p.parts.size() == 2 ? packed<Max>(name)
                                                           : nullptr;
    if (!handler) return false;
    emit_binary(d, handler, u32, u32, u32);
    return true;
  }
  if (op == "add" || op == "sub" || op == "addc" || op == "subc") {
    const bool subtract = op[0] == 's', carry_in = op.size() == 4, carry_out = p.has("cc");
    if (carry_in || carry_out) {
      Inst in;
      in.run = type_bytes(type) == 8 ? (subtract ? add_carry<uint64_t, true> : add_carry<uint64_t, false>)
                                     : (subtract ? add_carry<uint32_t, true> : add_carry<uint32_t, false>);
      in.a = d.source(1, type);
      in.b = d.source(2, type);
      in.aux = (carry_in ? 1 : 0) | (carry_out ? 2 : 0);
      in.d = d.destination(0, type);
      d.emit(in);
    } else if (p.has("sat")) {
      emit_binary(d, subtract ? binary<SubSat, int32_t, int32_t, int32_t> : binary<AddSat, int32_t, int32_t, int32_t>,
                  type, type, type);
    } else {
      emit_binary(d, subtract ? for_bits<Sub>(type) : for_bits<Add>(type), type, type, type);
    }
  } else if (op == "madc" || (op == "mad" && p.has("cc"))) {
    // The sign would matter for the high half alone, and nvcc writes that unsigned.
    if (p.has("hi") && is_signed(type)) d.unsupported("signed high half with carry");
    Inst in;
    in.run = type_bytes(type) == 8 ? mad_carry<uint64_t> : mad_carry<uint32_t>;
    in.a = d.source(1, type);
    in.b = d.source(2, type);
    in.c = d.source(3, type);
    in.aux = (op == "madc" ? 1 : 0) | (p.has("cc") ? 2 : 0) | (p.has("hi") ? 4 : 0);
    in.d = d.destination(0, type);
    d.emit(in);
  } else if (op == "mul" || op == "mad") {
    const bool wide = p.has("wide"), hi = p.has("hi"), mad = op == "mad";
    if (p.has("cc") || p.has("sat") || (!wide && !hi && !p.has("lo"))) d.unsupported("mode");
    if (wide) {
      const PtxType r = widened(type);
      if (mad)
        emit_ternary(d, for_integer<MadWide>(type), r, type, type, r);
      else
        emit_binary(d, for_integer<MulWide>(type), r, type, type);
    } else if (mad) {
      emit_ternary(d, hi ? for_integer<MadHi>(type) : for_bits<MadLo>(type), type, type, type, type);
    } else {
      emit_binary(d, hi ? for_integer<MulHi>(type) : for_bits<MulLo>(type), type, type, type);
    }
  } else if (op == "div" || op == "rem") {
    emit_binary(d, op == "div" ? for_integer<Div>(type) : for_integer<Rem>(type), type, type, type);
  } else if (op == "min" || op == "max") {
    const bool relu = p.has("relu"), min = op == "min";
    emit_binary(d,
                min ? (relu ? for_integer<MinRelu>(type) : for_integer<Min>(type))
                    : (relu ? for_integer<MaxRelu>(type) : for_integer<Max>(type)),
                type, type, type);
  } else if (op == "abs") {
    emit_unary(d, for_integer<Abs>(type), type, type);
  } else if (op == "neg") {
    emit_unary(d, for_bits<Neg>(type), type, type);
  } else if (op == "sad") {
    emit_ternary(d, for_integer<Sad>(type), type, type, type, type);
  } else if (op == "dp4a") {
    const bool a = p.parts[1] == "s32", b = p.parts[2] == "s32";
    using T = uint32_t;
    emit_ternary(d,
                 a ? (b ? ternary<Dp4a<true, true>, T, T, T, T> : ternary<Dp4a<true, false>, T, T, T, T>)
                   : (b ? ternary<Dp4a<false, true>, T, T, T, T> : ternary<Dp4a<false, false>, T, T, T, T>),
                 u32, u32, u32, u32);
  } else {
    return false;
  }
  return true;
}

#undef FLASH_EXT_BINARY
#undef FLASH_EXT_TERNARY
#undef FLASH_EXT_UNARY

}  // namespace flash_ext::emulator
