// Happens-before checks: the interpreter tells what each warp does, the engine tells what is wrong.
//
// Agents of the vector clocks are the warps of a cluster (lanes of a warp count as ordered) and,
// for asynchronous work, one agent per mbarrier (loads), per issuing lane (bulk reads, bulk
// writes), per warp (cp.async) and per warpgroup (wgmma). Three clocks per warp: what it is ordered
// after, and of that, which generic writes the async proxy sees in shared and in global memory.
//
// Single-threaded: with checks on, all clusters of a launch run on one host thread.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "machine.h"
#include "tensor_core.h"

namespace flash_ext::emulator {

// Fault::kind of what the checks find.
namespace fault_kind {
inline constexpr char kSharedRace[] = "shared-race";
inline constexpr char kGlobalRace[] = "global-race";
inline constexpr char kIncompleteReduction[] = "incomplete-reduction";
inline constexpr char kUninitialisedShared[] = "uninitialised-shared";
inline constexpr char kUninitialisedGlobal[] = "uninitialised-global";
inline constexpr char kUninitialisedRegister[] = "uninitialised-register";
inline constexpr char kProxyFence[] = "missing-proxy-fence";
inline constexpr char kWgmmaRegister[] = "wgmma-register-in-flight";
inline constexpr char kWgmmaFence[] = "missing-wgmma-fence";
inline constexpr char kExpectTx[] = "expect-tx";
inline constexpr char kMbarrier[] = "mbarrier";
inline constexpr char kNamedBarrier[] = "named-barrier";
inline constexpr char kRegisterPool[] = "register-pool";
inline constexpr char kAsyncAtExit[] = "async-at-exit";
inline constexpr char kClusterExit[] = "cluster-exit";
}  // namespace fault_kind

enum class Access : uint8_t { kRead, kWrite, kReadWrite };  // kReadWrite: atom and red
// kWeak is plain ld/st; relaxed, acquire, release, volatile, atom and red are strong in a scope.
enum class Scope : uint8_t { kWeak, kCta, kCluster, kGpu };  // kGpu stands for .sys too
enum class Order : uint8_t { kRelaxed, kAcquire, kRelease, kAcqRel };
enum class ProxyFence : uint8_t { kAll, kShared, kGlobal };
enum class BulkWait : uint8_t { kRead, kFull };

// The instruction that executes. pc is the interpreter's instruction number (below 2^21) in the
// kernel.
struct Where {
  uint32_t cta = 0;   // rank in the cluster
  uint32_t warp = 0;  // in the CTA
  uint32_t lanes = 0xffffffffu;
  uint32_t pc = 0;
};

struct SharedRange {
  uint32_t offset, bytes;  // offset: shared::cta address in the window of its CTA
  bool operator==(const SharedRange&) const = default;
};
struct GlobalRange {
  uint64_t address;
  uint32_t bytes;
  bool operator==(const GlobalRange&) const = default;
};

// Where an instruction of the kernel stands, for people.
struct SourcePlace {
  std::string file;
  uint32_t line = 0, ptx_line = 0;
  std::string ptx;
};

// Shadow of the registered global memory; lives as long as the registrations, over several
// launches.
class GlobalShadow {
 public:
  GlobalShadow();
  ~GlobalShadow();
  void sync(const MemoryMap& memory);  // adds new ranges, forgets those that are gone
  void add(uint64_t base, uint64_t bytes, Role role);
  void remove(uint64_t base);
  void host_write(uint64_t address, uint64_t bytes);  // memcpy, memset: counts as written
  struct State;
  State& state() { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

struct LaunchInfo {
  std::string kernel;
  std::function<SourcePlace(uint32_t pc)> locate;
  std::function<std::string(uint32_t id)> register_name;
};

// Everything that is found in one launch. The interpreter stops a launch when failed() turns true.
class LaunchChecks {
 public:
  LaunchChecks(LaunchInfo info, GlobalShadow& global);
  ~LaunchChecks();  // end of the kernel: orders all its accesses before the next launch
  LaunchChecks(const LaunchChecks&) = delete;
  LaunchChecks& operator=(const LaunchChecks&) = delete;

  bool failed() const { return !faults_.empty(); }
  const std::vector<Fault>& faults() const { return faults_; }
  // Fills in the place of `pc`; keeps the first of each (kind, pc), at most 100.
  void report(Fault fault, uint32_t pc);

  SourcePlace locate(uint32_t pc) const { return info_.locate ? info_.locate(pc) : SourcePlace{}; }
  std::string register_name(uint32_t id) const;
  GlobalShadow::State& global() { return global_.state(); }

 private:
  LaunchInfo info_;
  GlobalShadow& global_;
  std::vector<Fault> faults_;
  std::vector<uint32_t> pcs_;
};

struct ClusterShape {
  std::vector<Dim3> ctas;         // blockIdx of each rank
  uint32_t warps = 0;             // per CTA
  uint32_t shared_bytes = 0;      // size of the shared window, reserved bytes included
  uint32_t registers = 0;         // virtual registers per warp, predicates included
  uint32_t launch_registers = 0;  // per thread at launch (.maxnreg or pool / threads); 0: unknown
};

// One running cluster (or one CTA). All hooks are called in the order in which the emulator
// executes.
class ClusterChecks {
 public:
  ClusterChecks(LaunchChecks& launch, ClusterShape shape);
  ~ClusterChecks();
  ClusterChecks(const ClusterChecks&) = delete;
  ClusterChecks& operator=(const ClusterChecks&) = delete;

  // --- registers -----------------------------------------------------------------------------
  // One id per virtual register, predicates included. Undefined values propagate silently through
  // arithmetic and are reported where they matter.
  // Each executed instruction except wgmma.mma_async, before it executes. `sink`: the values decide
  // something outside registers (address, guard or branch predicate, stored value, shuffle source).
  // A guard predicate is passed by its own call with no destinations and sink = true.
  void registers(const Where& at, std::span<const uint32_t> reads, std::span<const uint32_t> writes, bool sink);
  // selp-like: lanes in `first` take a, others b.
  void select_register(const Where& at, uint32_t destination, uint32_t a, uint32_t b, uint32_t first);

  // --- generic proxy -------------------------------------------------------------------------
  // offsets[lane] in the window of CTA `target`, `bytes` per lane (vector width included; 16 per
  // address for ldmatrix and stmatrix). Lanes that address several CTAs: one call per CTA.
  void shared_access(const Where& at, Access access, uint32_t target, const uint32_t* offsets, uint32_t bytes,
                     Scope scope = Scope::kWeak, Order order = Order::kRelaxed);
  void global_access(const Where& at, Access access, const uint64_t* addresses, uint32_t bytes,
                     Scope scope = Scope::kWeak, Order order = Order::kRelaxed);

  // --- fences and barriers -------------------------------------------------------------------
  void fence(const Where& at, Scope scope);  // fence.acq_rel/.sc, membar
  void fence_proxy_async(const Where& at, ProxyFence space);
  void fence_mbarrier_init(const Where& at);
  void warp_sync(const Where& at);  // bar.warp.sync
  // Named barrier: each arrival (sync or arrive) with the expected number of threads (0: all),
  // then, when it completes, the mask of warps that were waiting.
  void barrier_arrive(const Where& at, uint32_t id, uint32_t threads);
  void barrier_complete(uint32_t cta, uint32_t id, uint32_t waiting_warps);
  void cluster_arrive(const Where& at, bool release);
  void cluster_complete();
  void cluster_wait(const Where& at, bool acquire);  // when the wait succeeds

  // --- mbarriers (target: CTA rank that holds it). `completes`: this operation ended the phase
  // -----
  void mbarrier_init(const Where& at, uint32_t target, uint32_t offset, uint32_t count);
  void mbarrier_inval(const Where& at, uint32_t target, uint32_t offset);
  // arrive and arrive.expect_tx (expect_bytes > 0); count = arrivals of the whole warp instruction.
  void mbarrier_arrive(const Where& at, uint32_t target, uint32_t offset, uint32_t count, uint32_t expect_bytes,
                       bool release, bool completes);
  void mbarrier_expect_tx(const Where& at, uint32_t target, uint32_t offset, uint32_t bytes, bool completes);
  // complete_tx when an asynchronous copy lands.
  void mbarrier_complete_tx(uint32_t target, uint32_t offset, uint32_t bytes, bool completes);
  // test_wait and try_wait with their result.
  void mbarrier_wait(const Where& at, uint32_t target, uint32_t offset, bool success, bool acquire);

  // --- cp.async ------------------------------------------------------------------------------
  // bytes: destination bytes (zero fill included); source lanes of `sources` read source_bytes
  // each.
  void cp_async(const Where& at, const uint32_t* offsets, uint32_t bytes, const uint64_t* sources,
                uint32_t source_bytes);
  void cp_async_commit(const Where& at);
  void cp_async_wait(const Where& at, uint32_t pending);  // wait_group N
  void cp_async_wait_all(const Where& at);
  void cp_async_mbarrier_arrive(const Where& at, uint32_t target, uint32_t offset, bool noinc, bool completes);

  // --- TMA and bulk copies, at issue -----------------------------------------------------------
  // Load into shared memory of CTA `target`, signalling the mbarrier there; multicast: one call per
  // destination. `sources`: the in-bounds part only.
  void async_load(const Where& at, uint32_t target, std::span<const SharedRange> destinations, uint32_t mbarrier,
                  std::span<const GlobalRange> sources);
  // shared::cta -> shared::cluster, signalling the destination's mbarrier.
  void async_copy(const Where& at, SharedRange source, uint32_t target, SharedRange destination, uint32_t mbarrier);
  // Store or reduction to global memory; `sources`: only bytes that are really read (in-bounds
  // part).
  void bulk_store(const Where& at, std::span<const SharedRange> sources, std::span<const GlobalRange> destinations,
                  bool reduce);
  void bulk_commit(const Where& at);
  void bulk_wait(const Where& at, uint32_t pending, BulkWait kind);

  // --- wgmma -----------------------------------------------------------------------------------
  void wgmma_fence(const Where& at);
  // Per warp at issue. `shape`: any number equal for equal shape and types. reads_d: scale-d != 0.
  void wgmma_registers(const Where& at, std::span<const uint32_t> a, std::span<const uint32_t> d, bool reads_d,
                       uint32_t shape);
  // Once per warpgroup, when its last warp issues, after wgmma_registers of all four. a_desc is
  // ignored when A is in registers.
  void wgmma_shared(const Where& at, const WgmmaOp& op, uint64_t a_desc, uint64_t b_desc);
  void wgmma_commit(const Where& at);
  void wgmma_wait(const Where& at, uint32_t pending);

  // --- rest ------------------------------------------------------------------------------------
  void set_max_registers(const Where& at, uint32_t count, bool increase);  // when it takes effect
  void cta_exit(uint32_t cta);                                             // all its warps have exited
  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace flash_ext::emulator
