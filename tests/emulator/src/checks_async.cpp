// mbarriers and the asynchronous copies: TMA, bulk, cp.async.
#include <algorithm>

#include "checks_state.h"

namespace flash_ext::emulator {

// --- mbarriers -----------------------------------------------------------------------------------

MbarrierShadow* ClusterChecks::State::find_mbarrier(uint32_t target, uint32_t offset) {
  if (target >= ctas.size()) return nullptr;
  CtaShadow& cta = ctas[target];
  if (offset % 8 != 0 || offset / 8 >= cta.mbarrier_at.size()) return nullptr;
  const uint32_t slot = cta.mbarrier_at[offset / 8];
  return slot ? &cta.mbarriers[slot - 1] : nullptr;
}

MbarrierShadow* ClusterChecks::State::mbarrier(const Where& at, uint32_t target, uint32_t offset,
                                               const char* operation) {
  MbarrierShadow* barrier = find_mbarrier(target, offset);
  if (!barrier || !barrier->live) {
    report(fault_kind::kMbarrier, at, offset,
           std::string(operation) + " at " + hex(offset) + " of CTA rank " + std::to_string(target) +
               ": no initialised mbarrier there");
    return nullptr;
  }
  WarpShadow& me = warp(at);
  const bool init_known = me.clock.order.get(barrier->init.agent()) >= barrier->init.clock();
  if (!init_known && !barrier->cluster_visible)
    report(fault_kind::kMbarrier, at, offset,
           std::string(operation) + " on mbarrier " + hex(offset) + " is not ordered after its initialisation by " +
               describe(barrier->init));
  barrier->users.raise(me.agent, me.now());
  touch_remote(at, target);
  return barrier;
}

void ClusterChecks::State::check_unused(const Where& at, uint32_t target, MbarrierShadow& barrier,
                                        const char* operation) {
  const std::string name = std::string(operation) + " of mbarrier " + hex(barrier.offset);
  if (!barrier.waiters.empty()) {
    const uint64_t waiter = barrier.waiters.front();
    report(fault_kind::kMbarrier, at, barrier.offset,
           name + " while warp " + std::to_string(uint32_t(waiter)) + " of CTA rank " + std::to_string(waiter >> 32) +
               " waits on it");
  }
  if (barrier.in_flight > 0 || barrier.tx != 0)
    report(fault_kind::kMbarrier, at, barrier.offset,
           name + " with copies in flight: transaction count " + std::to_string(barrier.tx) +
               ", the last copy was issued" + place(barrier.last_load_pc));
  const VectorClock& order = warp(at).clock.order;
  for (uint32_t agent = 0; agent < barrier.users.size(); ++agent)
    if (barrier.users.get(agent) > order.get(agent)) {
      const Agent& other = table->agents[agent];
      report(fault_kind::kMbarrier, at, barrier.offset,
             name + " is not ordered after its use by warp " + std::to_string(other.number) + " of CTA rank " +
                 std::to_string(other.cta));
      break;
    }
  if (target != at.cta) touch_remote(at, target);
}

void ClusterChecks::mbarrier_init(const Where& at, uint32_t target, uint32_t offset, uint32_t count) {
  State& s = *state_;
  if (!s.in_window(at, target, offset, 8)) return;
  CtaShadow& cta = s.ctas[target];
  WarpShadow& me = s.warp(at);
  MbarrierShadow* barrier = s.find_mbarrier(target, offset);
  if (!barrier) {
    barrier = &cta.mbarriers.emplace_back();
    barrier->offset = offset;
    barrier->agent = s.new_agent(AgentKind::kLoad, target, offset);
    cta.mbarrier_at[offset / 8] = uint16_t(cta.mbarriers.size());
  } else if (barrier->live) {
    s.check_unused(at, target, *barrier, "initialisation");
    --cta.barrier_granules[offset / kGranule];
  }
  barrier->live = false;
  const Epoch epoch(me.agent, me.now(), at.pc, Scope::kWeak, true);
  const SharedRange bytes{offset, 8};
  s.on_shared_ranges({at, target, me.clock.order, me.clock.shared_proxy, {epoch, false, true, false}, "mbarrier.init"},
                     {&bytes, 1});
  barrier->live = true;
  ++cta.barrier_granules[offset / kGranule];
  barrier->init = epoch;
  barrier->fenced = barrier->cluster_arrived = barrier->cluster_visible = false;
  barrier->count = count;
  barrier->pending = count;
  barrier->tx = barrier->in_flight = 0;
  barrier->waiters.clear();
  barrier->users = VectorClock{};
  barrier->releasing = barrier->completed = Clock{};
  me.tick();
}

void ClusterChecks::mbarrier_inval(const Where& at, uint32_t target, uint32_t offset) {
  State& s = *state_;
  MbarrierShadow* barrier = s.mbarrier(at, target, offset, "mbarrier.inval");
  if (!barrier) return;
  s.check_unused(at, target, *barrier, "invalidation");
  barrier->live = false;
  --s.ctas[target].barrier_granules[offset / kGranule];
}

void ClusterChecks::State::end_phase(const Where& at, uint32_t target, MbarrierShadow& barrier) {
  if (barrier.in_flight > 0) {
    report(fault_kind::kExpectTx, at, barrier.offset,
           "mbarrier " + hex(barrier.offset) + " of CTA rank " + std::to_string(target) + " completes its phase with " +
               std::to_string(barrier.in_flight) +
               " bytes of copies in flight: expect_tx does not cover the copy issued" + place(barrier.last_load_pc));
    barrier.in_flight = 0;
  }
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.tx = 0;
  barrier.completed.join(barrier.releasing);
  // A phase of a former life of the barrier needs no agent: only copies have epochs of it.
  barrier.completed.order.raise(barrier.agent, barrier.phase);
  barrier.releasing = Clock{};
}

void ClusterChecks::State::arrive(const Where& at, uint32_t target, MbarrierShadow& barrier, uint32_t count,
                                  const Clock* release, bool completes) {
  if (barrier.pending < int64_t(count))
    report(fault_kind::kMbarrier, at, barrier.offset,
           std::to_string(count) + " arrivals on mbarrier " + hex(barrier.offset) + " of CTA rank " +
               std::to_string(target) + ", of which " + std::to_string(barrier.pending) + " of " +
               std::to_string(barrier.count) + " are pending");
  barrier.pending -= count;
  if (release) barrier.releasing.join(*release);
  if (completes) end_phase(at, target, barrier);
}

void ClusterChecks::mbarrier_arrive(const Where& at, uint32_t target, uint32_t offset, uint32_t count,
                                    uint32_t expect_bytes, bool release, bool completes) {
  State& s = *state_;
  MbarrierShadow* barrier = s.mbarrier(at, target, offset, "mbarrier.arrive");
  if (!barrier) return;
  if (expect_bytes) {
    barrier->tx += expect_bytes;
    barrier->last_expect_pc = at.pc;
  }
  WarpShadow& me = s.warp(at);
  s.arrive(at, target, *barrier, count, release ? &me.clock : nullptr, completes);
  me.tick();
}

void ClusterChecks::mbarrier_expect_tx(const Where& at, uint32_t target, uint32_t offset, uint32_t bytes,
                                       bool completes) {
  State& s = *state_;
  MbarrierShadow* barrier = s.mbarrier(at, target, offset, "mbarrier.expect_tx");
  if (!barrier) return;
  barrier->tx += bytes;
  barrier->last_expect_pc = at.pc;
  if (completes) s.end_phase(at, target, *barrier);
  s.warp(at).tick();
}

void ClusterChecks::mbarrier_complete_tx(uint32_t target, uint32_t offset, uint32_t bytes, bool completes) {
  State& s = *state_;
  MbarrierShadow* barrier = s.find_mbarrier(target, offset);
  if (!barrier || !barrier->live) return;  // reported at issue, or by the re-initialisation
  barrier->tx -= bytes;
  barrier->in_flight = std::max<int64_t>(0, barrier->in_flight - bytes);
  if (completes) s.end_phase({target, 0, 0, barrier->last_load_pc}, target, *barrier);
}

void ClusterChecks::mbarrier_wait(const Where& at, uint32_t target, uint32_t offset, bool success, bool acquire) {
  State& s = *state_;
  MbarrierShadow* barrier = s.mbarrier(at, target, offset, "mbarrier wait");
  if (!barrier) return;
  const uint64_t waiter = uint64_t(at.cta) << 32 | at.warp;
  auto& waiters = barrier->waiters;
  const auto found = std::find(waiters.begin(), waiters.end(), waiter);
  if (!success) {
    if (found == waiters.end()) waiters.push_back(waiter);
    return;
  }
  if (found != waiters.end()) waiters.erase(found);
  WarpShadow& me = s.warp(at);
  if (acquire) me.clock.join(barrier->completed);
  ++me.lane_interval;
}

// --- cp.async: generic proxy, groups per thread, lanes of a warp taken together
// --------------------

void ClusterChecks::cp_async(const Where& at, const uint32_t* offsets, uint32_t bytes, const uint64_t* sources,
                             uint32_t source_bytes) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  if (!s.in_window(at, at.cta, offsets, bytes)) return;
  if (!me.cp_agent) me.cp_agent = s.new_agent(AgentKind::kCpAsync, at.cta, at.warp);
  const Epoch write(me.cp_agent, me.cp_committed + 1, at.pc, Scope::kWeak, true);
  const Epoch read(me.cp_agent, me.cp_committed + 1, at.pc, Scope::kWeak, false);
  s.on_shared_lanes({at, at.cta, me.clock.order, me.clock.shared_proxy, {write, false, true, false}, "cp.async write"},
                    offsets, bytes);
  if (source_bytes) s.on_global_lanes({at, {read, true, false, false}, "cp.async read"}, sources, source_bytes);
}

