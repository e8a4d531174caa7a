// Races, initialisation, fences, barriers and clusters: each rule once broken, once kept.
#include "checks_scene.h"

using namespace flash_ext::emulator;

namespace {

void shared_memory() {
  run("store, barrier, load", nullptr, [](Scene& s) {
    s.store(0);
    s.sync(3);
    s.load(1);
  });
  run("store, load", fault_kind::kSharedRace, [](Scene& s) {
    s.store(0);
    s.load(1);
  });
  run("own store, own load", nullptr, [](Scene& s) {
    s.store(0);
    s.load(0);
  });
  run("two stores", fault_kind::kSharedRace, [](Scene& s) {
    s.store(0);
    s.store(1);
  });
  run("load, then store of another", fault_kind::kSharedRace, [](Scene& s) {
    s.store(0);
    s.sync(3);
    s.load(0);
    s.store(1);
  });
  run("two loads", nullptr, [](Scene& s) {
    s.store(0);
    s.sync(3);
    s.load(0);
    s.load(1);
  });
  run("third of three readers is not waited for", fault_kind::kSharedRace, [](Scene& s) {
    s.store(0);
    s.sync(0xf);
    s.load(1);
    s.load(2);
    s.load(3);
    s.sync(0x7);
    s.store(0);
  });
  run("all readers are waited for", nullptr, [](Scene& s) {
    s.store(0);
    s.sync(0xf);
    s.load(1);
    s.load(2);
    s.load(3);
    s.sync(0xf);
    s.store(0);
  });
  run("bytes side by side", nullptr, [](Scene& s) {
    s.shared(0, Access::kWrite, kBuffer, 2, 0, 0, 0x55555555u);
    s.shared(1, Access::kWrite, kBuffer, 2, 0, 0, 0xaaaaaaaau);
    s.sync(3);
    s.shared(1, Access::kRead, kBuffer, 2);
  });
  run("one byte in common", fault_kind::kSharedRace, [](Scene& s) {
    s.shared(0, Access::kWrite, kBuffer, 1, 0, 0, 0xff);
    s.shared(1, Access::kWrite, kBuffer, 1, 0, 0, 0x80);
  });
  run("split cells join again", nullptr, [](Scene& s) {
    s.shared(0, Access::kWrite, kBuffer, 1, 0, 0, 0x7);
    s.sync(3);
    s.store(1);
    s.sync(3);
    s.load(0);
    s.load(1);
  });
  run("never written", fault_kind::kUninitialisedShared, [](Scene& s) { s.load(0); });
  run("partly written", fault_kind::kUninitialisedShared, [](Scene& s) {
    s.shared(0, Access::kWrite, kBuffer, 4, 0, 0, 0x7fffffff);
    s.load(0);
  });
  run("barrier of other warps", fault_kind::kSharedRace, [](Scene& s) {
    s.store(0);
    s.sync(6);
    s.load(1);
  });
  run("chain of barriers", nullptr, [](Scene& s) {
    s.store(0);
    s.sync(3, 1);
    s.sync(6, 2);
    s.load(2);
  });
  run("bar.arrive gives, only sync takes", fault_kind::kSharedRace, [](Scene& s) {
    s.store(1);
    s.c().barrier_arrive(s.at(0), 1, 64);
    s.c().barrier_arrive(s.at(1), 1, 64);
    s.c().barrier_complete(0, 1, 2);
    s.load(0);
  });
  run("atomics", nullptr, [](Scene& s) {
    uint32_t offsets[32] = {kBuffer};
    s.store(0);
    s.sync(3);
    s.c().shared_access(s.lane0(0), Access::kReadWrite, 0, offsets, 4, Scope::kCta);
    s.c().shared_access(s.lane0(1), Access::kReadWrite, 0, offsets, 4, Scope::kCta);
  });
  run("atomic and plain load", fault_kind::kSharedRace, [](Scene& s) {
    uint32_t offsets[32] = {kBuffer};
    s.store(0);
    s.sync(3);
    s.c().shared_access(s.lane0(0), Access::kReadWrite, 0, offsets, 4, Scope::kCta);
    s.load(1);
  });
  run("release and acquire in shared memory", nullptr, [](Scene& s) {
    uint32_t flag[32] = {kOther};
    s.c().shared_access(s.lane0(0), Access::kWrite, 0, flag, 4, Scope::kCta);
    s.store(0);
    s.c().shared_access(s.lane0(0), Access::kWrite, 0, flag, 4, Scope::kCta, Order::kRelease);
    s.c().shared_access(s.lane0(1), Access::kRead, 0, flag, 4, Scope::kCta, Order::kAcquire);
    s.load(1);
  });
  run("outside the window", "out-of-bounds", [](Scene& s) { s.store(0, 0x10000); });
}

void lanes_of_a_warp() {
  const auto turned = [](Scene& s, Access access) {  // lane i at the place of lane i + 1
    uint32_t offsets[32];
    for (uint32_t i = 0; i < 32; ++i) offsets[i] = kBuffer + (i + 1) % 32 * 4;
    s.c().shared_access(s.at(0), access, 0, offsets, 4);
  };
  run("lane reads what its neighbour wrote", fault_kind::kSharedRace, [=](Scene& s) {
    s.store(0);
    turned(s, Access::kRead);
  });
  run("the same after bar.warp.sync", nullptr, [=](Scene& s) {
    s.store(0);
    s.c().warp_sync(s.at(0));
    turned(s, Access::kRead);
  });
  run("the same after a barrier of the CTA", nullptr, [=](Scene& s) {
    s.store(0);
    s.sync(3);
    turned(s, Access::kRead);
  });
  run("lane overwrites what its neighbour read", fault_kind::kSharedRace, [=](Scene& s) {
    s.store(0);
    s.c().warp_sync(s.at(0));
    s.load(0);
    turned(s, Access::kWrite);
  });
  run("the same after bar.warp.sync, read", nullptr, [=](Scene& s) {
    s.store(0);
    s.c().warp_sync(s.at(0));
    s.load(0);
    s.c().warp_sync(s.at(0));
    turned(s, Access::kWrite);
  });
  run("another warp's synchronisation does not help", fault_kind::kSharedRace, [=](Scene& s) {
    s.store(0);
    s.c().warp_sync(s.at(1));
    turned(s, Access::kRead);
  });
  run("all lanes write and read one word", nullptr, [=](Scene& s) {
    uint32_t offsets[32];
    for (uint32_t& offset : offsets) offset = kBuffer;
    s.c().shared_access(s.at(0), Access::kWrite, 0, offsets, 4);
    s.c().warp_sync(s.at(0));
    s.c().shared_access(s.at(0), Access::kRead, 0, offsets, 4);
  });
}

void global_memory() {
  static float memory[4096];
  const uint64_t base = reinterpret_cast<uint64_t>(memory), flag = base + 8192;
  const auto work = [=](Scene& s) { s.shadow().add(base, sizeof memory, Role::kWorkspace); };
  const auto zeroed = [=](Scene& s) {
    work(s);
    s.shadow().host_write(flag, 64);
  };

  run("write, read by another cluster", fault_kind::kGlobalRace, [=](Scene& s) {
    work(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.global(*other, 0, Access::kRead, base);
  });
  run("release.gpu, acquire.gpu", nullptr, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelease, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*other, 0, Access::kRead, base);
  });
  run("release.cta does not reach another CTA", fault_kind::kGlobalRace, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kCta, Order::kRelease, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*other, 0, Access::kRead, base);
  });
  run("relaxed atomics do not publish", fault_kind::kGlobalRace, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*other, 0, Access::kRead, base);
  });
  run("fences around relaxed operations", nullptr, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 1, Access::kWrite, base);
    s.sync(3);
    s.c().fence(s.at(0), Scope::kGpu);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kRelaxed, 1);
    other->fence(s.at(0), Scope::kGpu);
    s.global(*other, 0, Access::kRead, base);
  });
  run("fences by every warp, on the other sides of the barriers", nullptr, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 1, Access::kWrite, base);
    s.c().fence(s.at(0), Scope::kGpu);
    s.c().fence(s.at(1), Scope::kGpu);
    s.sync(3);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kRelaxed, 1);
    for (uint32_t warp = 0; warp < 2; ++warp) other->barrier_arrive(s.at(warp), 0, 0);
    other->barrier_complete(0, 0, 3);
    other->fence(s.at(1), Scope::kGpu);
    s.global(*other, 1, Access::kRead, base);
  });
  run("barriers but no fences", fault_kind::kGlobalRace, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 1, Access::kWrite, base);
    s.sync(3);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*other, 0, Access::kRead, base);
  });
  run("fence of CTA scope", fault_kind::kGlobalRace, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.c().fence(s.at(0), Scope::kCta);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*other, 0, Access::kRead, base);
  });
  run("no fence after the relaxed load", fault_kind::kGlobalRace, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.c().fence(s.at(0), Scope::kGpu);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kRead, base);
  });
  run("atomics of many clusters", nullptr, [=](Scene& s) {
    zeroed(s);
    auto b = s.another();
    auto c = s.another();
    for (ClusterChecks* each : {&s.c(), b.get(), c.get()})
      s.global(*each, 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelaxed, 1);
  });
  run("atomics of CTA scope in two CTAs", fault_kind::kGlobalRace, [=](Scene& s) {
    zeroed(s);
    auto other = s.another();
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kCta, Order::kRelaxed, 1);
    s.global(*other, 0, Access::kReadWrite, flag, Scope::kCta, Order::kRelaxed, 1);
  });
  run("chain of three clusters", nullptr, [=](Scene& s) {
    zeroed(s);
    auto b = s.another();
    auto c = s.another();
    s.global(s.c(), 0, Access::kWrite, base);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kAcqRel, 1);
    s.global(*b, 0, Access::kReadWrite, flag, Scope::kGpu, Order::kAcqRel, 1);
    s.global(*c, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*c, 0, Access::kWrite, base);
  });
  run("workspace never written", fault_kind::kUninitialisedGlobal, [=](Scene& s) {
    work(s);
    s.global(s.c(), 0, Access::kRead, base);
  });
  run("atomic on workspace never written", fault_kind::kUninitialisedGlobal, [=](Scene& s) {
    work(s);
    s.global(s.c(), 0, Access::kReadWrite, base, Scope::kGpu);
  });
  run("part of the workspace written by the host", fault_kind::kUninitialisedGlobal, [=](Scene& s) {
    work(s);
    s.shadow().host_write(base, 126);
    s.global(s.c(), 0, Access::kRead, base);
  });
  run("inout and in need no writer", nullptr, [=](Scene& s) {
    s.shadow().add(base, 8192, Role::kInOut);
    s.shadow().add(base + 8192, 8192, Role::kIn);
    s.global(s.c(), 0, Access::kRead, base);
    s.global(s.c(), 0, Access::kRead, base + 8192);
  });
  run("within a CTA", fault_kind::kGlobalRace, [=](Scene& s) {
    work(s);
    s.global(s.c(), 0, Access::kWrite, base);
    s.global(s.c(), 1, Access::kRead, base);
  });
  run("within a CTA, with a barrier", nullptr, [=](Scene& s) {
    work(s);
    s.global(s.c(), 0, Access::kWrite, base);
    s.sync(3);
    s.global(s.c(), 1, Access::kRead, base);
  });

  GlobalShadow kept;  // two launches in a row
  kept.add(base, sizeof memory, Role::kWorkspace);
  {
    Scene first(1, &kept);
    first.global(first.c(), 0, Access::kWrite, base + 4);
  }
  Scene second(1, &kept);
  second.global(second.c(), 3, Access::kRead, base + 4);
  if (!second.faults().empty())
    ++failures, std::printf("FAILED kernels in a row: %s\n", second.faults()[0].message.c_str());
  second.global(second.c(), 3, Access::kRead, base, Scope::kWeak, Order::kRelaxed, 1);
  if (second.faults().empty()) ++failures, std::printf("FAILED: first 4 bytes were never written\n");
}

