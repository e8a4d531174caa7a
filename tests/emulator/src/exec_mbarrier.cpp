// mbarriers, and the addresses of other CTAs of the cluster.
#include <cstdio>

#include "memory_operand.h"

namespace flash_ext::emulator {

namespace {

constexpr int64_t kMaxTx = (1 << 20) - 1;
constexpr uint32_t kMaxCount = (1 << 20) - 1;
// test_wait that fails so often in a row counts as waiting, so that a spinning warp cannot hide a
// deadlock; try_wait waits at once.
constexpr uint32_t kPatience = 3;

// What arrive returns: the phase before it, and how many arrivals that still expected.
constexpr uint32_t kCountBits = 20;
uint64_t make_token(const Mbarrier& b) { return b.phase << kCountBits | static_cast<uint64_t>(b.pending); }

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string describe(const Mbarrier& b) {
  return "current phase parity " + std::to_string(b.phase & 1) + " (phase " + std::to_string(b.phase) + "), " +
         std::to_string(b.pending) + " of " + std::to_string(b.count) + " arrivals pending, tx-count " +
         std::to_string(b.tx);
}

struct Place {
  Cta* cta;
  uint32_t offset;
};

// A generic, shared::cta or shared::cluster address of one lane.
Place place(Warp& w, int lane, uint64_t address) {
  const Mask bit = 1u << lane;
  if (address >> 32) {
    if ((address & kWindowMask) != kSharedWindow)
      fault(w, bit, "mbarrier", "address " + hex(address) + " is not in shared memory", address);
    address &= ~kWindowMask;
  }
  Cta& cta = cluster_cta(w, bit, static_cast<uint32_t>(address));
  const uint32_t offset = static_cast<uint32_t>(address) & kSharedOffsetMask;
  if (offset % 8) fault(w, bit, "misaligned", "mbarrier at shared address " + hex(offset), offset);
  check_shared(w, bit, cta, offset, 8);
  return {&cta, offset};
}

bool settle(Mbarrier& b) {
  if (b.pending != 0 || b.tx != 0) return false;
  ++b.phase;
  b.pending = b.count;
  return true;
}

void add_tx(const LaunchContext& launch, uint32_t pc, const Cta* cta, uint32_t warp, Mask lanes, Mbarrier& b,
            int64_t bytes) {
  b.tx += bytes;
  if (b.tx > kMaxTx || b.tx < -kMaxTx) {
    fault_at(launch, pc, cta, warp, lanes, "mbarrier",
             "tx-count " + std::to_string(b.tx) + " of the mbarrier at shared " + hex(b.address) + " is out of range",
             b.address);
  }
}

bool somebody_waits(const Cta& cta, uint32_t offset) {
  for (const auto& other : cta.cluster->ctas) {
    for (const Warp& w : other->warps) {
      for (const Path& path : w.paths) {
        if (path.wait.kind == Wait::kMbarrier && path.wait.id == offset && path.wait.rank == cta.rank) return true;
      }
    }
  }
  return false;
}

// b, imm: the address. a: count, bytes, parity or token.
Status init(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const Place p = place(w, l, addresses[l]);
    const uint32_t count = in<uint32_t>(w, i.a)[l];
    if (count == 0 || count > kMaxCount) fault(w, 1u << l, "mbarrier", "count " + std::to_string(count), p.offset);
    if (somebody_waits(*p.cta, p.offset)) {
      fault(w, 1u << l, "mbarrier", "initialised while a warp waits on it: shared " + hex(p.offset), p.offset);
    }
    uint16_t& index = p.cta->mbarrier_index[p.offset / 8];
    if (!index) {
      p.cta->mbarriers.emplace_back();
      index = static_cast<uint16_t>(p.cta->mbarriers.size());
    }
    Mbarrier& b = p.cta->mbarriers[index - 1];
    b = {};
    b.valid = true;
    b.address = p.offset;
    b.count = count;
    b.pending = count;
    if (w.checks) w.checks->mbarrier_init(w.where(1u << l), p.cta->rank, p.offset, count);
  }
  return Status::kNext;
}
Status inval(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const Place p = place(w, l, addresses[l]);
    Mbarrier& b = need_mbarrier(w, 1u << l, *p.cta, p.offset);
    if (somebody_waits(*p.cta, p.offset)) {
      fault(w, 1u << l, "mbarrier", "invalidated while a warp waits on it: shared " + hex(p.offset), p.offset);
    }
    b.valid = false;
    if (w.checks) w.checks->mbarrier_inval(w.where(1u << l), p.cta->rank, p.offset);
  }
  return Status::kNext;
}

