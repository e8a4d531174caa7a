// The engine's frame: reports, fences, named and cluster barriers, exits.
#include "checks.h"

#include <algorithm>
#include <cstdio>

#include "checks_state.h"

namespace flash_ext::emulator {

namespace {

constexpr size_t kMaxFaults = 100;
constexpr uint32_t kWholeCluster = ~0u;
constexpr uint32_t kRegisterFile = 65536;

void merge(ForeignClocks& into, const ForeignClocks& from) {
  for (const auto& [domain, entry] : from.domains) {
    ForeignClocks::Entry& mine = into.domains[domain];
    mine.order.join(entry.order);
    mine.shared_proxy.join(entry.shared_proxy);
    mine.global_proxy.join(entry.global_proxy);
  }
}

std::string dim_text(const Dim3& dim) {
  return "(" + std::to_string(dim.x) + "," + std::to_string(dim.y) + "," + std::to_string(dim.z) + ")";
}

const char* agent_text(AgentKind kind) {
  switch (kind) {
    case AgentKind::kWarp:
      return "warp";
    case AgentKind::kCpAsync:
      return "cp.async of warp";
    case AgentKind::kWgmma:
      return "wgmma of warpgroup";
    case AgentKind::kLoad:
      return "asynchronous copy that signals mbarrier";
    case AgentKind::kBulkRead:
      return "bulk store (reading its source) of warp";
    case AgentKind::kBulkWrite:
      return "bulk store (writing global memory) of warp";
    case AgentKind::kNone:
      break;
  }
  return "an earlier launch";
}

std::string agent_name(const AgentTable& table, uint32_t number) {
  const Agent& agent = table.agents[number];
  if (agent.kind == AgentKind::kNone) return agent_text(agent.kind);
  const std::string name = agent.kind == AgentKind::kLoad ? hex(agent.number) : std::to_string(agent.number);
  return std::string(agent_text(agent.kind)) + " " + name + " of CTA " + dim_text(table.ctas[agent.cta]);
}

}  // namespace

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Foreign join_foreign(const Foreign& a, const Foreign& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto joined = std::make_shared<ForeignClocks>(*a);
  merge(*joined, *b);
  return joined;
}

GlobalEpoch settled_epoch() { return GlobalEpoch(0, Epoch(0, 0, 0, Scope::kWeak, true)); }

// --- launch ------------------------------------------------------------------------------------

LaunchChecks::LaunchChecks(LaunchInfo info, GlobalShadow& global) : info_(std::move(info)), global_(global) {}

LaunchChecks::~LaunchChecks() { global_.state().end_launch(); }

std::string LaunchChecks::register_name(uint32_t id) const {
  return info_.register_name ? info_.register_name(id) : "register " + std::to_string(id);
}

void LaunchChecks::report(Fault fault, uint32_t pc) {
  if (faults_.size() >= kMaxFaults) return;
  for (size_t i = 0; i < faults_.size(); ++i)
    if (pcs_[i] == pc && faults_[i].kind == fault.kind) return;
  const SourcePlace where = locate(pc);
  fault.kernel = info_.kernel;
  fault.file = where.file;
  fault.line = where.line;
  fault.ptx_line = where.ptx_line;
  fault.ptx = where.ptx;
  faults_.push_back(std::move(fault));
  pcs_.push_back(pc);
}

// --- cluster -----------------------------------------------------------------------------------

ClusterChecks::State::State(LaunchChecks& launch_checks, ClusterShape cluster_shape)
    : launch(launch_checks), shape(std::move(cluster_shape)), global(launch_checks.global()) {
  domain = uint32_t(global.domains.size());
  table = std::make_shared<AgentTable>();
  table->ctas = shape.ctas;
  global.domains.push_back(table);
  ctas.resize(shape.ctas.size(), CtaShadow(shape.shared_bytes));
  for (uint32_t rank = 0; rank < ctas.size(); ++rank) {
    CtaShadow& cta = ctas[rank];
    cta.cells.resize((shape.shared_bytes + kGranule - 1) / kGranule);
    cta.barrier_granules.resize(cta.cells.size());
    cta.mbarrier_at.resize(2 * cta.cells.size());
    cta.warps.resize(shape.warps);
    for (uint32_t i = 0; i < shape.warps; ++i) {
      WarpShadow& warp = cta.warps[i];
      warp.agent = new_agent(AgentKind::kWarp, rank, i);
      warp.registers.resize(shape.registers);
      warp.max_registers = shape.launch_registers;
      warp.tick();
    }
  }
}

uint32_t ClusterChecks::State::new_agent(AgentKind kind, uint32_t cta, uint32_t number) {
  if (table->agents.size() >= Epoch::kMaxAgents)
    throw LaunchError("checks: more than 4093 warps, mbarriers and issuers of bulk copies in a cluster");
  table->agents.push_back({kind, cta, number});
  return uint32_t(table->agents.size() - 1);
}

std::string ClusterChecks::State::place(uint32_t pc) const {
  const SourcePlace where = launch.locate(pc);
  std::string text;
  if (!where.file.empty()) text += " at " + where.file + ":" + std::to_string(where.line);
  if (where.ptx_line) text += " (PTX line " + std::to_string(where.ptx_line) + ": " + where.ptx + ")";
  return text;
}

std::string ClusterChecks::State::describe(const Epoch& epoch) const {
  return agent_name(*table, epoch.agent()) + place(epoch.pc());
}

std::string ClusterChecks::State::describe(const GlobalEpoch& epoch) const {
  return agent_name(*global.domains[epoch.domain], epoch.agent()) + place(epoch.pc());
}

void ClusterChecks::State::report(const char* kind, const Where& at, uint64_t address, std::string message) {
  Fault fault;
  fault.kind = kind;
  fault.message = std::move(message);
  fault.cta = shape.ctas[at.cta];
  fault.warp = at.warp;
  fault.lanes = at.lanes;
  fault.address = address;
  launch.report(std::move(fault), at.pc);
}

void ClusterChecks::State::touch_remote(const Where& at, uint32_t target) {
  if (target == at.cta) return;
  CtaShadow& cta = ctas[target];
  if (cta.exited)
    report(fault_kind::kClusterExit, at, 0,
           "access to the shared memory of CTA rank " + std::to_string(target) + ", which has exited");
  const WarpShadow& me = warp(at);
  if (me.agent >= cta.remote.size()) cta.remote.resize(me.agent + 1);
  cta.remote[me.agent] = {me.now(), at.pc};
}

ClusterChecks::ClusterChecks(LaunchChecks& launch, ClusterShape shape)
    : state_(std::make_unique<State>(launch, std::move(shape))) {}

ClusterChecks::~ClusterChecks() = default;

void ClusterChecks::cta_exit(uint32_t rank) {
  State& s = *state_;
  CtaShadow& cta = s.ctas[rank];
  cta.exited = true;
  VectorClock last;
  for (const WarpShadow& warp : cta.warps) last.join(warp.clock.order);

  for (uint32_t agent = 0; agent < cta.remote.size(); ++agent) {
    const RemoteAccess& access = cta.remote[agent];
    if (access.clock <= last.get(agent)) continue;
    const Agent& other = s.table->agents[agent];
    s.report(fault_kind::kClusterExit, {other.cta, other.number, ~0u, access.pc}, 0,
             "CTA rank " + std::to_string(rank) +
                 " may have exited before this access to its shared memory: nothing orders its "
                 "exit after it");
  }
  for (const MbarrierShadow& barrier : cta.mbarriers) {
    if (barrier.tx != 0)
      s.report(
          fault_kind::kExpectTx, {rank, 0, 0, barrier.last_expect_pc}, barrier.offset,
          "mbarrier " + hex(barrier.offset) + ": transaction count " + std::to_string(barrier.tx) + " left at exit");
    if (barrier.last_load > last.get(barrier.agent))
      s.report(fault_kind::kAsyncAtExit, {rank, 0, 0, barrier.last_load_pc}, barrier.offset,
               "no warp of the CTA waits for this copy (mbarrier " + hex(barrier.offset) + ") before the CTA exits");
  }
  for (uint32_t number = 0; number < cta.warps.size(); ++number) {
    const WarpShadow& warp = cta.warps[number];
    for (const BulkLane& bulk : warp.bulk)
      if (bulk.last_read > last.get(bulk.read_agent))
        s.report(fault_kind::kAsyncAtExit, {rank, number, 1u << bulk.lane, bulk.last_pc}, 0,
                 "the CTA exits without waiting (cp.async.bulk.wait_group) until this store has read "
                 "its shared memory");
  }
}

void ClusterChecks::set_max_registers(const Where& at, uint32_t count, bool increase) {
  State& s = *state_;
  WarpShadow& warp = s.warp(at);
  if (count % 8 != 0 || count < 24 || count > 256)
    s.report(fault_kind::kRegisterPool, at, count,
             "setmaxnreg " + std::to_string(count) + ": must be a multiple of 8 from 24 to 256");
  const bool wrong_way = increase ? count < warp.max_registers : count > warp.max_registers;
  if (warp.max_registers && wrong_way)
    s.report(fault_kind::kRegisterPool, at, count,
             std::string("setmaxnreg.") + (increase ? "inc" : "dec") + " to " + std::to_string(count) +
                 ", but the warp has " + std::to_string(warp.max_registers));
  warp.max_registers = count;
  uint64_t total = 0;
  for (const WarpShadow& other : s.ctas[at.cta].warps) total += 32ull * other.max_registers;
  if (total > kRegisterFile)
    s.report(fault_kind::kRegisterPool, at, count,
             "the warps of the CTA hold " + std::to_string(total) + " registers, the file has " +
                 std::to_string(kRegisterFile));
}

// --- release and acquire at an address -----------------------------------------------------------

void SyncVariable::release(const Foreign& clocks, Scope scope, Place from, bool replace) {
  if (replace) {
    gpu_ = nullptr;
    narrower_.clear();
  }
  auto add = [&](Foreign& to) { to = join_foreign(to, clocks); };
  add(narrower_[{from.domain, from.cta}]);
  if (scope >= Scope::kCluster) add(narrower_[{from.domain, kWholeCluster}]);
  if (scope == Scope::kGpu) add(gpu_);
}

Foreign SyncVariable::acquire(Scope scope, Place to) const {
  Foreign result;
  auto take = [&](uint32_t cta) {
    const auto found = narrower_.find({to.domain, cta});
    if (found != narrower_.end()) result = join_foreign(result, found->second);
  };
  take(to.cta);
  if (scope >= Scope::kCluster) take(kWholeCluster);
  if (scope == Scope::kGpu) result = join_foreign(result, gpu_);
  return result;
}

Foreign ClusterChecks::State::snapshot(const Clock& clock) const {
  auto all = clock.foreign ? std::make_shared<ForeignClocks>(*clock.foreign) : std::make_shared<ForeignClocks>();
  all->domains[domain] = {clock.order, clock.shared_proxy, clock.global_proxy};
  return all;
}

void ClusterChecks::State::absorb(Clock& clock, const Foreign& clocks) const {
  if (!clocks) return;
  auto others = std::make_shared<ForeignClocks>(*clocks);
  if (const auto own = others->domains.find(domain); own != others->domains.end()) {
    clock.order.join(own->second.order);
    clock.shared_proxy.join(own->second.shared_proxy);
    clock.global_proxy.join(own->second.global_proxy);
    others->domains.erase(own);
  }
  if (!others->domains.empty()) clock.foreign = join_foreign(clock.foreign, others);
}

void ClusterChecks::State::synchronise(const Where& at, SyncVariables& variables, uint64_t key, Access access,
                                       Scope scope, Order order) {
  WarpShadow& me = warp(at);
  const SyncVariable::Place place{domain, at.cta};
  const bool acquires = order == Order::kAcquire || order == Order::kAcqRel;
  const bool releases = order == Order::kRelease || order == Order::kAcqRel;
  const bool replace = access == Access::kWrite;
  const auto known = variables.find(key);
  if (access != Access::kWrite && known != variables.end()) {
    const Foreign seen = known->second.acquire(scope, place);
    if (acquires)
      absorb(me.clock, seen);
    else
      me.fence_acquire = join_foreign(me.fence_acquire, seen);
  }
  if (access == Access::kRead) return;
  if (releases && &variables == &global.sync) {
    // Sums whose order matters are handed over like this. Reductions by themselves are atomic, so no race would show it.
    for (const BulkLane& bulk : me.bulk) {
      if (!(at.lanes >> bulk.lane & 1) || bulk.last_reduction <= me.clock.order.get(bulk.write_agent)) continue;
      report(fault_kind::kIncompleteReduction, at, key,
             "a release while the thread's bulk reduction at " + this->place(bulk.reduction_pc) +
                 " may not be complete: no cp.async.bulk.wait_group (without .read) in between");
      return;
    }
  }
  if (releases) {
    variables[key].release(snapshot(me.clock), scope, place, replace);
    me.tick();
  } else if (me.fence_release) {
    variables[key].release(me.fence_release, std::min(scope, me.fence_scope), place, replace);
  } else if (replace && known != variables.end()) {
    variables.erase(known);
  }
}

void ClusterChecks::fence(const Where& at, Scope scope) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  s.absorb(me.clock, me.fence_acquire);
  me.fence_acquire = nullptr;
  me.fence_release = s.snapshot(me.clock);
  me.fence_scope = scope;
  // fence.mbarrier_init is the light form of this one.
  if (scope >= Scope::kCluster) fence_mbarrier_init(at);
  ++me.lane_interval;
  me.tick();
}

