// Accesses to shared and global memory against their shadows.
#include <algorithm>

#include "checks_state.h"

namespace flash_ext::emulator {

namespace {

struct SharedJudge {
  const VectorClock& order;
  const VectorClock& proxy;
  const std::vector<Agent>& agents;
  uint32_t cta;
  Scope scope;

  bool ordered(const Epoch& e) const { return order.get(e.agent()) >= e.clock(); }
  bool proxied(const Epoch& e) const { return !agents[e.agent()].generic() || proxy.get(e.agent()) >= e.clock(); }
  bool in_scope(const Epoch& e) const {
    const Scope needed = agents[e.agent()].cta == cta ? Scope::kCta : Scope::kCluster;
    return scope >= needed && e.scope() >= needed;
  }
};

struct GlobalJudge {
  const Clock& clock;
  uint32_t domain;
  const std::vector<std::shared_ptr<AgentTable>>& domains;
  uint32_t cta;
  Scope scope;

  bool ordered(const GlobalEpoch& e) const {
    if (e.domain == domain) return clock.order.get(e.agent()) >= e.clock();
    const ForeignClocks::Entry* entry = foreign(e);
    return e.domain == 0 || (entry && entry->order.get(e.agent()) >= e.clock());
  }
  bool proxied(const GlobalEpoch& e) const {
    if (e.domain == 0 || !domains[e.domain]->agents[e.agent()].generic()) return true;
    if (e.domain == domain) return clock.global_proxy.get(e.agent()) >= e.clock();
    const ForeignClocks::Entry* entry = foreign(e);
    return entry && entry->global_proxy.get(e.agent()) >= e.clock();
  }
  bool in_scope(const GlobalEpoch& e) const {
    Scope needed = Scope::kGpu;
    if (e.domain == domain) needed = domains[domain]->agents[e.agent()].cta == cta ? Scope::kCta : Scope::kCluster;
    return scope >= needed && e.scope() >= needed;
  }