// arrive in its forms; aux bits above the mode. c: expected bytes of arrive.expect_tx.
enum ArriveFlags : uint32_t { kRelease = 1, kDrop = 2, kNoComplete = 4, kExpect = 8 };
Status arrive_lanes(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const uint32_t flags = i.first_target;
  alignas(64) uint64_t tokens[kLanes] = {};
  for (Mask rest = mask; rest;) {
    // Lanes with one barrier in common count as one event for the checks.
    const int leader = first_lane(rest);
    const Place p = place(w, leader, addresses[leader]);
    Mbarrier& b = need_mbarrier(w, 1u << leader, *p.cta, p.offset);
    uint32_t count = 0, expected = 0;
    bool completes = false;
    Mask group = 0;
    for (int l = leader; l < kLanes; ++l) {
      if (!(rest >> l & 1) || addresses[l] != addresses[leader]) continue;
      group |= 1u << l;
      tokens[l] = make_token(b);
      const uint32_t n = i.a == kNoRef ? 1 : in<uint32_t>(w, i.a)[l];
      if (flags & kExpect) {
        const uint32_t bytes = in<uint32_t>(w, i.c)[l];
        expected += bytes;
        add_tx(*w.launch, w.pc, w.cta, w.index, 1u << l, b, bytes);
      }
      count += n;
      if (flags & kDrop) {
        if (b.count < n) fault(w, 1u << l, "mbarrier", "arrive_drop below zero: " + describe(b), p.offset);
        b.count -= n;
      }
      completes |= arrive(w, 1u << l, b, n);
      if (completes && (flags & kNoComplete))
        fault(w, 1u << l, "mbarrier", "arrive.noComplete completes the phase", p.offset);
    }
    rest &= ~group;
    if (w.checks) {
      w.checks->mbarrier_arrive(w.where(group), p.cta->rank, p.offset, count, expected, flags & kRelease, completes);
    }
  }
  if (i.d != kNoRef) store_lanes(at<uint64_t>(w, i.d), tokens, mask);
  return Status::kNext;
}

// expect_tx and complete_tx (aux above the mode: 1 for complete).
Status transaction(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const Place p = place(w, l, addresses[l]);
    Mbarrier& b = need_mbarrier(w, 1u << l, *p.cta, p.offset);
    const uint32_t bytes = in<uint32_t>(w, i.a)[l];
    const bool complete = i.first_target != 0;
    add_tx(*w.launch, w.pc, w.cta, w.index, 1u << l, b, complete ? -static_cast<int64_t>(bytes) : bytes);
    const bool ended = complete && settle(b);
    if (!w.checks) continue;
    if (complete)
      w.checks->mbarrier_complete_tx(p.cta->rank, p.offset, bytes, ended);
    else
      w.checks->mbarrier_expect_tx(w.where(1u << l), p.cta->rank, p.offset, bytes, ended);
  }
  return Status::kNext;
}

