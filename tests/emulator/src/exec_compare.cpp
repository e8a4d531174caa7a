// setp, set, selp, slct, testp.
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace flash_ext::emulator {

namespace {

enum class Compare : uint8_t {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan,
};

template <Compare C, class T>
inline bool compare(T a, T b) {
  if constexpr (C == Compare::kEq) return a == b;
  if constexpr (C == Compare::kNe) return a < b || a > b;
  if constexpr (C == Compare::kLt) return a < b;
  if constexpr (C == Compare::kLe) return a <= b;
  if constexpr (C == Compare::kGt) return a > b;
  if constexpr (C == Compare::kGe) return a >= b;
  if constexpr (C == Compare::kEqu) return !(a < b || a > b);
  if constexpr (C == Compare::kNeu) return a != b;
  if constexpr (C == Compare::kLtu) return !(a >= b);
  if constexpr (C == Compare::kLeu) return !(a > b);
  if constexpr (C == Compare::kGtu) return !(a <= b);
  if constexpr (C == Compare::kGeu) return !(a < b);
  if constexpr (C == Compare::kNum) return a == a && b == b;
  return a != a || b != b;
}

// How a 16-bit float or a plain type is read from its slot.
struct AsF16 {
  using type = float;
  using S = uint32_t;
  static float read(S x) { return f16_to_f32(static_cast<uint16_t>(x)); }
};
struct AsBf16 {
  using type = float;
  using S = uint32_t;
  static float read(S x) { return bf16_to_f32(static_cast<uint16_t>(x)); }
};
template <class T>
struct As {
  using type = T;
  using S = Slot<T>;
  static T read(S x) { return from_slot<T>(x); }
};

template <Compare C, class R>
Mask compare_lanes(const void* left, const void* right) {
  using S = typename R::S;
  const S* a = static_cast<const S*>(left);
  const S* b = static_cast<const S*>(right);
  alignas(64) uint32_t bits[kLanes];
  for (int l = 0; l < kLanes; ++l) bits[l] = compare<C>(R::read(a[l]), R::read(b[l])) ? 1u << l : 0;
  Mask result = 0;
  for (int l = 0; l < kLanes; ++l) result |= bits[l];
  return result;
}
using Comparer = Mask (*)(const void*, const void*);

constexpr std::pair<std::string_view, Compare> kCompares[] = {
    {"eq", Compare::kEq},   {"ne", Compare::kNe},   {"lt", Compare::kLt},   {"le", Compare::kLe},
    {"gt", Compare::kGt},   {"ge", Compare::kGe},   {"lo", Compare::kLt},   {"ls", Compare::kLe},
    {"hi", Compare::kGt},   {"hs", Compare::kGe},   {"equ", Compare::kEqu}, {"neu", Compare::kNeu},
    {"ltu", Compare::kLtu}, {"leu", Compare::kLeu}, {"gtu", Compare::kGtu}, {"geu", Compare::kGeu},
    {"num", Compare::kNum}, {"nan", Compare::kNan},
};

template <class R>
Comparer pick_ordered(Compare c) {
  switch (c) {
    case Compare::kEq:
      return compare_lanes<Compare::kEq, R>;
    case Compare::kNe:
      return compare_lanes<Compare::kNe, R>;
    case Compare::kLt:
      return compare_lanes<Compare::kLt, R>;
    case Compare::kLe:
      return compare_lanes<Compare::kLe, R>;
    case Compare::kGt:
      return compare_lanes<Compare::kGt, R>;
    case Compare::kGe:
      return compare_lanes<Compare::kGe, R>;
    default:
      return nullptr;
  }
}
template <class R>
Comparer pick(Compare c) {
  switch (c) {
    case Compare::kEqu:
      return compare_lanes<Compare::kEqu, R>;
    case Compare::kNeu:
      return compare_lanes<Compare::kNeu, R>;
    case Compare::kLtu:
      return compare_lanes<Compare::kLtu, R>;
    case Compare::kLeu:
      return compare_lanes<Compare::kLeu, R>;
    case Compare::kGtu:
      return compare_lanes<Compare::kGtu, R>;
    case Compare::kGeu:
      return compare_lanes<Compare::kGeu, R>;
    case Compare::kNum:
      return compare_lanes<Compare::kNum, R>;
    case Compare::kNan:
      return compare_lanes<Compare::kNan, R>;
    default:
      return pick_ordered<R>(c);
  }
}
Comparer comparer(PtxType type, Compare c) {
  switch (type) {
    case PtxType::kU16:
    case PtxType::kB16:
      return pick_ordered<As<uint16_t>>(c);
    case PtxType::kS16:
      return pick_ordered<As<int16_t>>(c);
    case PtxType::kU32:
    case PtxType::kB32:
      return pick_ordered<As<uint32_t>>(c);
    case PtxType::kS32:
      return pick_ordered<As<int32_t>>(c);
    case PtxType::kU64:
    case PtxType::kB64:
      return pick_ordered<As<uint64_t>>(c);
    case PtxType::kS64:
      return pick_ordered<As<int64_t>>(c);
    case PtxType::kF32:
      return pick<As<float>>(c);
    case PtxType::kF64:
      return pick<As<double>>(c);
    case PtxType::kF16:
      return pick<AsF16>(c);
    case PtxType::kBF16:
      return pick<AsBf16>(c);
    default:
      return nullptr;
  }
}

// imm holds the comparer; aux: 0 no further predicate, 1 and, 2 or, 3 xor; bit 8 flushes f32.
inline Mask evaluate(Warp& w, const Inst& i) {
  const auto compare = reinterpret_cast<Comparer>(i.imm);
  const void* a = w.base[i.a >> 31] + (i.a & kOffsetMask);
  const void* b = w.base[i.b >> 31] + (i.b & kOffsetMask);
  if (!(i.aux & 0x100)) return compare(a, b);
  alignas(64) uint32_t flushed[2][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t x = static_cast<const uint32_t*>(a)[l], y = static_cast<const uint32_t*>(b)[l];
    flushed[0][l] = x & 0x7f800000u ? x : x & 0x80000000u;
    flushed[1][l] = y & 0x7f800000u ? y : y & 0x80000000u;
  }
  return compare(flushed[0], flushed[1]);
}
inline Mask combine(Mask a, Mask b, uint32_t how) { return how == 1 ? a & b : how == 2 ? a | b : a ^ b; }

Status setp(Warp& w, const Inst& i, Mask mask) {
  write_predicate(w, i.d, mask, evaluate(w, i));
  return Status::kNext;
}
// d|q with an optional predicate c.
Status setp_combined(Warp& w, const Inst& i, Mask mask) {
  const Mask first = evaluate(w, i);
  const uint32_t how = i.aux & 0xff;
  const Mask c = how ? read_predicate(w, i.c) : 0;
  const Ref second = i.num_extra ? w.launch->program->refs[i.extra] : kNoRef;
  write_predicate(w, i.d, mask, how ? combine(first, c, how) : first);
  if (second != kNoRef) write_predicate(w, second, mask, how ? combine(~first, c, how) : ~first);
  return Status::kNext;
}
Status setp_packed(Warp& w, const Inst& i, Mask mask) {
  const auto compare = reinterpret_cast<Comparer>(i.imm);
  const uint32_t* a = in<uint32_t>(w, i.a);
  const uint32_t* b = in<uint32_t>(w, i.b);
  alignas(64) uint32_t high_a[kLanes], high_b[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    high_a[l] = a[l] >> 16;
    high_b[l] = b[l] >> 16;
  }
  write_predicate(w, i.d, mask, compare(a, b));
  write_predicate(w, w.launch->program->refs[i.extra], mask, compare(high_a, high_b));
  return Status::kNext;
}
// set: all ones or 1.0 where the comparison holds; first_target holds that value.
Status set(Warp& w, const Inst& i, Mask mask) {
  Mask bits = evaluate(w, i);
  if (i.aux & 0xff) bits = combine(bits, read_predicate(w, i.c), i.aux & 0xff);
  const uint32_t yes = i.first_target;
  alignas(64) uint32_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = bits >> l & 1 ? yes : 0;
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

template <class S>
Status selp(Warp& w, const Inst& i, Mask mask) {
  const S* a = in<S>(w, i.a);
  const S* b = in<S>(w, i.b);
  const Mask c = read_predicate(w, i.c);
  alignas(64) S result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = (c >> l) & 1 ? a[l] : b[l];
  store_lanes(at<S>(w, i.d), result, mask);
  return Status::kNext;
}
template <class S, bool kFloat>
Status slct(Warp& w, const Inst& i, Mask mask) {
  const S* a = in<S>(w, i.a);
  const S* b = in<S>(w, i.b);
  const uint32_t* c = in<uint32_t>(w, i.c);
  alignas(64) S result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const bool first = kFloat ? bits_float(c[l]) >= 0 : static_cast<int32_t>(c[l]) >= 0;
    result[l] = first ? a[l] : b[l];
  }
  store_lanes(at<S>(w, i.d), result, mask);
  return Status::kNext;
}

enum class Test : uint8_t { kFinite, kInfinite, kNumber, kNotanumber, kNormal, kSubnormal };
template <class T>
Status testp(Warp& w, const Inst& i, Mask mask) {
  const Slot<T>* a = in<Slot<T>>(w, i.a);
  Mask result = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int kind = std::fpclassify(from_slot<T>(a[l]));
    bool yes = false;
    switch (static_cast<Test>(i.aux)) {
      case Test::kFinite:
        yes = kind != FP_INFINITE && kind != FP_NAN;
        break;
      case Test::kInfinite:
        yes = kind == FP_INFINITE;
        break;
      case Test::kNumber:
        yes = kind != FP_NAN;
        break;
      case Test::kNotanumber:
        yes = kind == FP_NAN;
        break;
      case Test::kNormal:
        yes = kind == FP_NORMAL;
        break;
      case Test::kSubnormal:
        yes = kind == FP_SUBNORMAL;
        break;
    }
    result |= Mask(yes) << l;
  }
  write_predicate(w, i.d, mask, result);
  return Status::kNext;
}

Compare find_compare(Decoder& d) {
  for (const auto& [name, compare] : kCompares) {
    if (d.ptx().parts[1] == name) return compare;
  }
  d.unsupported("comparison");
}
uint32_t find_combination(const PtxInstruction& p) { return p.has("and") ? 1 : p.has("or") ? 2 : p.has("xor") ? 3 : 0; }

void decode_setp(Decoder& d, PtxType type) {
  const PtxInstruction& p = d.ptx();
  const bool packed = type == PtxType::kF16x2 || type == PtxType::kBF16x2;
  const PtxType element = type == PtxType::kF16x2 ? PtxType::kF16 : type == PtxType::kBF16x2 ? PtxType::kBF16 : type;
  const Comparer compare = comparer(element, find_compare(d));
  if (!compare) d.unsupported("comparison of this type");
  Inst in;
  in.imm = reinterpret_cast<int64_t>(compare);
  in.aux = find_combination(p);
  if (type == PtxType::kF32 && p.has("ftz")) in.aux |= 0x100;
  in.a = d.source(1, type);
  in.b = d.source(2, type);
  if (in.aux & 0xff) in.c = d.predicate(d.operand(3));
  const PtxOperand& to = d.operand(0);
  if (to.kind == PtxOperand::kPair) {
    in.d = d.predicate_destination(to.items[0]);
    d.add_extra(in, d.predicate_destination(to.items[1]));
  } else {
    in.d = d.predicate_destination(to);
  }
  if (packed && (in.num_extra == 0 || in.aux)) d.unsupported("form");
  in.run = packed ? setp_packed : (in.aux & 0xff) || in.num_extra ? setp_combined : setp;
  d.emit(in);
}

void decode_set(Decoder& d, PtxType type) {
  const PtxInstruction& p = d.ptx();
  const PtxType result = parse_type(p.parts[p.parts.size() - 2]);
  const Comparer compare = comparer(type, find_compare(d));
  if (!compare || type_bytes(result) > 4) d.unsupported("types");
  Inst in;
  in.run = set;
  in.imm = reinterpret_cast<int64_t>(compare);
  in.aux = find_combination(p);
  in.a = d.source(1, type);
  in.b = d.source(2, type);
  if (in.aux) in.c = d.predicate(d.operand(3));
  in.d = d.destination(0, result);
  const uint32_t yes = result == PtxType::kF32    ? 0x3f800000u
                       : result == PtxType::kF16  ? 0x3c00u
                       : result == PtxType::kBF16 ? 0x3f80u
                       : type_bytes(result) == 2  ? 0xffffu
                                                  : kFullMask;
  in.first_target = yes;
  d.emit(in);
}

}  // namespace

