// What the happens-before engine keeps of a cluster, a launch and global memory.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "checks.h"
#include "checks_clock.h"
#include "checks_lanes.h"
#include "checks_shadow.h"

namespace flash_ext::emulator {

enum class AgentKind : uint8_t { kNone, kWarp, kCpAsync, kWgmma, kLoad, kBulkRead, kBulkWrite };

struct Agent {
  AgentKind kind = AgentKind::kNone;
  uint32_t cta = 0;
  uint32_t number = 0;  // warp, warpgroup or mbarrier offset
  bool generic() const { return kind == AgentKind::kWarp || kind == AgentKind::kCpAsync; }
};

// Outlives its cluster: later accesses are told whom they conflict with.
struct AgentTable {
  std::vector<Dim3> ctas;
  std::vector<Agent> agents{Agent{}};  // 0: the host and earlier launches
};

// Clocks released at one address, by the scope in which they may be acquired.
class SyncVariable {
 public:
  struct Place {
    uint32_t domain, cta;
  };
  // `replace`: a store ends the release sequences of its predecessors, an atomic goes on with them.
  void release(const Foreign& clocks, Scope scope, Place from, bool replace);
  Foreign acquire(Scope scope, Place to) const;

 private:
  Foreign gpu_;
  std::map<std::pair<uint32_t, uint32_t>, Foreign> narrower_;  // (domain, cta or kWholeCluster)
};

using SyncVariables = std::unordered_map<uint64_t, SyncVariable>;

// --- global memory -----------------------------------------------------------------------------

struct GlobalShadow::State {
  static constexpr uint64_t kPageBytes = 4096;
  using Page = std::array<Cell<GlobalEpoch>, kPageBytes / kGranule>;

  struct Range {
    uint64_t begin = 0, end = 0;
    Role role = Role::kInOut;
    std::vector<std::unique_ptr<Page>> pages;  // made when first touched
  };

  // Null where accesses need no shadow: inputs, and what is not registered.
  Range* find_tracked(uint64_t address);
  Cell<GlobalEpoch>& cell(Range& range, uint64_t granule);
  void end_launch();
  void compact_if_crowded();

  std::map<uint64_t, Range> ranges;
  Range* last_hit = nullptr;
  ShadowPools<GlobalEpoch> pools;
  SyncVariables sync;
  std::vector<std::shared_ptr<AgentTable>> domains{std::make_shared<AgentTable>()};
};

// Written by the host or by an earlier launch: before everything.
GlobalEpoch settled_epoch();

// --- one cluster -------------------------------------------------------------------------------

struct RegisterShadow {
  uint32_t defined = 0;   // lanes
  uint32_t touched = 0;   // wgmma.fence interval of the last access by other instructions
  uint32_t group = 0;     // wgmma group that used it last; 0: none
  uint32_t interval = 0;  // wgmma.fence interval of that use
  uint32_t shape = 0;     // of that wgmma
  uint32_t pc = 0;        // of that wgmma
  bool accumulator = false;
};

struct BulkLane {
  uint32_t lane = 0, read_agent = 0, write_agent = 0;
  uint32_t committed = 0;  // groups; operations of the open group have clock committed + 1
  uint32_t last_read = 0;  // clock of the last operation
  uint32_t last_reduction = 0, reduction_pc = 0;  // the same of the last reduction to global memory
  uint32_t last_pc = 0;
};

struct WarpShadow {
  uint32_t agent = 0;
  Clock clock;
  Foreign fence_release;  // what a release fence published, for relaxed stores after it
  Scope fence_scope = Scope::kWeak;
  Foreign fence_acquire;  // what relaxed loads saw, for an acquire fence after them
  std::vector<RegisterShadow> registers;
  uint32_t fence_interval = 0;  // number of wgmma.fence so far
  uint32_t wgmma_committed = 0, wgmma_waited = 0;
  uint32_t busy_until = 0;  // newest wgmma group that uses registers
  uint32_t cp_agent = 0, cp_committed = 0;
  std::vector<BulkLane> bulk;
  // The last bulk store: lanes that execute it together with equal operands store equal bytes.
  uint32_t store_pc = 0, store_lane = 0;
  std::vector<SharedRange> store_sources;
  std::vector<GlobalRange> store_destinations;
  uint32_t max_registers = 0;
  uint32_t lane_interval = 0;  // synchronisations of the lanes so far

  uint32_t now() const { return clock.order.get(agent); }
  void tick() { clock.order.raise(agent, now() + 1); }
};

struct MbarrierShadow {
  uint32_t offset = 0, agent = 0;
  bool live = false;
  Epoch init;
  bool fenced = false;           // initialisation made visible to the async proxy
  uint32_t fence_agent = 0;      // that did so,
  bool cluster_arrived = false;  // and went on to a cluster barrier,
  bool cluster_visible = false;  // which has completed
  uint32_t count = 0;
  int64_t pending = 0, tx = 0;
  uint32_t phase = 0;     // never goes back, not even when initialised again
  int64_t in_flight = 0;  // bytes of copies issued and not landed
  uint32_t last_load = 0, last_load_pc = 0, last_expect_pc = 0;
  std::vector<uint64_t> waiters;  // cta << 32 | warp whose last try_wait failed
  VectorClock users;
  Clock releasing, completed;
};

struct NamedBarrierShadow {
  Clock arrived;
  Foreign fence_release, fence_acquire;  // of the warps that have arrived
  Scope fence_scope = Scope::kWeak;
  bool active = false;
  uint32_t threads = 0, pc = 0;
  std::array<uint32_t, 32> lanes{};  // arrived, by warp
};

struct RemoteAccess {
  uint32_t clock = 0, pc = 0;
};

struct CtaShadow {
  explicit CtaShadow(uint32_t shared_bytes) : lane_marks(shared_bytes) {}