enum WaitFlags : uint32_t { kParity = 1, kTry = 2, kAcquire = 4 };
Status wait(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const uint32_t flags = i.first_target;
  Mask ready = 0;
  Place first{};
  const Mbarrier* waited = nullptr;
  uint32_t parity = 0;
  uint64_t last_address = 0;
  Mbarrier* b = nullptr;
  Place p{};
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (!b || addresses[l] != last_address) {
      p = place(w, l, addresses[l]);
      b = &need_mbarrier(w, 1u << l, *p.cta, p.offset);
      last_address = addresses[l];
    }
    const uint64_t phase = flags & kParity ? in<uint32_t>(w, i.a)[l] & 1 : in<uint64_t>(w, i.a)[l] >> kCountBits;
    const bool done = flags & kParity ? (b->phase & 1) != phase : b->phase != phase;
    ready |= Mask(done) << l;
    if (!done && !waited) {
      waited = b;
      first = p;
      parity = static_cast<uint32_t>(phase & 1);
    }
  }
  Wait& state = w.path->wait;
  if (!waited) {
    state = {};
    if (w.checks) {
      // Once per barrier; lanes that wait on several are rare.
      Mask rest = mask;
      while (rest) {
        const int leader = first_lane(rest);
        const Place at_place = place(w, leader, addresses[leader]);
        Mask group = 0;
        for (int l = leader; l < kLanes; ++l) group |= Mask((rest >> l & 1) && addresses[l] == addresses[leader]) << l;
        rest &= ~group;
        w.checks->mbarrier_wait(w.where(group), at_place.cta->rank, at_place.offset, true, flags & kAcquire);
      }
    }
    write_predicate(w, i.d, mask, kFullMask);
    return Status::kNext;
  }
  const bool same = state.id == first.offset && state.rank == first.cta->rank && state.parity == parity;
  if (!same) {
    state = {};
    state.id = first.offset;
    state.rank = first.cta->rank;
    state.parity = parity;
    state.generation = waited->phase;
  }
  if (w.checks && state.kind == Wait::kMbarrier && waited->phase >= state.generation + 2) {
    fault(w, mask, "mbarrier",
          "two phases passed while the warp waited for one: mbarrier at shared " + hex(first.offset) + ": " +
              describe(*waited),
          first.offset);
  }
  bool give_up = state.forced_timeout;
  if (!(flags & kTry)) {
    give_up |= state.tries < kPatience;
  } else if (w.launch->hostile() && state.tries < kPatience) {
    give_up |= w.cluster->random() % 8 == 0;
  }
  if (!give_up) {
    state.kind = Wait::kMbarrier;
    return Status::kBlocked;
  }
  state.kind = Wait::kNone;
  state.forced_timeout = false;
  ++state.tries;
  if (w.checks) w.checks->mbarrier_wait(w.where(mask), first.cta->rank, first.offset, false, flags & kAcquire);
  write_predicate(w, i.d, mask, ready);
  return Status::kYield;
}