bool decode_compare(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  const PtxType type = parse_type(p.parts.back());
  Inst in;
  if (op == "setp") {
    decode_setp(d, type);
  } else if (op == "set") {
    decode_set(d, type);
  } else if (op == "selp") {
    in.run = type_bytes(type) == 8 ? selp<uint64_t> : selp<uint32_t>;
    in.a = d.source(1, type);
    in.b = d.source(2, type);
    in.c = d.predicate(d.operand(3));
    in.d = d.destination(0, type);
    d.emit(in).flags |= kFlagSelect;
  } else if (op == "slct") {
    const PtxType data = parse_type(p.parts[p.parts.size() - 2]);
    const bool wide = type_bytes(data) == 8, real = type == PtxType::kF32;
    in.run = wide ? (real ? slct<uint64_t, true> : slct<uint64_t, false>)
                  : (real ? slct<uint32_t, true> : slct<uint32_t, false>);
    in.a = d.source(1, data);
    in.b = d.source(2, data);
    in.c = d.source(3, type);
    in.d = d.destination(0, data);
    d.emit(in);
  } else if (op == "testp") {
    constexpr std::string_view kNames[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    while (in.aux < 6 && p.parts[1] != kNames[in.aux]) ++in.aux;
    if (in.aux == 6) d.unsupported("test");
    in.run = type == PtxType::kF64 ? testp<double> : testp<float>;
    in.a = d.source(1, type);
    in.d = d.predicate_destination(d.operand(0));
    d.emit(in);
  } else {
    return false;
  }
  return true;
}

}  // namespace flash_ext::emulator
