// Running state: warps with their diverged paths, CTAs, clusters, and the work in flight.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "program.h"
#include "shared_view.h"
#include "tensor_core.h"
#include "tma.h"

namespace flash_ext::emulator {

// Generic addresses: the high byte names the window, everything else is a host pointer.
constexpr uint64_t kSharedWindow = uint64_t(1) << 56;
constexpr uint64_t kLocalWindow = uint64_t(2) << 56;
constexpr uint64_t kWindowMask = uint64_t(0xff) << 56;
// 32-bit shared::cluster addresses: (rank + 1) << 24 | offset; 0 in the high byte is the own CTA.
constexpr uint32_t kRankShift = 24;
constexpr uint32_t kSharedOffsetMask = (1u << kRankShift) - 1;

constexpr uint64_t kNever = UINT64_MAX;

struct Cta;
struct Cluster;
struct LaunchContext;

// What a blocked path waits for, for the deadlock report and for retries.
struct Wait {
  enum Kind : uint8_t { kNone, kBarrier, kMbarrier, kCluster, kGather, kWgmma, kBulk, kRegisters };
  Kind kind = kNone;
  bool forced_timeout = false;  // try_wait: return false now
  uint32_t id = 0;              // barrier number, or shared address
  uint32_t rank = 0;
  uint64_t generation = 0;  // at which the wait began
  uint32_t parity = 0;
  uint32_t tries = 0;
};

// Lanes of a warp that run together.
struct Path {
  uint32_t pc = 0;
  Mask mask = 0;
  uint32_t stop = UINT32_MAX;  // where it meets the other paths of its join
  int32_t join = -1;
  Wait wait;
};

// Where diverged paths come together again.
struct Join {
  uint32_t pc = 0, stop = UINT32_MAX;
  int32_t parent = -1;
  uint32_t pending = 0;  // paths and joins still on their way
  Mask mask = 0;         // lanes that have arrived
};

// Bulk copies of one thread since its last commit_group, or of one committed group.
struct BulkGroup {
  uint32_t reads_pending = 0, writes_pending = 0;
};

struct LaneBulk {
  std::shared_ptr<BulkGroup> open = std::make_shared<BulkGroup>();
  std::deque<std::shared_ptr<BulkGroup>> committed;
};

// One cp.async of a warp; lanes complete one by one with the group they are in.
struct CpAsync {
  uint64_t sequence = 0;
  uint32_t pc = 0;
  Mask mask = 0;  // lanes not yet done
  uint32_t bytes = 0;
  uint64_t due = kNever;
  std::array<uint8_t*, kLanes> to;
  std::array<const uint8_t*, kLanes> from;
  std::array<uint32_t, kLanes> source_bytes;
  std::array<uint32_t, kLanes> group;
};

// cp.async.mbarrier.arrive: fires when the lane's earlier cp.async are done.
struct CpAsyncArrive {
  uint64_t sequence = 0;
  uint32_t pc = 0;
  Mask mask = 0;
  bool noinc = false;
  std::array<uint32_t, kLanes> address;
};

// A range of global memory, as accesses are checked against it.
struct GlobalRangeEntry {
  uint64_t begin, end;
  bool writable;
  const MemoryRange* range;  // null for module variables and parameters
};

// Memory figures of one instruction.
struct LineTraffic {
  uint64_t shared_requests = 0, shared_wavefronts = 0;
  uint64_t global_requests = 0, global_sectors = 0;
};

struct Warp {
  uint8_t* base[2];      // frame, constants
  uint32_t pc = 0;       // of the instruction that executes
  uint32_t index = 0;    // in the CTA
  Path* path = nullptr;  // that executes
  Cta* cta = nullptr;
  Cluster* cluster = nullptr;
  LaunchContext* launch = nullptr;
  ClusterChecks* checks = nullptr;  // null: off
  uint64_t* counts = nullptr;       // per pc
  const Inst* code = nullptr;

  std::vector<Path> paths;
  std::vector<Join> joins;
  uint32_t current = 0;  // index into paths
  Mask live = kFullMask;
  bool done = false;
  uint64_t starved_until = 0;
  uint64_t executed = 0;

  Mask carry = 0;              // of add.cc and its kind
  uint32_t max_registers = 0;  // setmaxnreg
  uint64_t cluster_phase = 0;  // of barrier.cluster
  bool cluster_has_arrived = false;
  std::array<std::unique_ptr<LaneBulk>, kLanes> bulk;
  std::deque<CpAsync> cp_async;
  std::deque<CpAsyncArrive> cp_async_arrivals;
  std::array<uint32_t, kLanes> cp_async_group{};  // committed groups per lane
  uint64_t cp_async_sequence = 0;