void ClusterChecks::fence_proxy_async(const Where& at, ProxyFence space) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  if (space != ProxyFence::kGlobal) me.clock.shared_proxy = me.clock.order;
  if (space != ProxyFence::kShared) {
    me.clock.global_proxy = me.clock.order;
    if (me.clock.foreign) {
      auto fenced = std::make_shared<ForeignClocks>(*me.clock.foreign);
      for (auto& [domain, entry] : fenced->domains) entry.global_proxy = entry.order;
      me.clock.foreign = fenced;
    }
  }
  if (space != ProxyFence::kGlobal) fence_mbarrier_init(at);
  me.tick();
}

void ClusterChecks::fence_mbarrier_init(const Where& at) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  for (CtaShadow& cta : s.ctas)
    for (MbarrierShadow& barrier : cta.mbarriers)
      if (!barrier.fenced && me.clock.order.get(barrier.init.agent()) >= barrier.init.clock()) {
        barrier.fenced = true;
        barrier.fence_agent = me.agent;
      }
}

void ClusterChecks::warp_sync(const Where& at) { ++state_->warp(at).lane_interval; }

// --- named and cluster barriers ------------------------------------------------------------------

void ClusterChecks::barrier_arrive(const Where& at, uint32_t id, uint32_t threads) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  NamedBarrierShadow& barrier = s.ctas[at.cta].barriers[id & 15];
  if (!barrier.active) {
    barrier.active = true;
    barrier.threads = threads;
    barrier.pc = at.pc;
  } else if (barrier.threads != threads) {
    s.report(fault_kind::kNamedBarrier, at, id,
             "named barrier " + std::to_string(id) + " expects " + std::to_string(barrier.threads) + " threads since" +
                 s.place(barrier.pc) + ", here " + std::to_string(threads));
  }
  if (barrier.lanes[at.warp & 31] & at.lanes)
    s.report(fault_kind::kNamedBarrier, at, id,
             "the warp arrives a second time at named barrier " + std::to_string(id) +
                 " before it has completed; its first arrivals came" + s.place(barrier.pc));
  barrier.lanes[at.warp & 31] |= at.lanes;
  barrier.arrived.join(me.clock);
  barrier.fence_release = join_foreign(barrier.fence_release, me.fence_release);
  barrier.fence_acquire = join_foreign(barrier.fence_acquire, me.fence_acquire);
  barrier.fence_scope = std::max(barrier.fence_scope, me.fence_scope);
  me.tick();
}

