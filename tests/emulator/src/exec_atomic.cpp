// atom and red, scalar and vector. Global memory is shared with other host threads: every update is
// a compare-and-swap of the host.
#include <algorithm>
#include <cstring>

#include "formats.h"
#include "lanes.h"
#include "memory_operand.h"

namespace flash_ext::emulator {

namespace {

enum class Op : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kInc, kDec, kExch, kCas };

template <class T>
T apply_number(Op op, T old, T value) {
  switch (op) {
    case Op::kAdd:
      return static_cast<T>(old + value);
    case Op::kMin:
      return old < value ? old : value;
    case Op::kMax:
      return old > value ? old : value;
    default:
      return value;
  }
}
template <class T>
T wrap_add(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
}

// old and value hold the bits of `type`; compare is only for cas.
uint64_t apply(Op op, PtxType type, uint64_t old, uint64_t value, uint64_t compare) {
  const uint32_t old32 = static_cast<uint32_t>(old), value32 = static_cast<uint32_t>(value);
  if (op == Op::kExch) return value;
  if (op == Op::kCas) return old == compare ? value : old;
  switch (type) {
    case PtxType::kF32:
      return float_bits(apply_number(op, bits_float(old32), bits_float(value32)));
    case PtxType::kF64:
      return std::bit_cast<uint64_t>(apply_number(op, std::bit_cast<double>(old), std::bit_cast<double>(value)));
    case PtxType::kF16:
      return f32_to_f16(
          apply_number(op, f16_to_f32(static_cast<uint16_t>(old)), f16_to_f32(static_cast<uint16_t>(value))));
    case PtxType::kBF16:
      return f32_to_bf16(
          apply_number(op, bf16_to_f32(static_cast<uint16_t>(old)), bf16_to_f32(static_cast<uint16_t>(value))));
    case PtxType::kF16x2:
    case PtxType::kBF16x2: {
      const PtxType half = type == PtxType::kF16x2 ? PtxType::kF16 : PtxType::kBF16;
      return apply(op, half, old & 0xffff, value & 0xffff, 0) | apply(op, half, old >> 16, value >> 16, 0) << 16;
    }
    default:
      break;
  }
  switch (op) {
    case Op::kAnd:
      return old & value;
    case Op::kOr:
      return old | value;
    case Op::kXor:
      return old ^ value;
    case Op::kInc:
      return old32 >= value32 ? 0 : old32 + 1;
    case Op::kDec:
      return old32 == 0 || old32 > value32 ? value32 : old32 - 1;
    case Op::kAdd:
      return type_bytes(type) == 8 ? old + value : static_cast<uint32_t>(old32 + value32);
    default:
      break;
  }
  if (type == PtxType::kS32)
    return static_cast<uint32_t>(apply_number<int32_t>(op, static_cast<int32_t>(old32), static_cast<int32_t>(value32)));
  if (type == PtxType::kS64)
    return static_cast<uint64_t>(apply_number<int64_t>(op, static_cast<int64_t>(old), static_cast<int64_t>(value)));
  return apply_number<uint64_t>(op, old, value);
}

template <class T>
uint64_t update(uint8_t* where, Op op, PtxType type, uint64_t value, uint64_t compare, uint64_t& effects) {
  T* cell = reinterpret_cast<T*>(where);
  T old = __atomic_load_n(cell, __ATOMIC_RELAXED);
  for (;;) {
    const T next = static_cast<T>(apply(op, type, old, value, compare));
    if (__atomic_compare_exchange_n(cell, &old, next, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
      effects += next != old;
      return old;
    }
  }
}

// aux: the mode of the access; first_target: op | type << 8; a: value, c: value of cas (then a compares).
// Vectors have their values in the extra operands, results before sources.
Status atomic(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const MemoryMode mode = unpack_mode(i.aux);
  const Op op = static_cast<Op>(i.first_target & 0xff);
  const PtxType type = static_cast<PtxType>(i.first_target >> 8 & 0xff);
  const bool has_result = i.first_target >> 16 & 1;
  const uint32_t bytes = type_bytes(type);
  Lookup found;
  resolve(w, mask, mode.space, addresses, bytes * mode.vector, Access::kReadWrite, mode.scope, mode.order, found);
  const Ref* extra = w.launch->program->refs.data() + i.extra;
  uint64_t& effects = w.cluster->effects;
  for (uint32_t k = 0; k < mode.vector; ++k) {
    const Ref source = mode.vector == 1 ? i.a : extra[(has_result ? mode.vector : 0) + k];
    const Ref result = mode.vector == 1 ? i.d : has_result ? extra[k] : kNoRef;
    alignas(64) uint64_t old[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      uint64_t value = bytes == 8 ? in<uint64_t>(w, source)[l] : in<uint32_t>(w, source)[l];
      uint64_t compare = 0;
      if (op == Op::kCas) {
        compare = value;
        value = bytes == 8 ? in<uint64_t>(w, i.c)[l] : in<uint32_t>(w, i.c)[l];
      }
      uint8_t* cell = found.data[l] + k * bytes;
      old[l] = bytes == 8   ? update<uint64_t>(cell, op, type, value, compare, effects)
               : bytes == 4 ? update<uint32_t>(cell, op, type, value, compare, effects)
                            : update<uint16_t>(cell, op, type, value, compare, effects);
    }
    if (result == kNoRef) continue;
    if (bytes == 8) {
      store_lanes(at<uint64_t>(w, result), old, mask);
    } else {
      alignas(64) uint32_t narrow[kLanes];
      for (int l = 0; l < kLanes; ++l) narrow[l] = static_cast<uint32_t>(old[l]);
      store_lanes(at<uint32_t>(w, result), narrow, mask);
    }
  }
  return has_result && mode.space != Space::kShared ? Status::kYield : Status::kNext;
}

constexpr std::pair<std::string_view, Op> kOps[] = {
    {"add", Op::kAdd}, {"min", Op::kMin}, {"max", Op::kMax}, {"and", Op::kAnd},   {"or", Op::kOr},
    {"xor", Op::kXor}, {"inc", Op::kInc}, {"dec", Op::kDec}, {"exch", Op::kExch}, {"cas", Op::kCas},
};

}  // namespace

bool decode_atomic(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const bool is_red = p.parts[0] == "red";
  if ((p.parts[0] != "atom" && !is_red) || p.has("async")) return false;
  const PtxType type = parse_type(p.parts.back());
  MemoryMode mode = decode_mode(d);
  if (mode.scope == Scope::kWeak) mode.scope = Scope::kGpu;
  mode.vector = p.has("v2") ? 2 : p.has("v4") ? 4 : p.has("v8") ? 8 : 1;
  Inst in;
  in.run = atomic;
  bool known = false;
  for (const auto& [name, op] : kOps) {
    if (!p.has(name)) continue;
    in.first_target = static_cast<uint32_t>(op);
    known = true;
  }
  const uint32_t bytes = type_bytes(type);
  if (!known || (bytes != 2 && bytes != 4 && bytes != 8)) d.unsupported("operation or type");
  in.first_target |= static_cast<uint32_t>(type) << 8 | (is_red ? 0u : 1u << 16);
  const size_t first = is_red ? 0 : 1;
  const Decoder::Address address = d.address(d.operand(first));
  in.b = address.base;
  in.imm = address.offset;
  mode.wide = address.wide;
  in.aux = pack_mode(mode);
  const PtxOperand& value = d.operand(first + 1);
  if (mode.vector > 1) {
    if (value.kind != PtxOperand::kVector || value.items.size() != mode.vector) d.unsupported("vector form");
    std::vector<Ref> refs;
    if (!is_red) {
      for (const PtxOperand& item : d.operand(0).items) refs.push_back(d.destination(item, type));
    }
    for (const PtxOperand& item : value.items) refs.push_back(d.source(item, type));
    for (const Ref ref : refs) d.add_extra(in, ref);
  } else {
    in.a = d.source(value, type);
    if (static_cast<Op>(in.first_target & 0xff) == Op::kCas) in.c = d.source(first + 2, type);
    if (!is_red) in.d = d.destination(0, type);
  }
  d.sink();
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
