// Barriers of CTAs and clusters, fences, the register pool, and what happens when a warp exits.
#include <algorithm>

#include "memory_operand.h"

namespace flash_ext::emulator {

namespace {

enum BarrierKind : uint32_t { kSync, kArrive, kRedAnd, kRedOr, kRedPopc };

// All threads have come: the waiting ones go on.
void complete_barrier(Cta& cta, uint32_t id) {
  NamedBarrier& b = cta.barriers[id];
  if (cta.cluster->checks) cta.cluster->checks->barrier_complete(cta.rank, id, static_cast<uint32_t>(b.waiting_warps));
  b.result_and = b.reduce_and;
  b.result_or = b.reduce_or;
  b.result_count = b.reduce_count;
  b.reduce_and = 1;
  b.reduce_or = b.reduce_count = 0;
  b.expected = b.arrived = 0;
  b.arrived_warps = b.waiting_warps = 0;
  ++b.generation;
  ++cta.cluster->effects;
}

bool is_full(const Cta& cta, const NamedBarrier& b) {
  if (b.whole_cta) return b.arrived > 0 && static_cast<uint32_t>(std::popcount(b.arrived_warps)) >= cta.warps_left;
  return b.arrived >= b.expected;
}

void write_reduction(Warp& w, const Inst& i, Mask mask, const NamedBarrier& b, uint32_t kind) {
  if (kind == kRedAnd) write_predicate(w, i.d, mask, b.result_and ? kFullMask : 0);
  if (kind == kRedOr) write_predicate(w, i.d, mask, b.result_or ? kFullMask : 0);
  if (kind == kRedPopc) {
    alignas(64) uint32_t result[kLanes];
    for (uint32_t& r : result) r = b.result_count;
    store_lanes(at<uint32_t>(w, i.d), result, mask);
  }
}

// a: barrier number, b: threads (kNoRef: all), c: predicate of a reduction. Whole warps arrive.
Status barrier(Warp& w, const Inst& i, Mask mask) {
  const uint32_t kind = i.aux & 0xff;
  const uint32_t lane = static_cast<uint32_t>(first_lane(mask));
  const uint32_t id = in<uint32_t>(w, i.a)[lane];
  if (id >= 16) fault(w, mask, "named-barrier", "barrier " + std::to_string(id) + " does not exist", id);
  NamedBarrier& b = w.cta->barriers[id];
  Wait& wait = w.path->wait;
  if (wait.kind == Wait::kBarrier) {
    if (b.generation == wait.generation) return Status::kBlocked;
    wait = {};
    write_reduction(w, i, mask, b, kind);
    return Status::kNext;
  }
  const bool whole = i.b == kNoRef;
  const uint32_t threads = whole ? 0 : in<uint32_t>(w, i.b)[lane];
  if (!whole && (threads == 0 || threads % kLanes || threads > w.launch->warps_per_cta * kLanes)) {
    fault(w, mask, "named-barrier",
          std::to_string(threads) + " threads at barrier " + std::to_string(id) +
              ": a multiple of 32, at most the CTA's, is needed",
          id);
  }
  const uint64_t bit = uint64_t(1) << w.index;
  if (b.arrived_warps) {
    if (b.whole_cta != whole || (!whole && b.expected != threads)) {
      fault(w, mask, "named-barrier",
            "barrier " + std::to_string(id) + ": " + (whole ? std::string("all") : std::to_string(threads)) +
                " threads expected here, " + (b.whole_cta ? std::string("all") : std::to_string(b.expected)) +
                " by the warps that have arrived",
            id);
    }
    if (b.arrived_warps & bit) {
      fault(w, mask, "named-barrier",
            "the warp arrives a second time at barrier " + std::to_string(id) + " before it is complete", id);
    }
  }
  b.whole_cta = whole;
  b.expected = threads;
  b.arrived += kLanes;
  b.arrived_warps |= bit;
  if (kind != kArrive) b.waiting_warps |= bit;
  if (kind >= kRedAnd) {
    const Mask yes = read_predicate(w, i.c) & mask;
    b.reduce_and &= yes == mask;
    b.reduce_or |= yes != 0;
    b.reduce_count += static_cast<uint32_t>(std::popcount(yes));
  }
  if (w.checks) w.checks->barrier_arrive(w.where(mask), id, threads);
  const uint64_t generation = b.generation;
  if (!whole && b.arrived > b.expected) {
    fault(w, mask, "named-barrier",
          "more than " + std::to_string(threads) + " threads at barrier " + std::to_string(id), id);
  }
  if (is_full(*w.cta, b)) {
    complete_barrier(*w.cta, id);
    write_reduction(w, i, mask, b, kind);
    return Status::kNext;
  }
  if (kind == kArrive) return Status::kNext;
  wait.kind = Wait::kBarrier;
  wait.id = id;
  wait.generation = generation;
  return Status::kBlocked;
}

// ---- barrier.cluster: every thread arrives once per phase, exited threads count as arrived ----

uint32_t cluster_warps(const Cluster& cluster) {
  uint32_t count = 0;
  for (const auto& cta : cluster.ctas) count += cta->warps_left;
  return count;
}
void settle_cluster(Cluster& cluster) {
  if (cluster.cluster_arrived == 0 || cluster.cluster_arrived < cluster_warps(cluster)) return;
  cluster.cluster_arrived = 0;
  ++cluster.cluster_generation;
  ++cluster.effects;
  if (cluster.checks) cluster.checks->cluster_complete();
}
Status cluster_arrive(Warp& w, const Inst& i, Mask mask) {
  if (w.cluster_phase != w.cluster->cluster_generation || w.cluster_has_arrived) {
    fault(w, mask, "named-barrier", "barrier.cluster.arrive twice without barrier.cluster.wait");
  }
  w.cluster_has_arrived = true;
  ++w.cluster->cluster_arrived;
  if (w.checks) w.checks->cluster_arrive(w.where(mask), i.aux != 0);
  settle_cluster(*w.cluster);
  return Status::kNext;
}
Status cluster_wait(Warp& w, const Inst& i, Mask mask) {
  if (!w.cluster_has_arrived) fault(w, mask, "named-barrier", "barrier.cluster.wait without barrier.cluster.arrive");
  if (w.cluster->cluster_generation == w.cluster_phase) {
    w.path->wait.kind = Wait::kCluster;
    return Status::kBlocked;
  }
  w.path->wait = {};
  w.cluster_has_arrived = false;
  w.cluster_phase = w.cluster->cluster_generation;
  if (w.checks) w.checks->cluster_wait(w.where(mask), i.aux != 0);
  return Status::kNext;
}

// ---- fences ----

enum FenceKind : uint32_t { kFence, kProxyAsync, kMbarrierInit, kProxyTensormap, kProxyAlias };
Status fence(Warp& w, const Inst& i, Mask mask) {
  if (!w.checks) return Status::kNext;
  switch (i.aux) {
    case kFence:
      w.checks->fence(w.where(mask), static_cast<Scope>(i.imm));
      break;
    case kProxyAsync:
      w.checks->fence_proxy_async(w.where(mask), static_cast<ProxyFence>(i.imm));
      break;
    case kMbarrierInit:
      w.checks->fence_mbarrier_init(w.where(mask));
      break;
    default:
      break;
  }
  return Status::kNext;
}

// ---- setmaxnreg: a pool per CTA, in registers of one thread times warps ----

Status set_registers(Warp& w, const Inst& i, Mask mask) {
  const uint32_t count = static_cast<uint32_t>(i.imm);
  Cta& cta = *w.cta;
  if (i.aux) {  // inc
    if (count < w.max_registers) {
      fault(w, mask, "register-pool",
            "setmaxnreg.inc to " + std::to_string(count) + " from " + std::to_string(w.max_registers));
    }
    const int64_t more = static_cast<int64_t>(count) - w.max_registers;
    if (more > cta.registers_free) {
      w.path->wait.kind = Wait::kRegisters;
      w.path->wait.id = count;
      return Status::kBlocked;
    }
    w.path->wait = {};
    cta.registers_free -= more;
  } else {
    if (count > w.max_registers) {
      fault(w, mask, "register-pool",
            "setmaxnreg.dec to " + std::to_string(count) + " from " + std::to_string(w.max_registers));
    }
    cta.registers_free += static_cast<int64_t>(w.max_registers) - count;
  }
  w.max_registers = count;
  if (w.checks) w.checks->set_max_registers(w.where(mask), count, i.aux != 0);
  return Status::kNext;
}

void decode_fence(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  Inst in;
  in.run = fence;
  Scope scope = decode_mode(d).scope;
  if (p.has("gl")) scope = Scope::kGpu;
  in.imm = static_cast<int64_t>(scope);
  in.aux = kFence;
  if (p.has("mbarrier_init")) {
    in.aux = kMbarrierInit;
  } else if (p.has("proxy")) {
    bool async = false;
    ProxyFence space = ProxyFence::kAll;
    for (const std::string_view part : p.parts) {
      async |= part.substr(0, 5) == "async";
      if (part == "shared::cta" || part == "shared::cluster") space = ProxyFence::kShared;
      if (part == "global") space = ProxyFence::kGlobal;
    }
    in.aux = async ? kProxyAsync : p.has("alias") ? kProxyAlias : kProxyTensormap;
    in.imm = static_cast<int64_t>(space);
  } else if (scope == Scope::kWeak) {
    d.unsupported("scope");
  }
  d.emit(in);
}

}  // namespace

void warp_exited(Warp& w) {
  Cta& cta = *w.cta;
  --cta.warps_left;
  ++cta.cluster->effects;
  for (uint32_t id = 0; id < cta.barriers.size(); ++id) {
    const NamedBarrier& b = cta.barriers[id];
    if (b.arrived_warps && b.whole_cta && is_full(cta, b)) complete_barrier(cta, id);
  }
  if (w.cluster_has_arrived && w.cluster_phase == w.cluster->cluster_generation) --w.cluster->cluster_arrived;
  settle_cluster(*w.cluster);
  if (cta.warps_left == 0) {
    --cta.cluster->ctas_left;
    if (w.checks) w.checks->cta_exit(cta.rank);
  }
}

bool decode_barrier(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  if (op == "fence" || op == "membar") {
    decode_fence(d);
    return true;
  }
  Inst in;
  if (op == "setmaxnreg") {
    in.run = set_registers;
    in.aux = p.has("inc");
    in.imm = d.integer(d.operand(0));
    if (in.imm < 24 || in.imm > 256 || in.imm % 8) d.unsupported("a multiple of 8 from 24 to 256 is needed");
    in.flags = kFlagGather;
    d.emit(in);
    return true;
  }
  if (op != "bar" && op != "barrier") return false;
  in.flags = kFlagGather;
  if (p.has("cluster")) {
    const bool arrive = p.has("arrive");
    in.run = arrive ? cluster_arrive : cluster_wait;
    in.aux = !p.has("relaxed");
    d.emit(in);
    return true;
  }
  in.run = barrier;
  const bool red = p.has("red");
  in.aux = p.has("arrive") ? kArrive : !red ? kSync : p.has("popc") ? kRedPopc : p.has("and") ? kRedAnd : kRedOr;
  const size_t first = red ? 1 : 0;
  in.a = d.source(first, PtxType::kU32);
  size_t next = first + 1;
  if (d.operand_count() > next + (red ? 1 : 0)) in.b = d.source(next++, PtxType::kU32);
  if (in.aux == kArrive && in.b == kNoRef) d.unsupported("arrive without a thread count");
  if (red) {
    in.c = d.predicate(d.operand(next));
    in.d = in.aux == kRedPopc ? d.destination(0, PtxType::kU32) : d.predicate_destination(d.operand(0));
  }
  d.sink();
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