void ClusterChecks::barrier_complete(uint32_t rank, uint32_t id, uint32_t waiting_warps) {
  CtaShadow& cta = state_->ctas[rank];
  NamedBarrierShadow& barrier = cta.barriers[id & 15];
  for (uint32_t left = waiting_warps; left; left &= left - 1) {
    WarpShadow& warp = cta.warps[__builtin_ctz(left)];
    warp.clock.join(barrier.arrived);
    ++warp.lane_interval;
    // A fence by every thread on one side of the barrier and one relaxed operation on the other is less than the
    // memory model asks for, but an old idiom that all GPUs honour.
    warp.fence_release = join_foreign(warp.fence_release, barrier.fence_release);
    warp.fence_acquire = join_foreign(warp.fence_acquire, barrier.fence_acquire);
    warp.fence_scope = std::max(warp.fence_scope, barrier.fence_scope);
  }
  barrier = NamedBarrierShadow{};
}

void ClusterChecks::cluster_arrive(const Where& at, bool release) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  if (release) {
    s.cluster_arrived.join(me.clock);
    fence_mbarrier_init(at);
  } else if (me.fence_release && me.fence_scope >= Scope::kCluster) {
    s.absorb(s.cluster_arrived, me.fence_release);
  }
  for (CtaShadow& cta : s.ctas)
    for (MbarrierShadow& barrier : cta.mbarriers)
      if (barrier.fenced && barrier.fence_agent == me.agent) barrier.cluster_arrived = true;
  me.tick();
}

void ClusterChecks::cluster_complete() {
  State& s = *state_;
  s.cluster_completed = std::move(s.cluster_arrived);
  s.cluster_arrived = Clock{};
  for (CtaShadow& cta : s.ctas)
    for (MbarrierShadow& barrier : cta.mbarriers)
      if (barrier.cluster_arrived) barrier.cluster_visible = true;
}

void ClusterChecks::cluster_wait(const Where& at, bool acquire) {
  WarpShadow& me = state_->warp(at);
  if (acquire) me.clock.join(state_->cluster_completed);
  ++me.lane_interval;
}

}  // namespace flash_ext::emulator