  // wgmma: how many this warp has issued, and the count at each commit.
  uint64_t wgmma_issued = 0;
  std::deque<uint64_t> wgmma_groups;
  const GlobalRangeEntry* last_range = nullptr;  // the range of the last global access
  LineTraffic* traffic = nullptr;                // per pc; null: not counted
  uint64_t* copied = nullptr;                    // bytes of bulk copies per pc
  std::vector<uint8_t> local;                    // local_bytes per lane
  std::vector<uint8_t> call_parameters;          // .param of call sequences, per lane

  Where where(Mask lanes) const;
};

// One wgmma of a warpgroup. It starts when all four warps have issued it.
struct WgmmaIssue {
  const Inst* inst = nullptr;
  uint32_t pc = 0;
  uint32_t issued = 0;  // warps, one bit each
  uint64_t a_desc = 0, b_desc = 0;
  bool scale_d = true;
  uint64_t due = kNever;
};

struct Warpgroup {
  std::deque<WgmmaIssue> queue;
  uint64_t executed = 0;  // wgmmas that have taken effect; queue.front() is number `executed`
};

struct NamedBarrier {
  uint32_t expected = 0;  // threads; 0: nobody has arrived
  uint32_t arrived = 0;
  uint64_t arrived_warps = 0, waiting_warps = 0;
  bool whole_cta = false;
  uint64_t generation = 0;
  uint32_t reduce_and = 1, reduce_or = 0, reduce_count = 0;  // of the generation being collected
  uint32_t result_and = 0, result_or = 0, result_count = 0;  // of the last complete one
};

struct Mbarrier {
  bool valid = false;
  uint32_t address = 0;
  uint32_t count = 0;
  int64_t pending = 0;
  int64_t tx = 0;
  uint64_t phase = 0;  // completed phases
};

struct Cta {
  Dim3 index;
  uint32_t rank = 0;
  Cluster* cluster = nullptr;
  LaunchContext* launch = nullptr;
  std::vector<uint8_t> shared_storage;
  uint8_t* shared = nullptr;  // address 0 of the window
  uint32_t shared_bytes = 0;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::array<NamedBarrier, 16> barriers;
  std::vector<Mbarrier> mbarriers;
  std::vector<uint16_t> mbarrier_index;  // by address / 8; 0: none
  uint32_t warps_left = 0;
  int64_t registers_free = 0;  // setmaxnreg pool, per CTA
  std::vector<uint8_t> frames;
  SharedView view() const { return {shared, shared_bytes}; }
};

// A TMA or bulk copy between its issue and its last effect.
struct BulkCopy {
  enum Kind : uint8_t { kLoad, kStore, kReduce, kSharedToShared };
  Kind kind = kLoad;
  uint32_t pc = 0;
  bool tiled = false;
  bool read_done = false;
  TensorMap map{};
  std::array<int32_t, kMaxTmaRank> coords{};
  TmaType type = TmaType::kU8;  // untiled reductions
  ReduceOp op = ReduceOp::kAdd;
  Cta* cta = nullptr;  // issuer; the source of stores
  uint32_t warp = 0;
  uint32_t shared_address = 0;  // offset, in every CTA of `targets`
  uint32_t targets = 0;         // ranks, for loads
  uint32_t source_address = 0;  // kSharedToShared: in the issuer
  uint64_t global = 0;
  uint32_t bytes = 0;
  uint32_t mbarrier = 0;  // offset
  std::shared_ptr<BulkGroup> group;
  std::vector<uint8_t> staged;
  uint64_t read_due = 0, write_due = 0;
};

struct Cluster {
  LaunchContext* launch = nullptr;
  uint64_t id = 0;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::unique_ptr<ClusterChecks> checks;
  std::deque<std::unique_ptr<BulkCopy>> copies;
  std::mt19937_64 random;
  uint64_t round = 0;
  uint32_t ctas_left = 0;
  uint32_t wgmmas_due = 0;  // queued wgmmas that have a due round
  uint32_t cp_async_due = 0;
  // barrier.cluster, counted in warps
  uint32_t cluster_arrived = 0;
  uint64_t cluster_generation = 0;
  std::vector<std::pair<Cta*, uint32_t>> order;  // scratch of the scheduler
  uint64_t effects = 0;                          // stores, arrivals, copies, exits: what others could be waiting for
  uint64_t polled = 0;                           // instructions, in whole turns, since the last of them
};

struct LaunchContext {
  const Program* program = nullptr;
  std::string kernel;
  Launch launch;
  Options options;
  const MemoryMap* memory = nullptr;
  std::vector<GlobalRangeEntry> ranges;
  uint8_t* params = nullptr;  // 64-byte aligned
  uint8_t* constants = nullptr;
  uint32_t launch_registers = 0;  // per thread
  uint32_t warps_per_cta = 0, threads_per_cta = 0;
  uint32_t shared_bytes = 0;  // of the window
  uint32_t cluster_size = 1;
  Dim3 grid_in_clusters;
  std::unique_ptr<LaunchChecks> checks;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> next_cluster{0};
  std::atomic<uint64_t> executed{0};
  std::atomic<uint64_t> idle{0};  // instructions since anything had an effect
  std::mutex mutex;               // printed, stats
  std::string printed;
  bool hostile() const { return options.adversarial; }
};

template <class T>
inline T* at(Warp& w, Ref ref) {
  return reinterpret_cast<T*>(w.base[ref >> 31] + (ref & kOffsetMask));
}
template <class T>
inline const T* in(const Warp& w, Ref ref) {
  return reinterpret_cast<const T*>(w.base[ref >> 31] + (ref & kOffsetMask));
}
inline Mask read_predicate(const Warp& w, Ref ref) {
  const Mask value = *in<Mask>(w, ref);
  return ref & kNegateBit ? ~value : value;
}
inline void write_predicate(Warp& w, Ref ref, Mask mask, Mask value) {
  Mask* p = at<Mask>(w, ref);
  *p = (*p & ~mask) | (value & mask);
}
// dst[l] = tmp[l] for the lanes of mask.
template <class S>
inline void store_lanes(S* __restrict dst, const S* __restrict tmp, Mask mask) {
  if (mask == kFullMask) {
    for (int l = 0; l < kLanes; ++l) dst[l] = tmp[l];
  } else {
    for (int l = 0; l < kLanes; ++l) dst[l] = (mask >> l) & 1 ? tmp[l] : dst[l];
  }
}
inline int first_lane(Mask mask) { return __builtin_ctz(mask); }

// Stops the launch with a Diagnostic for the instruction that executes.
[[noreturn]] void fault(const Warp& w, Mask lanes, const char* kind, const std::string& message, uint64_t address = 0);
[[noreturn]] void fault_at(const LaunchContext& launch, uint32_t pc, const Cta* cta, uint32_t warp, Mask lanes,
                           const char* kind, const std::string& message, uint64_t address = 0);

// ---- memory (memory.cpp) ----

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst, kCallParam };