void ClusterChecks::cp_async_commit(const Where& at) { ++state_->warp(at).cp_committed; }

void ClusterChecks::cp_async_wait(const Where& at, uint32_t pending) {
  WarpShadow& me = state_->warp(at);
  if (me.cp_agent && me.cp_committed > pending) me.clock.order.raise(me.cp_agent, me.cp_committed - pending);
}

void ClusterChecks::cp_async_wait_all(const Where& at) {
  cp_async_commit(at);
  cp_async_wait(at, 0);
}

void ClusterChecks::cp_async_mbarrier_arrive(const Where& at, uint32_t target, uint32_t offset, bool noinc,
                                             bool completes) {
  State& s = *state_;
  MbarrierShadow* barrier = s.mbarrier(at, target, offset, "cp.async.mbarrier.arrive");
  if (!barrier) return;
  WarpShadow& me = s.warp(at);
  const uint32_t count = uint32_t(__builtin_popcount(at.lanes));
  if (!noinc) barrier->pending += count;
  Clock release = me.clock;
  if (me.cp_agent) release.order.raise(me.cp_agent, me.cp_committed + 1);
  s.arrive(at, target, *barrier, count, &release, completes);
  // What is copied from here on is not covered by this arrival.
  ++me.cp_committed;
  me.tick();
}