void registers() {
  run("undefined register used", fault_kind::kUninitialisedRegister, [](Scene& s) { s.use(0, 1); });
  run("undefined register moved about", nullptr, [](Scene& s) {
    const uint32_t from = 1, to = 2;
    s.c().registers(s.at(0), {&from, 1}, {&to, 1}, false);
    s.use(0, 2, false);
  });
  run("undefined register moved, then used", fault_kind::kUninitialisedRegister, [](Scene& s) {
    const uint32_t from = 1, to = 2;
    s.c().registers(s.at(0), {&from, 1}, {&to, 1}, false);
    s.use(0, 2);
  });
  run("defined in half of the lanes", fault_kind::kUninitialisedRegister, [](Scene& s) {
    s.define(1, 1, 0xffff);
    s.use(0, 1);
  });
  run("the defined half is used", nullptr, [](Scene& s) {
    const uint32_t id = 1;
    s.define(1, 1, 0xffff);
    s.c().registers(s.at(0, 0, 0xffff), {&id, 1}, {}, true);
  });
  run("select of the defined source", nullptr, [](Scene& s) {
    s.set(0, 1);
    s.c().select_register(s.at(0), 3, 1, 2, kAll);
    s.use(0, 3);
  });
  run("select of the undefined source", fault_kind::kUninitialisedRegister, [](Scene& s) {
    s.set(0, 1);
    s.c().select_register(s.at(0), 3, 1, 2, 1);
    s.use(0, 3);
  });
  run("setmaxnreg", nullptr, [](Scene& s) {
    for (uint32_t warp = 0; warp < 4; ++warp) s.c().set_max_registers(s.at(warp), 24, false);
    for (uint32_t warp = 4; warp < 12; ++warp) s.c().set_max_registers(s.at(warp), 240, true);
  });
  run("setmaxnreg beyond the file", fault_kind::kRegisterPool, [](Scene& s) {
    for (uint32_t warp = 4; warp < 12; ++warp) s.c().set_max_registers(s.at(warp), 240, true);
  });
  run("setmaxnreg.dec that raises", fault_kind::kRegisterPool,
      [](Scene& s) { s.c().set_max_registers(s.at(0), 240, false); });
}

