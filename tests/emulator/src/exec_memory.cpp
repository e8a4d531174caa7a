// ld, st, ldu, prefetch and their like.
#include <cstring>

#include "lanes.h"
#include "memory_operand.h"

namespace flash_ext::emulator {

namespace {

// T: what lies in memory; S: lanes of the register, into which T is extended.
template <class T, class S>
Status load(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const MemoryMode mode = unpack_mode(i.aux);
  Lookup found;
  resolve(w, mask, mode.space, addresses, sizeof(T) * mode.vector, Access::kRead, mode.scope, mode.order, found);
  for (uint32_t k = 0; k < mode.vector; ++k) {
    alignas(64) S value[kLanes];
    if (mask == kFullMask) {
      for (int l = 0; l < kLanes; ++l) {
        T element;
        std::memcpy(&element, found.data[l] + k * sizeof(T), sizeof(T));
        value[l] = static_cast<S>(element);
      }
    } else {
      for (int l = 0; l < kLanes; ++l) {
        T element = 0;
        if (mask >> l & 1) std::memcpy(&element, found.data[l] + k * sizeof(T), sizeof(T));
        value[l] = static_cast<S>(element);
      }
    }
    store_lanes(at<S>(w, mode.vector == 1 ? i.d : w.launch->program->refs[i.extra + k]), value, mask);
  }
  return mode.scope == Scope::kWeak || mode.scope == Scope::kCta ? Status::kNext : Status::kYield;
}

template <class T, class S>
Status store(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const MemoryMode mode = unpack_mode(i.aux);
  Lookup found;
  resolve(w, mask, mode.space, addresses, sizeof(T) * mode.vector, Access::kWrite, mode.scope, mode.order, found);
  for (uint32_t k = 0; k < mode.vector; ++k) {
    const S* value = in<S>(w, mode.vector == 1 ? i.a : w.launch->program->refs[i.extra + k]);
    for (int l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      const T element = static_cast<T>(value[l]);
      std::memcpy(found.data[l] + k * sizeof(T), &element, sizeof(T));
    }
  }
  ++w.cluster->effects;
  return Status::kNext;
}

// A kernel parameter at a fixed offset: the same for all lanes.
template <class T, class S>
Status load_parameter(Warp& w, const Inst& i, Mask mask) {
  const uint32_t vector = unpack_mode(i.aux).vector;
  for (uint32_t k = 0; k < vector; ++k) {
    T element;
    std::memcpy(&element, w.launch->params + i.imm + k * sizeof(T), sizeof(T));
    alignas(64) S value[kLanes];
    for (S& v : value) v = static_cast<S>(element);
    store_lanes(at<S>(w, vector == 1 ? i.d : w.launch->program->refs[i.extra + k]), value, mask);
  }
  return Status::kNext;
}

Status prefetch(Warp&, const Inst&, Mask) { return Status::kNext; }

enum class Kind { kLoad, kStore, kParameter };
template <class T, class S>
Handler pick(Kind kind) {
  return kind == Kind::kLoad ? load<T, S> : kind == Kind::kStore ? store<T, S> : load_parameter<T, S>;
}
template <class S>
Handler pick(Kind kind, PtxType type) {
  switch (type) {
    case PtxType::kB8:
    case PtxType::kU8:
      return pick<uint8_t, S>(kind);
    case PtxType::kS8:
      return pick<int8_t, S>(kind);
    case PtxType::kB16:
    case PtxType::kU16:
    case PtxType::kF16:
    case PtxType::kBF16:
      return pick<uint16_t, S>(kind);
    case PtxType::kS16:
      return pick<int16_t, S>(kind);
    case PtxType::kB32:
    case PtxType::kU32:
    case PtxType::kF32:
      return pick<uint32_t, S>(kind);
    case PtxType::kS32:
      return sizeof(S) == 8 ? pick<int32_t, S>(kind) : pick<uint32_t, S>(kind);
    case PtxType::kB64:
    case PtxType::kU64:
    case PtxType::kS64:
    case PtxType::kF64:
      return sizeof(S) == 8 ? pick<uint64_t, uint64_t>(kind) : nullptr;
    default:
      return nullptr;
  }
}

void decode_access(Decoder& d, bool is_load) {
  const PtxInstruction& p = d.ptx();
  const PtxType type = parse_type(p.parts.back());
  MemoryMode mode = decode_mode(d);
  const PtxOperand& where = d.operand(is_load ? 1 : 0);
  const PtxOperand& what = d.operand(is_load ? 0 : 1);
  mode.vector = p.has("v2") ? 2 : p.has("v4") ? 4 : p.has("v8") ? 8 : 1;
  const bool listed = what.kind == PtxOperand::kVector;
  if (listed != (mode.vector > 1) || (listed && what.items.size() != mode.vector)) d.unsupported("vector form");
  if (type_bytes(type) * mode.vector > 32) d.unsupported("width");

  Inst in;
  Kind kind = is_load ? Kind::kLoad : Kind::kStore;
  uint64_t offset = 0;
  if (where.kind != PtxOperand::kAddress) d.unsupported("an address is expected");
  const bool parameter = mode.space == Space::kParam && where.items[0].kind == PtxOperand::kSymbol;
  if (parameter) {
    if (const PtxVariable* variable = d.find_parameter(where.items[0].name, &offset)) {
      if (!is_load) d.unsupported("store to a parameter");
      const int64_t end = where.value + type_bytes(type) * mode.vector;
      if (where.value < 0 || end > static_cast<int64_t>(variable->bytes)) d.unsupported("offset beyond the parameter");
      kind = Kind::kParameter;
      in.imm = static_cast<int64_t>(offset) + where.value;
    } else {
      mode.space = Space::kCallParam;
      in.b = d.constant64(d.call_parameter(where.items[0].name));
      in.imm = where.value;
      mode.wide = true;
    }
  } else {
    const Decoder::Address address = d.address(where);
    in.b = address.base;
    in.imm = address.offset;
    mode.wide = address.wide;
  }

  // Registers may be wider than the type in memory.
  bool wide = type_bytes(type) == 8;
  for (size_t k = 0; k < mode.vector; ++k) {
    const PtxOperand& item = listed ? what.items[k] : what;
    wide |= d.is_wide(item);
  }
  const PtxType register_type = wide ? PtxType::kB64 : PtxType::kB32;
  std::vector<Ref> refs;
  for (size_t k = 0; k < mode.vector; ++k) {
    const PtxOperand& item = listed ? what.items[k] : what;
    if (is_load) {
      refs.push_back(d.destination(item, register_type));
    } else {
      const bool constant = item.kind == PtxOperand::kInteger || item.kind == PtxOperand::kFloat;
      refs.push_back(d.source(item, constant ? type : register_type));
    }
  }
  if (!is_load) d.sink();
  if (mode.vector == 1) {
    (is_load ? in.d : in.a) = refs[0];
  } else {
    for (const Ref ref : refs) d.add_extra(in, ref);
  }
  in.run = wide ? pick<uint64_t>(kind, type) : pick<uint32_t>(kind, type);
  if (!in.run) d.unsupported("type");
  in.aux = pack_mode(mode);
  d.emit(in);
}

}  // namespace

MemoryMode decode_mode(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  MemoryMode mode;
  for (const std::string_view part : p.parts) {
    if (part == "global")
      mode.space = Space::kGlobal;
    else if (part == "shared" || part == "shared::cta" || part == "shared::cluster")
      mode.space = Space::kShared;
    else if (part == "local")
      mode.space = Space::kLocal;
    else if (part == "param" || part == "param::entry" || part == "param::func")
      mode.space = Space::kParam;
    else if (part == "const")
      mode.space = Space::kConst;
    else if (part == "cta")
      mode.scope = Scope::kCta;
    else if (part == "cluster")
      mode.scope = Scope::kCluster;
    else if (part == "gpu" || part == "sys")
      mode.scope = Scope::kGpu;
    else if (part == "volatile" || part == "mmio")
      mode.scope = Scope::kGpu;
    else if (part == "acquire")
      mode.order = Order::kAcquire;
    else if (part == "release")
      mode.order = Order::kRelease;
    else if (part == "acq_rel")
      mode.order = Order::kAcqRel;
  }
  return mode;
}

bool decode_memory(Decoder& d) {
  const std::string_view op = d.ptx().parts[0];
  if (op == "ld" || op == "ldu") {
    decode_access(d, true);
  } else if (op == "st") {
    if (d.ptx().has("async") || d.ptx().has("bulk")) return false;
    decode_access(d, false);
  } else if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard") {
    if (op == "discard") d.unsupported();
    Inst in;
    in.run = prefetch;
    d.emit(in);
  } else if (op == "createpolicy") {
    // Cache policies are accepted and mean nothing here.
    Inst in;
    in.run = zero_u64;
    in.d = d.destination(0, PtxType::kB64);
    d.emit(in);
  } else {
    return false;
  }
  return true;
}

Status zero_u64(Warp& w, const Inst& i, Mask mask) {
  alignas(64) static constexpr uint64_t kZeros[kLanes] = {};
  store_lanes(at<uint64_t>(w, i.d), kZeros, mask);
  return Status::kNext;
}

}  // namespace flash_ext::emulator