Status pending_count(Warp& w, const Inst& i, Mask mask) {
  const uint64_t* token = in<uint64_t>(w, i.a);
  alignas(64) uint32_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = static_cast<uint32_t>(token[l] & kMaxCount);
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

// mapa and getctarank: aux bit 0: 64-bit generic addresses.
Status mapa(Warp& w, const Inst& i, Mask mask) {
  const bool wide = i.aux & 1;
  alignas(64) uint64_t result[kLanes];
  alignas(64) uint32_t narrow[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const uint64_t address = wide ? in<uint64_t>(w, i.a)[l] : in<uint32_t>(w, i.a)[l];
    const uint32_t rank = in<uint32_t>(w, i.b)[l];
    if (rank >= w.launch->cluster_size)
      fault(w, 1u << l, "out-of-bounds",
            "mapa to CTA rank " + std::to_string(rank) + " of " + std::to_string(w.launch->cluster_size), address);
    if (wide && i.aux & 2 && (address & kWindowMask) != kSharedWindow)
      fault(w, 1u << l, "out-of-bounds", "mapa of " + hex(address) + ", which is not in shared memory", address);
    const uint64_t window = address & ~uint64_t(0xffffffff);
    result[l] = window | (address & kSharedOffsetMask) | uint64_t(rank + 1) << kRankShift;
    narrow[l] = static_cast<uint32_t>(result[l]);
  }
  if (wide)
    store_lanes(at<uint64_t>(w, i.d), result, mask);
  else
    store_lanes(at<uint32_t>(w, i.d), narrow, mask);
  return Status::kNext;
}
Status ctarank(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint32_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t address = i.aux & 1 ? in<uint64_t>(w, i.a)[l] : in<uint32_t>(w, i.a)[l];
    const uint32_t high = static_cast<uint32_t>(address) >> kRankShift;
    result[l] = high ? high - 1 : w.cta->rank;
  }
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

void set_address(Decoder& d, Inst& in, const PtxOperand& operand) {
  MemoryMode mode;
  const Decoder::Address address = d.address(operand);
  in.b = address.base;
  in.imm = address.offset;
  mode.wide = address.wide;
  in.aux = pack_mode(mode);
}

void decode_arrive(Decoder& d, bool drop) {
  const PtxInstruction& p = d.ptx();
  // The token may be missing when the barrier is in another CTA.
  const size_t first = d.operand(0).kind == PtxOperand::kAddress ? 0 : 1;
  Inst in;
  in.run = arrive_lanes;
  in.first_target = (p.has("relaxed") ? 0u : kRelease) | (drop ? kDrop : 0u) |
                    (p.has("noComplete") ? kNoComplete : 0u) | (p.has("expect_tx") ? kExpect : 0u);
  set_address(d, in, d.operand(first));
  if (d.operand_count() > first + 1) {
    const Ref value = d.source(first + 1, PtxType::kU32);
    (p.has("expect_tx") ? in.c : in.a) = value;
  }
  if (first == 1 && d.operand(0).kind != PtxOperand::kSink) in.d = d.destination(0, PtxType::kB64);
  d.sink();
  d.emit(in);
}

}  // namespace

Mbarrier* find_mbarrier(Cta& cta, uint32_t offset) {
  const uint16_t index = cta.mbarrier_index[offset / 8];
  return index && cta.mbarriers[index - 1].valid ? &cta.mbarriers[index - 1] : nullptr;
}

Mbarrier& need_mbarrier(Warp& w, Mask lanes, Cta& cta, uint32_t offset) {
  Mbarrier* b = find_mbarrier(cta, offset);
  if (!b) {
    fault(w, lanes, "mbarrier",
          "no mbarrier has been initialised at shared " + hex(offset) + " of CTA rank " + std::to_string(cta.rank),
          offset);
  }
  return *b;
}

bool arrive(Warp& w, Mask lane, Mbarrier& b, uint32_t count) {
  if (count == 0 || b.pending < static_cast<int64_t>(count)) {
    fault(w, lane, "mbarrier",
          std::to_string(count) + " arrivals on the mbarrier at shared " + hex(b.address) + ": " + describe(b),
          b.address);
  }
  b.pending -= count;
  ++w.cluster->effects;
  return settle(b);
}

void complete_tx(Cta& issuer, uint32_t warp, uint32_t pc, Cta& cta, uint32_t offset, uint32_t bytes) {
  const LaunchContext& launch = *cta.launch;
  Mbarrier* b = find_mbarrier(cta, offset);
  if (!b) {
    fault_at(launch, pc, &issuer, warp, 0, "mbarrier",
             "the copy completes on shared " + hex(offset) + ", where there is no mbarrier any more", offset);
  }
  add_tx(launch, pc, &issuer, warp, 0, *b, -static_cast<int64_t>(bytes));
  const bool ended = settle(*b);
  ++cta.cluster->effects;
  if (cta.cluster->checks) cta.cluster->checks->mbarrier_complete_tx(cta.rank, offset, bytes, ended);
}