void barriers_and_clusters() {
  run("named barrier with two counts", fault_kind::kNamedBarrier, [](Scene& s) {
    s.c().barrier_arrive(s.at(0), 1, 64);
    s.c().barrier_arrive(s.at(1), 1, 128);
  });
  run("named barrier, another count in its next round", nullptr, [](Scene& s) {
    s.c().barrier_arrive(s.at(0), 1, 64);
    s.c().barrier_arrive(s.at(1), 1, 64);
    s.c().barrier_complete(0, 1, 3);
    s.c().barrier_arrive(s.at(0), 1, 128);
  });
  run("arrives twice", fault_kind::kNamedBarrier, [](Scene& s) {
    s.c().barrier_arrive(s.at(0), 1, 128);
    s.c().barrier_arrive(s.at(0), 1, 128);
  });

  const auto cluster_sync = [](Scene& s, bool release = true, bool acquire = true) {
    for (uint32_t cta = 0; cta < 2; ++cta)
      for (uint32_t warp = 0; warp < 12; ++warp) s.c().cluster_arrive(s.at(warp, cta), release);
    s.c().cluster_complete();
    for (uint32_t cta = 0; cta < 2; ++cta)
      for (uint32_t warp = 0; warp < 12; ++warp) s.c().cluster_wait(s.at(warp, cta), acquire);
  };
  run(
      "remote write, cluster barrier, read", nullptr,
      [=](Scene& s) {
        s.shared(0, Access::kWrite, kBuffer, 4, 0, 1);
        cluster_sync(s);
        s.shared(3, Access::kRead, kBuffer, 4, 1, 1);
      },
      2);
  run(
      "remote write, relaxed arrive, read", fault_kind::kSharedRace,
      [=](Scene& s) {
        s.shared(0, Access::kWrite, kBuffer, 4, 0, 1);
        cluster_sync(s, false);
        s.shared(3, Access::kRead, kBuffer, 4, 1, 1);
      },
      2);
  const auto atomics = [=](Scene& s, Scope scope) {
    uint32_t offsets[32] = {kBuffer};
    s.shared(0, Access::kWrite, kBuffer, 4, 1, 1);
    cluster_sync(s, true, true);
    for (uint32_t cta = 0; cta < 2; ++cta)
      s.c().shared_access(s.lane0(0, cta), Access::kReadWrite, 1, offsets, 4, scope);
    cluster_sync(s, true, true);
  };
  run("atomics of cluster scope from two CTAs", nullptr, [=](Scene& s) { atomics(s, Scope::kCluster); }, 2);
  run("atomics of CTA scope from two CTAs", fault_kind::kSharedRace, [=](Scene& s) { atomics(s, Scope::kCta); }, 2);
  run(
      "access after exit", fault_kind::kClusterExit,
      [](Scene& s) {
        s.c().cta_exit(1);
        s.shared(0, Access::kWrite, kBuffer, 4, 0, 1);
      },
      2);
  run(
      "exit not ordered after a remote access", fault_kind::kClusterExit,
      [](Scene& s) {
        s.shared(0, Access::kWrite, kBuffer, 4, 0, 1);
        s.c().cta_exit(1);
      },
      2);
  run(
      "exit after the cluster barrier", nullptr,
      [=](Scene& s) {
        s.shared(0, Access::kWrite, kBuffer, 4, 0, 1);
        cluster_sync(s);
        s.c().cta_exit(1);
      },
      2);
  const auto remote_arrive = [=](Scene& s, bool waits, bool fence) {
    s.c().mbarrier_init(s.lane0(0, 1), 1, kBarrier, 1);
    if (fence) s.c().fence_mbarrier_init(s.lane0(0, 1));
    cluster_sync(s, false);
    s.c().mbarrier_arrive(s.lane0(3, 0), 1, kBarrier, 1, 0, true, true);
    if (waits) s.c().mbarrier_wait(s.at(5, 1), 1, kBarrier, true, true);
    s.c().cta_exit(1);
  };
  run("remote arrive, waited for", nullptr, [=](Scene& s) { remote_arrive(s, true, true); }, 2);
  run("remote arrive on a dead CTA", fault_kind::kClusterExit, [=](Scene& s) { remote_arrive(s, false, true); }, 2);
  const auto released_init = [=](Scene& s, bool by_fence) {
    s.c().mbarrier_init(s.lane0(0), 0, kBarrier, 1);
    if (by_fence) s.c().fence(s.lane0(0), Scope::kCluster);
    cluster_sync(s, !by_fence);
    const SharedRange to{kBuffer, 1024};
    s.c().async_load(s.lane0(3), 0, {&to, 1}, kBarrier, {});
  };
  run("initialisation released by the cluster barrier", nullptr, [=](Scene& s) { released_init(s, false); }, 2);
  run("initialisation released by a fence", nullptr, [=](Scene& s) { released_init(s, true); }, 2);
  run(
      "initialisation not fenced for the cluster", fault_kind::kMbarrier,
      [=](Scene& s) { remote_arrive(s, true, false); }, 2);
  const auto multicast = [=](Scene& s, bool peer_waits) {
    for (uint32_t cta = 0; cta < 2; ++cta) {
      s.c().mbarrier_init(s.lane0(0, cta), cta, kBarrier, 1);
      s.c().fence_mbarrier_init(s.lane0(0, cta));
    }
    cluster_sync(s, false);
    const SharedRange to{kBuffer, 1024};
    for (uint32_t cta = 0; cta < 2; ++cta) s.c().async_load(s.lane0(0), cta, {&to, 1}, kBarrier, {});
    for (uint32_t cta = 0; cta < 2; ++cta) {
      s.c().mbarrier_arrive(s.lane0(0, cta), cta, kBarrier, 1, 1024, true, false);
      s.c().mbarrier_complete_tx(cta, kBarrier, 1024, true);
    }
    s.c().mbarrier_wait(s.at(1, 0), 0, kBarrier, true, true);
    if (peer_waits) s.c().mbarrier_wait(s.at(1, 1), 1, kBarrier, true, true);
    s.shared(1, Access::kRead, kBuffer, 4, 1, 1);
  };
  run("multicast", nullptr, [=](Scene& s) { multicast(s, true); }, 2);
  run("multicast, peer reads without waiting", fault_kind::kSharedRace, [=](Scene& s) { multicast(s, false); }, 2);
}

}  // namespace

int main() {
  shared_memory();
  lanes_of_a_warp();
  global_memory();
  registers();
  barriers_and_clusters();
  if (failures == 0) std::printf("all sequences as expected\n");
  return failures != 0;
}