struct Lookup {
  std::array<uint8_t*, kLanes> data;  // of active lanes
};

// Host pointers for the addresses of the active lanes, checked: bounds, alignment, roles, races.
void resolve(Warp& w, Mask mask, Space space, const uint64_t* addresses, uint32_t bytes, Access access, Scope scope,
             Order order, Lookup& out);
// A 32-bit shared::cluster address to its CTA; faults when the CTA does not exist or has exited.
Cta& cluster_cta(Warp& w, Mask lanes, uint32_t address);
// Host range check for copies.
void check_global(Warp& w, Mask lanes, uint64_t address, uint64_t bytes, bool write);
void check_shared(Warp& w, Mask lanes, const Cta& cta, uint32_t offset, uint64_t bytes);

// ---- asynchronous work (async.cpp) ----

// Rounds from now until an effect of asynchronous work, as the mode says; kNever: when forced.
uint64_t pick_delay(Cluster& cluster);
void start_copy(Warp& w, std::unique_ptr<BulkCopy> copy);
// Whatever is due; true if something happened.
bool run_due(Cluster& cluster);
// Lets one piece of work happen that nobody can wait for any longer; false: there is none.
bool force_one(Cluster& cluster);
bool run_wgmma(Cta& cta, uint32_t warpgroup, uint64_t up_to);
void issue_cp_async(Warp& w, CpAsync op);
void issue_cp_async_arrive(Warp& w, CpAsyncArrive arrival);
void run_cp_async(Warp& w, Mask lanes, uint32_t keep_groups, bool all);

// ---- mbarriers (mbarrier.cpp) ----

Mbarrier* find_mbarrier(Cta& cta, uint32_t offset);  // null if there is none
Mbarrier& need_mbarrier(Warp& w, Mask lanes, Cta& cta, uint32_t offset);
// One arrival of one lane; returns whether the phase ended.
bool arrive(Warp& w, Mask lane, Mbarrier& barrier, uint32_t count);
// The end of a copy of `bytes` that the instruction at `pc` issued.
void complete_tx(Cta& issuer, uint32_t warp, uint32_t pc, Cta& cta, uint32_t offset, uint32_t bytes);

// ---- scheduling (scheduler.cpp) ----

void warp_exited(Warp& w);
void branch_to(Warp& w, const Inst& inst, Mask taken, uint32_t target);
void exit_lanes(Warp& w, Mask mask);
// Runs until the cluster ends (true) or about `budget` instructions have executed.
bool run_cluster(Cluster& cluster, uint64_t budget);
std::string describe_wait(const Warp& w, const Path& path);

}  // namespace flash_ext::emulator