std::string describe_wait(const Warp& w, const Path& path) {
  const PtxInstruction& in = w.launch->program->source(w.launch->program->code[path.pc]);
  char head[160];
  std::snprintf(head, sizeof(head), "CTA (%u,%u,%u) warp %u lanes 0x%08x, PTX line %u: ", w.cta->index.x,
                w.cta->index.y, w.cta->index.z, w.index, path.mask, in.line);
  std::string text = head;
  const Wait& wait = path.wait;
  switch (wait.kind) {
    case Wait::kBarrier: {
      const NamedBarrier& b = w.cta->barriers[wait.id];
      text += "named barrier " + std::to_string(wait.id) + ": " + std::to_string(b.arrived) +
              " threads arrived (warp mask " + hex(b.arrived_warps) + "), " +
              std::to_string(b.whole_cta ? 32 * w.cta->warps_left : b.expected) + " expected";
      break;
    }
    case Wait::kMbarrier: {
      Mbarrier* b = find_mbarrier(*w.cluster->ctas[wait.rank], wait.id);
      text += "mbarrier wait, parity " + std::to_string(wait.parity) + ": mbarrier at shared " + hex(wait.id) +
              " of rank " + std::to_string(wait.rank) + ": " + (b ? describe(*b) : "invalidated");
      break;
    }
    case Wait::kCluster:
      text += "barrier.cluster: " + std::to_string(w.cluster->cluster_arrived) + " warps arrived";
      break;
    case Wait::kGather:
      text += "waits for the other lanes of the warp";
      break;
    case Wait::kWgmma:
      text += "wgmma group: another warp of the warpgroup has not issued it";
      break;
    case Wait::kBulk:
      text += "bulk copies";
      break;
    case Wait::kRegisters:
      text += "setmaxnreg.inc to " + std::to_string(wait.id) + ": not enough registers released";
      break;
    case Wait::kNone:
      text += "runs";
      break;
  }
  return text + " (" + std::string(in.opcode) + ")";
}

bool decode_mbarrier(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  Inst in;
  if (op == "mapa" || op == "getctarank") {
    const bool wide = p.parts.back() == "u64";
    const bool rank = op == "getctarank";
    const bool shared = p.has("shared::cluster");
    const bool address_wide = rank ? d.is_wide(d.operand(1)) : wide;
    in.run = rank ? ctarank : mapa;
    in.aux = (address_wide ? 1 : 0) | (shared ? 0 : 2);
    in.a = d.source(1, address_wide ? PtxType::kU64 : PtxType::kU32);
    if (!rank) in.b = d.source(2, PtxType::kU32);
    in.d = d.destination(0, rank || !wide ? PtxType::kU32 : PtxType::kU64);
    d.emit(in);
    return true;
  }
  if (op != "mbarrier" || p.parts.size() < 2) return false;
  const std::string_view what = p.parts[1];
  if (what == "init") {
    in.run = init;
    set_address(d, in, d.operand(0));
    in.a = d.source(1, PtxType::kU32);
  } else if (what == "inval") {
    in.run = inval;
    set_address(d, in, d.operand(0));
  } else if (what == "arrive" || what == "arrive_drop") {
    decode_arrive(d, what == "arrive_drop");
    return true;
  } else if (what == "expect_tx" || what == "complete_tx") {
    in.run = transaction;
    in.first_target = what == "complete_tx";
    set_address(d, in, d.operand(0));
    in.a = d.source(1, PtxType::kU32);
  } else if (what == "test_wait" || what == "try_wait") {
    in.run = wait;
    in.first_target =
        (p.has("parity") ? kParity : 0u) | (what == "try_wait" ? kTry : 0u) | (p.has("relaxed") ? 0u : kAcquire);
    set_address(d, in, d.operand(1));
    in.a = d.source(2, p.has("parity") ? PtxType::kU32 : PtxType::kB64);
    in.d = d.predicate_destination(d.operand(0));
  } else if (what == "pending_count") {
    in.run = pending_count;
    in.a = d.source(1, PtxType::kB64);
    in.d = d.destination(0, PtxType::kU32);
    d.emit(in);
    return true;
  } else {
    return false;
  }
  d.sink();
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