// --- TMA and bulk copies
// ---------------------------------------------------------------------------

Epoch ClusterChecks::State::issue_load(const Where& at, uint32_t target, uint32_t offset, uint64_t bytes,
                                       MbarrierShadow*& barrier) {
  barrier = mbarrier(at, target, offset, "asynchronous copy");
  if (!barrier) return Epoch();
  if (!barrier->fenced)
    report(fault_kind::kMbarrier, at, offset,
           "the copy signals mbarrier " + hex(offset) +
               ", whose initialisation no fence (fence.mbarrier_init, fence.proxy.async) made "
               "visible to the async proxy; it was initialised by " +
               describe(barrier->init));
  barrier->in_flight += int64_t(bytes);
  barrier->last_load = barrier->phase + 1;
  barrier->last_load_pc = at.pc;
  return Epoch(barrier->agent, barrier->phase + 1, at.pc, Scope::kWeak, true);
}

void ClusterChecks::async_load(const Where& at, uint32_t target, std::span<const SharedRange> destinations,
                               uint32_t mbarrier, std::span<const GlobalRange> sources) {
  State& s = *state_;
  uint64_t bytes = 0;
  for (const SharedRange& range : destinations) bytes += range.bytes;
  MbarrierShadow* barrier = nullptr;
  const Epoch write = s.issue_load(at, target, mbarrier, bytes, barrier);
  if (!barrier) return;
  const WarpShadow& me = s.warp(at);
  const Epoch read(write.agent(), write.clock(), at.pc, Scope::kWeak, false);
  s.on_global_ranges({at, {read, true, false, true}, "asynchronous read"}, sources);
  s.on_shared_ranges(
      {at, target, me.clock.order, me.clock.shared_proxy, {write, false, true, true}, "asynchronous write"},
      destinations);
}