  std::vector<WarpShadow> warps;
  std::vector<Cell<Epoch>> cells;
  LaneMarks lane_marks;
  std::deque<MbarrierShadow> mbarriers;
  std::vector<uint16_t> mbarrier_at;      // by offset / 8: index + 1
  std::vector<uint8_t> barrier_granules;  // live mbarriers in each granule
  std::array<NamedBarrierShadow, 16> barriers;
  std::vector<uint32_t> wgmma_agents;
  std::vector<RemoteAccess> remote;  // by agent of other CTAs: last access to our shared memory
  bool exited = false;
};

// The 16-byte chunks of a wgmma operand, relative to its start; layouts repeat, starts differ.
class OperandChunks {
 public:
  // K-major A: row by row, so that each quarter belongs to one warp; MN-major A likewise.
  const std::vector<uint32_t>& find(uint64_t descriptor, bool mn_major, uint32_t extent, bool is_a);

 private:
  struct Entry {
    uint64_t pattern = 0;
    uint32_t shape = 0;  // 0: empty
    std::vector<uint32_t> relative;
  };
  std::array<Entry, 64> entries_;
  std::vector<uint32_t> absolute_;
};

struct ClusterChecks::State {
  LaunchChecks& launch;
  ClusterShape shape;
  GlobalShadow::State& global;
  uint32_t domain;
  std::shared_ptr<AgentTable> table;
  std::vector<CtaShadow> ctas;
  ShadowPools<Epoch> pools;
  SyncVariables shared_sync;
  Clock cluster_arrived, cluster_completed;
  OperandChunks a_chunks, b_chunks;

  State(LaunchChecks& launch, ClusterShape shape);

  WarpShadow& warp(const Where& at) { return ctas[at.cta].warps[at.warp]; }
  uint32_t new_agent(AgentKind kind, uint32_t cta, uint32_t number);
  BulkLane& bulk_lane(const Where& at);

  // Reports, with `other` appended to the message when it is not empty.
  void report(const char* kind, const Where& at, uint64_t address, std::string message);
  std::string describe(const Epoch& epoch) const;
  std::string describe(const GlobalEpoch& epoch) const;
  std::string place(uint32_t pc) const;

  // One operation on shared memory of CTA `target`, `clocks` being those of the issuer.
  struct SharedOperation {
    const Where& at;
    uint32_t target;
    const VectorClock& order;
    const VectorClock& proxy;
    Operation<Epoch> operation;
    const char* name;
  };
  template <class Walk>  // walk(visit), visit(granule, mask)
  void on_shared(const SharedOperation& what, Walk&& walk);
  struct GlobalOperation {
    const Where& at;
    Operation<Epoch> operation;
    const char* name;
  };
  template <class Walk>
  void on_global(const GlobalOperation& what, Walk&& walk);

  bool in_window(const Where& at, uint32_t target, uint64_t begin, uint32_t bytes);
  bool in_window(const Where& at, uint32_t target, const uint32_t* offsets, uint32_t bytes);
  void on_shared_ranges(const SharedOperation& what, std::span<const SharedRange> ranges);
  void on_global_ranges(const GlobalOperation& what, std::span<const GlobalRange> ranges);
  void on_shared_lanes(const SharedOperation& what, const uint32_t* offsets, uint32_t bytes);
  void on_global_lanes(const GlobalOperation& what, const uint64_t* addresses, uint32_t bytes);
  void on_shared_chunks(const SharedOperation& what, std::span<const uint32_t> chunks);

  void check_lanes(const Where& at, Access access, const uint32_t* offsets, uint32_t bytes);
  void touch_remote(const Where& at, uint32_t target);
  void synchronise(const Where& at, SyncVariables& variables, uint64_t key, Access access, Scope scope, Order order);
  Foreign snapshot(const Clock& clock) const;
  void absorb(Clock& clock, const Foreign& clocks) const;
  void compact_if_crowded();

  // The live mbarrier at an offset, its initialisation visible to the warp; null after a report.
  MbarrierShadow* mbarrier(const Where& at, uint32_t target, uint32_t offset, const char* operation);
  MbarrierShadow* find_mbarrier(uint32_t target, uint32_t offset);
  void check_unused(const Where& at, uint32_t target, MbarrierShadow& barrier, const char* operation);
  void end_phase(const Where& at, uint32_t target, MbarrierShadow& barrier);
  void arrive(const Where& at, uint32_t target, MbarrierShadow& barrier, uint32_t count, const Clock* release,
              bool completes);
  // The async agent of a barrier for a copy issued now, after its checks; 0 after a report.
  Epoch issue_load(const Where& at, uint32_t target, uint32_t offset, uint64_t bytes, MbarrierShadow*& barrier);
  bool use_register(const Where& at, WarpShadow& warp, uint32_t id, bool writes);
};

std::string hex(uint64_t value);

}  // namespace flash_ext::emulator
