// A stage for scripted event sequences: what the happens-before engine's unit tests share.
#pragma once

#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../src/checks.h"

namespace flash_ext::emulator {

inline constexpr uint32_t kAll = 0xffffffffu;
inline constexpr uint32_t kBuffer = 0x1000, kBarrier = 0x400, kEmpty = 0x408, kOther = 0x8000;
inline int failures = 0;

// A launch of one cluster, 12 warps per CTA, with short names for what warps do.
class Scene {
 public:
  explicit Scene(uint32_t num_ctas = 1, GlobalShadow* shared_shadow = nullptr)
      : shadow_(shared_shadow ? *shared_shadow : own_), launch_({"kernel", nullptr, nullptr}, shadow_) {
    ClusterShape shape;
    for (uint32_t i = 0; i < num_ctas; ++i) shape.ctas.push_back({i, 0, 0});
    shape.warps = 12;
    shape.shared_bytes = 0x10000;
    shape.registers = 64;
    shape.launch_registers = 168;
    shape_ = shape;
    cluster_ = std::make_unique<ClusterChecks>(launch_, shape);
  }

  ClusterChecks& c() { return *cluster_; }
  std::unique_ptr<ClusterChecks> another() { return std::make_unique<ClusterChecks>(launch_, shape_); }
  const std::vector<Fault>& faults() const { return launch_.faults(); }
  GlobalShadow& shadow() { return shadow_; }

  Where at(uint32_t warp, uint32_t cta = 0, uint32_t lanes = kAll) { return {cta, warp, lanes, ++pc_}; }
  Where lane0(uint32_t warp, uint32_t cta = 0) { return at(warp, cta, 1); }

  void shared(uint32_t warp, Access access, uint32_t base, uint32_t bytes = 4, uint32_t cta = 0, uint32_t target = 0,
              uint32_t lanes = kAll) {
    uint32_t offsets[32];
    for (uint32_t i = 0; i < 32; ++i) offsets[i] = base + i * bytes;
    c().shared_access(at(warp, cta, lanes), access, target, offsets, bytes);
  }
  void store(uint32_t warp, uint32_t base = kBuffer) { shared(warp, Access::kWrite, base); }
  void load(uint32_t warp, uint32_t base = kBuffer) { shared(warp, Access::kRead, base); }

  void global(ClusterChecks& cluster, uint32_t warp, Access access, uint64_t base, Scope scope = Scope::kWeak,
              Order order = Order::kRelaxed, uint32_t lanes = kAll) {
    uint64_t addresses[32];
    for (uint32_t i = 0; i < 32; ++i) addresses[i] = base + i * 4;
    cluster.global_access(at(warp, 0, lanes), access, addresses, 4, scope, order);
  }

  void sync(uint32_t warps, uint32_t id = 0) {
    for (uint32_t i = 0; i < 12; ++i)
      if (warps >> i & 1) c().barrier_arrive(at(i), id, 0);
    c().barrier_complete(0, id, warps);
  }

  // Barriers made by warp 0, fenced, and seen by all warps.
  void init_barriers(uint32_t count = 1, bool fence = true, bool barrier = true) {
    c().mbarrier_init(lane0(0), 0, kBarrier, 1);
    c().mbarrier_init(lane0(0), 0, kEmpty, count);
    if (fence) c().fence_mbarrier_init(lane0(0));
    if (barrier) sync(0xfff);
  }
  // Warp 0 expects and loads `bytes` into the buffer.
  void issue(uint32_t bytes = 4096, uint32_t to = kBuffer, uint32_t barrier = kBarrier) {
    c().mbarrier_arrive(lane0(0), 0, barrier, 1, bytes, true, false);
    tma(bytes, to, barrier);
  }
  void tma(uint32_t bytes = 4096, uint32_t to = kBuffer, uint32_t barrier = kBarrier) {
    const SharedRange range{to, bytes};
    c().async_load(lane0(0), 0, {&range, 1}, barrier, {});
  }
  void land(uint32_t bytes = 4096, uint32_t barrier = kBarrier) { c().mbarrier_complete_tx(0, barrier, bytes, true); }
  void wait(uint32_t warp, uint32_t barrier = kBarrier) { c().mbarrier_wait(at(warp), 0, barrier, true, true); }

  // wgmma of warps 4..7 (warpgroup 1) on a K-major tile at kBuffer, A in registers 0..3, D
  // in 8..39.
  void wgmma(bool reads_d = false, uint32_t shape = 1, bool commit = true) {
    const uint32_t a[] = {0, 1, 2, 3};
    uint32_t d[32];
    for (uint32_t i = 0; i < 32; ++i) d[i] = 8 + i;
    for (uint32_t warp = 4; warp < 8; ++warp) c().wgmma_registers(at(warp), a, d, reads_d, shape);
    WgmmaOp op;
    op.n = 64;
    op.a_in_registers = true;
    c().wgmma_shared(at(7), op, 0, tile(kBuffer));
    if (commit) this->commit();
  }
  void commit() {
    for (uint32_t warp = 4; warp < 8; ++warp) c().wgmma_commit(at(warp));
  }
  static uint64_t tile(uint32_t start) { return encode_descriptor({start, 16, 1024, 0, Swizzle::k128B}); }
  void fence_wgmma() {
    for (uint32_t warp = 4; warp < 8; ++warp) c().wgmma_fence(at(warp));
  }
  void wait_wgmma(uint32_t pending = 0) {
    for (uint32_t warp = 4; warp < 8; ++warp) c().wgmma_wait(at(warp), pending);
  }
  void define(uint32_t first, uint32_t count, uint32_t lanes = kAll) {
    for (uint32_t warp = 0; warp < 12; ++warp)
      for (uint32_t id = first; id < first + count; ++id) c().registers(at(warp, 0, lanes), {}, {&id, 1}, false);
  }
  void use(uint32_t warp, uint32_t id, bool sink = true) { c().registers(at(warp), {&id, 1}, {}, sink); }
  void set(uint32_t warp, uint32_t id) { c().registers(at(warp), {}, {&id, 1}, false); }
  void all_wait() {
    for (uint32_t warp = 4; warp < 8; ++warp) wait(warp);
  }

 private:
  GlobalShadow own_;
  GlobalShadow& shadow_;
  LaunchChecks launch_;
  ClusterShape shape_;
  std::unique_ptr<ClusterChecks> cluster_;
  uint32_t pc_ = 0;
};

using Script = std::function<void(Scene&)>;

// `kind` null: must be clean.
inline void run(const char* name, const char* kind, const Script& script, uint32_t num_ctas = 1) {
  Scene scene(num_ctas);
  script(scene);
  const auto& faults = scene.faults();
  const bool good = kind ? !faults.empty() && faults[0].kind == kind : faults.empty();
  if (good) return;
  ++failures;
  std::printf("FAILED %s: expected %s, found %s\n", name, kind ? kind : "nothing",
              faults.empty() ? "nothing" : (faults[0].kind + ": " + faults[0].message).c_str());
}

}  // namespace flash_ext::emulator