 private:
  const ForeignClocks::Entry* foreign(const GlobalEpoch& e) const {
    if (!clock.foreign) return nullptr;
    const auto found = clock.foreign->domains.find(e.domain);
    return found == clock.foreign->domains.end() ? nullptr : &found->second;
  }
};

const char* verb(bool writes) { return writes ? "written" : "read"; }

const char* access_name(Access access) {
  switch (access) {
    case Access::kRead:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kReadWrite:
      break;
  }
  return "atomic operation";
}

}  // namespace

// --- global shadow -------------------------------------------------------------------------------

GlobalShadow::GlobalShadow() : state_(std::make_unique<State>()) {}
GlobalShadow::~GlobalShadow() = default;

void GlobalShadow::add(uint64_t base, uint64_t bytes, Role role) {
  State::Range range;
  range.begin = base;
  range.end = base + bytes;
  range.role = role;
  if (bytes && role != Role::kIn)
    range.pages.resize((range.end - 1) / State::kPageBytes - base / State::kPageBytes + 1);
  state_->last_hit = nullptr;
  state_->ranges[base] = std::move(range);
}

void GlobalShadow::remove(uint64_t base) {
  state_->last_hit = nullptr;
  const auto found = state_->ranges.find(base);
  if (found == state_->ranges.end()) return;
  for (auto& page : found->second.pages)
    if (page)
      for (auto& cell : *page)
        if (cell.write.is_split()) state_->pools.free_split(cell.write);
  state_->ranges.erase(found);
}

void GlobalShadow::sync(const MemoryMap& memory) {
  std::vector<uint64_t> gone;
  for (const auto& [base, range] : state_->ranges) {
    const auto found = memory.ranges().find(base);
    const bool same =
        found != memory.ranges().end() && found->second.role == range.role && base + found->second.bytes == range.end;
    if (!same) gone.push_back(base);
  }
  for (const uint64_t base : gone) remove(base);
  for (const auto& [base, range] : memory.ranges())
    if (!state_->ranges.count(base)) add(base, range.bytes, range.role);
}

void GlobalShadow::host_write(uint64_t address, uint64_t bytes) {
  const uint64_t end = address + bytes;
  while (address < end) {
    const uint32_t chunk = uint32_t(std::min<uint64_t>(end - address, 1u << 30));
    for_each_granule_of_range(address, chunk, [&](uint64_t granule, uint32_t mask) {
      State::Range* range = state_->find_tracked(std::max(granule, address));
      if (!range) return;
      auto& cell = state_->cell(*range, granule);
      const Cell<GlobalEpoch> settled{settled_epoch(), {}};
      if (cell == settled) return;
      if (mask == 0xffff) {
        if (cell.write.is_split()) state_->pools.free_split(cell.write);
        cell = settled;
        return;
      }
      if (!cell.write.is_split()) cell = {state_->pools.make_split(cell), {}};
      for (; mask; mask &= mask - 1) state_->pools.split(cell.write)[__builtin_ctz(mask)] = settled;
    });
    address += chunk;
  }
}

GlobalShadow::State::Range* GlobalShadow::State::find_tracked(uint64_t address) {
  if (!last_hit || address < last_hit->begin || address >= last_hit->end) {
    auto after = ranges.upper_bound(address);
    if (after == ranges.begin()) return nullptr;
    Range& range = std::prev(after)->second;
    if (address >= range.end) return nullptr;
    last_hit = &range;
  }
  return last_hit->role == Role::kIn ? nullptr : last_hit;
}

Cell<GlobalEpoch>& GlobalShadow::State::cell(Range& range, uint64_t granule) {
  // The first granule may begin before the range, never before its first page.
  auto& page = range.pages[granule / kPageBytes - range.begin / kPageBytes];
  if (!page) {
    page = std::make_unique<Page>();
    if (range.role == Role::kInOut) page->fill({settled_epoch(), {}});
  }
  return (*page)[granule % kPageBytes / kGranule];
}

void GlobalShadow::State::end_launch() {
  auto settle = [&](Cell<GlobalEpoch>& cell) {
    bool written = !cell.write.none();
    for (const GlobalEpoch& access : pools.members(cell.access)) written |= access.writes();
    cell = {written ? settled_epoch() : GlobalEpoch(), {}};
  };
  for (auto& [base, range] : ranges)
    for (auto& page : range.pages) {
      if (!page) continue;
      for (auto& cell : *page) {
        if (!cell.write.is_split()) {
          settle(cell);
          continue;
        }
        auto& split = pools.split(cell.write);
        bool equal = true;
        for (auto& byte : split) {
          settle(byte);
          equal &= byte == split[0];
        }
        if (!equal) continue;
        const Cell<GlobalEpoch> whole = split[0];
        pools.free_split(cell.write);
        cell = whole;
      }
    }
  pools.clear_sets();
  sync.clear();
  domains.resize(1);
}

void GlobalShadow::State::compact_if_crowded() {
  if (!pools.crowded()) return;
  pools.compact([&](auto&& move) {
    for (auto& [base, range] : ranges)
      for (auto& page : range.pages)
        if (page)
          for (auto& cell : *page) move(cell);
  });
}

// --- walking the shadows -------------------------------------------------------------------------

bool ClusterChecks::State::in_window(const Where& at, uint32_t target, uint64_t begin, uint32_t bytes) {
  if (target < ctas.size() && begin + bytes <= ctas[target].cells.size() * uint64_t(kGranule)) return true;
  report("out-of-bounds", at, begin, "outside the shared memory of CTA rank " + std::to_string(target));
  return false;
}

bool ClusterChecks::State::in_window(const Where& at, uint32_t target, const uint32_t* offsets, uint32_t bytes) {
  uint32_t last = 0;
  for (uint32_t left = at.lanes; left; left &= left - 1) last = std::max(last, offsets[__builtin_ctz(left)]);
  return in_window(at, target, last, bytes);
}

template <class Walk>
void ClusterChecks::State::on_shared(const SharedOperation& what, Walk&& walk) {
  CtaShadow& cta = ctas[what.target];
  const SharedJudge judge{what.order, what.proxy, table->agents, what.at.cta, what.operation.epoch.scope()};
  ShadowCursor<Epoch, SharedJudge> cursor(pools, judge, what.operation);
  bool reported = false;
  walk([&](uint32_t granule, uint32_t mask) {
    const uint32_t index = granule / kGranule;
    cursor.apply(cta.cells[index], mask);
    if (cta.barrier_granules[index] && !reported) [[unlikely]] {
      for (const uint32_t half : {0u, 1u}) {
        const uint32_t slot = cta.mbarrier_at[2 * index + half];
        if (!slot || !cta.mbarriers[slot - 1].live || !(mask >> (8 * half) & 0xff)) continue;
        reported = true;
        report(fault_kind::kMbarrier, what.at, granule + 8 * half,
               std::string(what.name) + " touches a live mbarrier, initialised by " +
                   describe(cta.mbarriers[slot - 1].init));
      }
    }
    if (!cursor.found() || reported) [[likely]]
      return;
    reported = true;
    granule += uint32_t(__builtin_ctz(mask));  // the first byte that is accessed
    const Outcome<Epoch>& found = cursor.outcome();
    const std::string where = std::string(what.name) + " of shared " + hex(granule) +
                              (what.target == what.at.cta ? "" : " of CTA rank " + std::to_string(what.target));
    switch (found.problem) {
      case Problem::kRace:
        report(fault_kind::kSharedRace, what.at, granule,
               where + " is not ordered after: " + verb(found.other.writes()) + " by " + describe(found.other));
        break;
      case Problem::kUninitialised:
        report(fault_kind::kUninitialisedShared, what.at, granule, where + ": never written");
        break;
      case Problem::kProxy:
        report(
            fault_kind::kProxyFence, what.at, granule,
            where + " through the async proxy: no fence.proxy.async since it was written by " + describe(found.other));
        break;
      case Problem::kNone:
        break;
    }
  });
  compact_if_crowded();
}

void ClusterChecks::State::compact_if_crowded() {
  if (!pools.crowded()) return;
  pools.compact([&](auto&& move) {
    for (CtaShadow& cta : ctas)
      for (auto& cell : cta.cells) move(cell);
  });
}

template <class Walk>
void ClusterChecks::State::on_global(const GlobalOperation& what, Walk&& walk) {
  const GlobalJudge judge{warp(what.at).clock, domain, global.domains, what.at.cta, what.operation.epoch.scope()};
  const Operation<GlobalEpoch> operation{GlobalEpoch(domain, what.operation.epoch), what.operation.reads,
                                         what.operation.writes, what.operation.async, what.operation.check_defined};
  ShadowCursor<GlobalEpoch, GlobalJudge> cursor(global.pools, judge, operation);
  bool reported = false;
  walk([&](uint64_t granule, uint32_t mask) {
    // Ranges need not begin or end at a granule: ask at the first byte that is accessed.
    GlobalShadow::State::Range* range = global.find_tracked(granule + __builtin_ctz(mask));
    if (!range) return;
    cursor.apply(global.cell(*range, granule), mask);
    if (!cursor.found() || reported) return;
    reported = true;
    granule += uint64_t(__builtin_ctz(mask));
    const Outcome<GlobalEpoch>& found = cursor.outcome();
    const std::string where = std::string(what.name) + " of global " + hex(granule);
    switch (found.problem) {
      case Problem::kRace:
        report(fault_kind::kGlobalRace, what.at, granule,
               where + " is not ordered after: " + verb(found.other.writes()) + " by " + describe(found.other));
        break;
      case Problem::kUninitialised:
        report(fault_kind::kUninitialisedGlobal, what.at, granule, where + ": never written, in this launch or before");
        break;
      case Problem::kProxy:
        report(
            fault_kind::kProxyFence, what.at, granule,
            where + " through the async proxy: no fence.proxy.async since it was written by " + describe(found.other));
        break;
      case Problem::kNone:
        break;
    }
  });
  global.compact_if_crowded();
}

void ClusterChecks::State::on_shared_ranges(const SharedOperation& what, std::span<const SharedRange> ranges) {
  for (const SharedRange& range : ranges)
    if (!in_window(what.at, what.target, range.offset, range.bytes)) return;
  on_shared(what, [&](auto&& visit) {
    for (const SharedRange& range : ranges) for_each_granule_of_range(range.offset, range.bytes, visit);
  });
}

void ClusterChecks::State::on_shared_lanes(const SharedOperation& what, const uint32_t* offsets, uint32_t bytes) {
  on_shared(what, [&](auto&& visit) { for_each_granule(offsets, what.at.lanes, bytes, visit); });
}

void ClusterChecks::State::on_global_lanes(const GlobalOperation& what, const uint64_t* addresses, uint32_t bytes) {
  on_global(what, [&](auto&& visit) { for_each_granule(addresses, what.at.lanes, bytes, visit); });
}

void ClusterChecks::State::on_shared_chunks(const SharedOperation& what, std::span<const uint32_t> chunks) {
  if (!in_window(what.at, what.target, *std::max_element(chunks.begin(), chunks.end()), kGranule)) return;
  on_shared(what, [&](auto&& visit) {
    for (const uint32_t chunk : chunks) visit(chunk & ~(kGranule - 1), 0xffffu);
  });
}

void ClusterChecks::State::on_global_ranges(const GlobalOperation& what, std::span<const GlobalRange> ranges) {
  // Tiles of an input are the common case: one look-up decides for all rows of a tensor.
  if (ranges.empty() || (!global.find_tracked(ranges.front().address) && !global.find_tracked(ranges.back().address)))
    return;
  on_global(what, [&](auto&& visit) {
    for (const GlobalRange& range : ranges) for_each_granule_of_range(range.address, range.bytes, visit);
  });
}

void ClusterChecks::State::check_lanes(const Where& at, Access access, const uint32_t* offsets, uint32_t bytes) {
  const uint32_t mark = (at.warp + 1) << 26 | (warp(at).lane_interval & 0x3ffffff);
  LaneMarks& marks = ctas[at.cta].lane_marks;
  const bool reads = access == Access::kRead;
  const LaneConflict found =
      reads ? marks.read(mark, at.lanes, offsets, bytes) : marks.write(mark, at.lanes, offsets, bytes);
  if (!found.found) return;
  const std::string other = found.other == LaneMarks::kSeveral ? "other lanes" : "lane " + std::to_string(found.other);
  report(fault_kind::kSharedRace, at, found.address,
         "lane " + std::to_string(found.lane) + (reads ? " reads" : " writes") + " shared " + hex(found.address) +
             ", which " + other + " of its warp " + (reads ? "wrote" : "read") + " since the last bar.warp.sync");
}

// --- hooks ---------------------------------------------------------------------------------------

void ClusterChecks::shared_access(const Where& at, Access access, uint32_t target, const uint32_t* offsets,
                                  uint32_t bytes, Scope scope, Order order) {
  State& s = *state_;
  if (!s.in_window(at, target, offsets, bytes)) return;
  s.touch_remote(at, target);
  WarpShadow& me = s.warp(at);
  const bool writes = access != Access::kRead;
  const Operation<Epoch> operation{Epoch(me.agent, me.now(), at.pc, scope, writes), access != Access::kWrite, writes,
                                   false};
  s.on_shared_lanes({at, target, me.clock.order, me.clock.shared_proxy, operation, access_name(access)}, offsets,
                    bytes);
  if (scope == Scope::kWeak) {
    if (target == at.cta) s.check_lanes(at, access, offsets, bytes);
    return;
  }
  for (uint32_t left = at.lanes; left; left &= left - 1)
    s.synchronise(at, s.shared_sync, uint64_t(target) << 32 | offsets[__builtin_ctz(left)], access, scope, order);
}

void ClusterChecks::global_access(const Where& at, Access access, const uint64_t* addresses, uint32_t bytes,
                                  Scope scope, Order order) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  const bool writes = access != Access::kRead;
  const Operation<Epoch> operation{Epoch(me.agent, me.now(), at.pc, scope, writes), access != Access::kWrite, writes,
                                   false};
  // What a strong operation acquires comes after its own access: both are strong, so they do not
  // race.
  s.on_global_lanes({at, operation, access_name(access)}, addresses, bytes);
  if (scope == Scope::kWeak) return;
  for (uint32_t left = at.lanes; left; left &= left - 1)
    s.synchronise(at, s.global.sync, addresses[__builtin_ctz(left)], access, scope, order);
}

}  // namespace flash_ext::emulator
