// cp.async of sm_80: copies of 4, 8 or 16 bytes per lane into shared memory.
#include "memory_operand.h"

namespace flash_ext::emulator {

namespace {

// b, imm: destination; a: global source; c: source bytes or kNoRef; first_target: bytes | flags << 8;
// num_targets: offset of the source address.
enum Flags : uint32_t { kIgnore = 1 };

Status copy(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t to[kLanes], from[kLanes];
  lane_addresses(w, i, to);
  const uint32_t bytes = i.first_target & 0xff;
  const bool ignores = i.first_target >> 8 & kIgnore;
  const uint64_t* base = in<uint64_t>(w, i.a);
  CpAsync op;
  op.pc = w.pc;
  op.mask = mask;
  op.bytes = bytes;
  Mask reading = 0;
  const Mask ignored = ignores ? read_predicate(w, i.c) : 0;
  for (int l = 0; l < kLanes; ++l) {
    from[l] = base[l] + static_cast<int32_t>(i.num_targets);
    uint32_t size = bytes;
    if (ignores)
      size = ignored >> l & 1 ? 0 : bytes;
    else if (i.c != kNoRef)
      size = in<uint32_t>(w, i.c)[l];
    if ((mask >> l & 1) && size > bytes) {
      fault(w, 1u << l, "out-of-bounds",
            "source size " + std::to_string(size) + " of a copy of " + std::to_string(bytes), from[l]);
    }
    op.source_bytes[l] = size;
    op.group[l] = w.cp_async_group[l];
    reading |= Mask((mask >> l & 1) && size) << l;
  }
  // The checks of cp.async are made by their own hook: only bounds and alignment here.
  ClusterChecks* const checks = w.checks;
  w.checks = nullptr;
  Lookup target, source;
  resolve(w, mask, Space::kShared, to, bytes, Access::kWrite, Scope::kWeak, Order::kRelaxed, target);
  for (Mask rest = reading; rest;) {
    const uint32_t size = op.source_bytes[first_lane(rest)];
    Mask group = 0;
    for (int l = 0; l < kLanes; ++l) group |= Mask((rest >> l & 1) && op.source_bytes[l] == size) << l;
    rest &= ~group;
    // A partial source need not be aligned to the copy's size as a power of two of its own.
    for (int l = 0; l < kLanes; ++l) {
      if (!(group >> l & 1)) continue;
      if (from[l] % bytes)
        fault(w, 1u << l, "misaligned", "source of a cp.async of " + std::to_string(bytes) + " bytes", from[l]);
      if (size != bytes) check_global(w, 1u << l, from[l], size, false);
    }
    if (size == bytes)
      resolve(w, group, Space::kGlobal, from, bytes, Access::kRead, Scope::kWeak, Order::kRelaxed, source);
  }
  w.checks = checks;
  if (checks) {
    uint32_t offsets[kLanes];
    for (int l = 0; l < kLanes; ++l) offsets[l] = static_cast<uint32_t>(to[l]);
    for (Mask rest = mask; rest;) {
      const uint32_t size = op.source_bytes[first_lane(rest)];
      Mask group = 0;
      for (int l = 0; l < kLanes; ++l) group |= Mask((rest >> l & 1) && op.source_bytes[l] == size) << l;
      rest &= ~group;
      checks->cp_async(w.where(group), offsets, bytes, from, size);
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    op.to[l] = target.data[l];
    op.from[l] = reinterpret_cast<const uint8_t*>(from[l]);
  }
  issue_cp_async(w, op);
  return Status::kNext;
}

Status commit(Warp& w, const Inst&, Mask mask) {
  for (int l = 0; l < kLanes; ++l) w.cp_async_group[l] += mask >> l & 1;
  if (w.checks) w.checks->cp_async_commit(w.where(mask));
  return Status::kNext;
}

// aux: wait for all, committed or not.
Status wait_group(Warp& w, const Inst& i, Mask mask) {
  run_cp_async(w, mask, static_cast<uint32_t>(i.imm), i.aux);
  if (w.checks) {
    if (i.aux)
      w.checks->cp_async_wait_all(w.where(mask));
    else
      w.checks->cp_async_wait(w.where(mask), static_cast<uint32_t>(i.imm));
  }
  return Status::kNext;
}

Status arrive_on_barrier(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  CpAsyncArrive arrival;
  arrival.pc = w.pc;
  arrival.mask = mask;
  arrival.noinc = i.first_target;
  for (int l = 0; l < kLanes; ++l) {
    arrival.address[l] = static_cast<uint32_t>(addresses[l]) & kSharedOffsetMask;
    if (!(mask >> l & 1)) continue;
    check_shared(w, 1u << l, *w.cta, arrival.address[l], 8);
    Mbarrier& b = need_mbarrier(w, 1u << l, *w.cta, arrival.address[l]);
    // Without noinc the pending count rises now and falls when the copies are done.
    if (!arrival.noinc) ++b.pending;
  }
  issue_cp_async_arrive(w, arrival);
  return Status::kNext;
}

}  // namespace

bool decode_async(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  if (p.parts[0] != "cp" || !p.has("async") || p.has("bulk") || p.parts[1] != "async") return false;
  Inst in;
  MemoryMode mode;
  if (p.has("commit_group")) {
    in.run = commit;
  } else if (p.has("wait_group") || p.has("wait_all")) {
    in.run = wait_group;
    in.aux = p.has("wait_all");
    if (!in.aux) in.imm = d.integer(d.operand(0));
  } else if (p.has("mbarrier")) {
    in.run = arrive_on_barrier;
    in.first_target = p.has("noinc");
    const Decoder::Address address = d.address(d.operand(0));
    in.b = address.base;
    in.imm = address.offset;
    mode.wide = address.wide;
    in.aux = pack_mode(mode);
  } else {
    in.run = copy;
    const Decoder::Address to = d.address(d.operand(0)), from = d.address(d.operand(1));
    if (!from.wide) d.unsupported("32-bit global address");
    in.b = to.base;
    in.imm = to.offset;
    mode.wide = to.wide;
    in.aux = pack_mode(mode);
    in.a = from.base;
    in.num_targets = static_cast<uint32_t>(static_cast<int32_t>(from.offset));
    const int64_t bytes = d.integer(d.operand(2));
    if (bytes != 4 && bytes != 8 && bytes != 16) d.unsupported("size");
    in.first_target = static_cast<uint32_t>(bytes);
    const size_t more = d.operand_count() - (p.has("L2::cache_hint") ? 1 : 0);
    if (more > 3) {
      const PtxOperand& size = d.operand(3);
      if (size.kind == PtxOperand::kRegister && d.register_type(size) == PtxType::kPred) {
        in.c = d.predicate(size);
        in.first_target |= kIgnore << 8;
      } else {
        in.c = d.source(size, PtxType::kU32);
      }
    }
    d.sink();
  }
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