void ClusterChecks::async_copy(const Where& at, SharedRange source, uint32_t target, SharedRange destination,
                               uint32_t mbarrier) {
  State& s = *state_;
  MbarrierShadow* barrier = nullptr;
  const Epoch write = s.issue_load(at, target, mbarrier, destination.bytes, barrier);
  if (!barrier) return;
  const WarpShadow& me = s.warp(at);
  const Epoch read(write.agent(), write.clock(), at.pc, Scope::kWeak, false);
  s.on_shared_ranges(
      {at, at.cta, me.clock.order, me.clock.shared_proxy, {read, true, false, true}, "asynchronous read"},
      {&source, 1});
  s.on_shared_ranges(
      {at, target, me.clock.order, me.clock.shared_proxy, {write, false, true, true}, "asynchronous write"},
      {&destination, 1});
}

BulkLane& ClusterChecks::State::bulk_lane(const Where& at) {
  const uint32_t lane = uint32_t(__builtin_ctz(at.lanes));
  WarpShadow& me = warp(at);
  for (BulkLane& bulk : me.bulk)
    if (bulk.lane == lane) return bulk;
  BulkLane bulk;
  bulk.lane = lane;
  bulk.read_agent = new_agent(AgentKind::kBulkRead, at.cta, at.warp);
  bulk.write_agent = new_agent(AgentKind::kBulkWrite, at.cta, at.warp);
  me.bulk.push_back(bulk);
  return me.bulk.back();
}

void ClusterChecks::bulk_store(const Where& at, std::span<const SharedRange> sources,
                               std::span<const GlobalRange> destinations, bool reduce) {
  State& s = *state_;
  BulkLane& bulk = s.bulk_lane(at);
  WarpShadow& me = s.warp(at);
  const uint32_t group = bulk.committed + 1;
  bulk.last_read = group;
  bulk.last_pc = at.pc;
  if (reduce) bulk.last_reduction = group, bulk.reduction_pc = at.pc;
  // CUTLASS's epilogue lets a whole warp issue one store.
  const bool repeated = !reduce && me.store_pc == at.pc && bulk.lane > me.store_lane &&
                        std::ranges::equal(sources, me.store_sources) &&
                        std::ranges::equal(destinations, me.store_destinations);
  me.store_pc = at.pc;
  me.store_lane = bulk.lane;
  if (repeated) return;
  me.store_sources.assign(sources.begin(), sources.end());
  me.store_destinations.assign(destinations.begin(), destinations.end());
  const Epoch read(bulk.read_agent, group, at.pc, Scope::kWeak, false);
  // The elements of a reduction are relaxed atomics of GPU scope.
  const Epoch write(bulk.write_agent, group, at.pc, reduce ? Scope::kGpu : Scope::kWeak, true);
  s.on_shared_ranges({at, at.cta, me.clock.order, me.clock.shared_proxy, {read, true, false, true}, "bulk store: read"},
                     sources);
  s.on_global_ranges({at, {write, reduce, true, true}, reduce ? "bulk reduction" : "bulk store"}, destinations);
}

void ClusterChecks::bulk_commit(const Where& at) {
  for (BulkLane& bulk : state_->warp(at).bulk)
    if (at.lanes >> bulk.lane & 1) ++bulk.committed;
}

void ClusterChecks::bulk_wait(const Where& at, uint32_t pending, BulkWait kind) {
  WarpShadow& me = state_->warp(at);
  for (const BulkLane& bulk : me.bulk) {
    if (!(at.lanes >> bulk.lane & 1) || bulk.committed <= pending) continue;
    me.clock.order.raise(bulk.read_agent, bulk.committed - pending);
    if (kind == BulkWait::kFull) me.clock.order.raise(bulk.write_agent, bulk.committed - pending);
  }
}

}  // namespace flash_ext::emulator
