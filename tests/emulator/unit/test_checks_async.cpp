// TMA, bulk stores, cp.async, mbarriers and wgmma: each rule once broken, once kept.
#include "checks_scene.h"

using namespace flash_ext::emulator;

namespace {

void pipelines() {
  // One round of a TMA pipeline as CUTLASS writes it, three times over one stage.
  const auto ring = [](Scene& s, int skip) {
    s.init_barriers(1);
    for (int round = 0; round < 3; ++round) {
      if (round && skip != 0) s.wait(0, kEmpty);
      s.issue(8192);
      s.land(8192);
      for (uint32_t warp = 4; warp < 8; ++warp)
        if (skip != 1 || round != 1) s.wait(warp);
      s.fence_wgmma();
      s.wgmma();
      if (skip != 2) s.wait_wgmma();
      s.c().mbarrier_arrive(s.lane0(4), 0, kEmpty, 1, 0, true, true);
    }
  };
  const auto with = [&](int skip) {
    return [=](Scene& s) {
      s.define(0, 48);
      ring(s, skip);
    };
  };
  run("pipeline", nullptr, with(-1));
  run("producer does not wait", fault_kind::kSharedRace, with(0));
  run("consumer does not wait", fault_kind::kSharedRace, with(1));
  run("wgmma not waited for before the release", fault_kind::kSharedRace, with(2));
  run("generic reader, no wait", fault_kind::kSharedRace, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.load(4);
  });
  run("generic reader", nullptr, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.load(4);
  });
  run("one warp waits, another reads", fault_kind::kSharedRace, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.load(5);
  });
  run("reader released by barrier", nullptr, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.sync(0x30);
    s.load(5);
  });
  run("load over unread bytes of the same phase", fault_kind::kSharedRace, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.tma(64);
  });
  run("generic read then load without release", fault_kind::kSharedRace, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.load(4);
    s.issue();
  });
  run("generic write, load over it unfenced", fault_kind::kProxyFence, [](Scene& s) {
    s.init_barriers();
    s.store(0);
    s.issue();
  });
  run("generic write, fence, load over it", nullptr, [](Scene& s) {
    s.init_barriers();
    s.store(0);
    s.c().fence_proxy_async(s.at(0), ProxyFence::kShared);
    s.issue();
  });
  run("what a load has overwritten is forgotten", nullptr, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.load(4);
    s.c().mbarrier_arrive(s.lane0(4), 0, kEmpty, 1, 0, true, true);
    s.wait(0, kEmpty);
    // A relaxed arrival: those who wait learn of the copy, not of the reader before it.
    s.c().mbarrier_arrive(s.lane0(0), 0, kBarrier, 1, 4096, false, false);
    s.tma();
    s.land();
    s.wait(5);
    s.store(5);
  });
  run("relaxed wait acquires nothing", fault_kind::kSharedRace, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.c().mbarrier_wait(s.at(4), 0, kBarrier, true, false);
    s.load(4);
  });
}

void mbarriers() {
  run("not initialised", fault_kind::kMbarrier, [](Scene& s) { s.wait(0); });
  run("initialisation not seen", fault_kind::kMbarrier, [](Scene& s) {
    s.init_barriers(1, true, false);
    s.c().mbarrier_wait(s.at(4), 0, kBarrier, false, true);
  });
  run("initialisation not fenced", fault_kind::kMbarrier, [](Scene& s) {
    s.init_barriers(1, false);
    s.issue();
  });
  run("too many arrivals", fault_kind::kMbarrier, [](Scene& s) {
    s.init_barriers();
    s.c().mbarrier_arrive(s.at(0), 0, kEmpty, 2, 0, true, true);
  });
  run("expect_tx too small", fault_kind::kExpectTx, [](Scene& s) {
    s.init_barriers();
    s.c().mbarrier_arrive(s.lane0(0), 0, kBarrier, 1, 2048, true, false);
    s.tma(2048);
    s.tma(2048, kOther);
    s.c().mbarrier_complete_tx(0, kBarrier, 2048, true);
  });
  run("expect_tx too large", fault_kind::kExpectTx, [](Scene& s) {
    s.init_barriers();
    s.c().mbarrier_arrive(s.lane0(0), 0, kBarrier, 1, 4112, true, false);
    s.tma();
    s.c().mbarrier_complete_tx(0, kBarrier, 4096, false);
    s.c().cta_exit(0);
  });
  run("copy nobody waits for", fault_kind::kAsyncAtExit, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.c().cta_exit(0);
  });
  run("copy waited for", nullptr, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.c().cta_exit(0);
  });
  run("initialised again under a waiter", fault_kind::kMbarrier, [](Scene& s) {
    s.init_barriers();
    s.c().mbarrier_wait(s.at(4), 0, kBarrier, false, true);
    s.sync(0xfff);
    s.c().mbarrier_init(s.lane0(0), 0, kBarrier, 1);
  });
  run("invalidated before others have passed", fault_kind::kMbarrier, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.c().mbarrier_inval(s.lane0(0), 0, kBarrier);
  });
  run("invalidated and made anew", nullptr, [](Scene& s) {
    s.init_barriers();
    s.issue();
    s.land();
    s.wait(4);
    s.sync(0xfff);
    s.c().mbarrier_inval(s.lane0(0), 0, kBarrier);
    s.c().mbarrier_inval(s.lane0(0), 0, kEmpty);
    s.init_barriers();
    s.issue(4096, kOther);
    s.land();
    s.wait(5);
    s.load(5, kOther);
  });
  run("plain store to a live mbarrier", fault_kind::kMbarrier, [](Scene& s) {
    s.init_barriers();
    s.store(0, kBarrier);
  });
  run("arrive releases, wait acquires", nullptr, [](Scene& s) {
    s.init_barriers(2);
    s.store(1);
    s.store(2, kOther);
    s.c().mbarrier_arrive(s.lane0(1), 0, kEmpty, 1, 0, true, false);
    s.c().mbarrier_arrive(s.lane0(2), 0, kEmpty, 1, 0, true, true);
    s.wait(4, kEmpty);
    s.load(4);
    s.load(4, kOther);
  });
  run("relaxed arrive", fault_kind::kSharedRace, [](Scene& s) {
    s.init_barriers();
    s.store(1);
    s.c().mbarrier_arrive(s.lane0(1), 0, kEmpty, 1, 0, false, true);
    s.wait(4, kEmpty);
    s.load(4);
  });
}

void bulk_stores() {
  static float memory[4096];
  const uint64_t base = reinterpret_cast<uint64_t>(memory), flag = base + 12288;
  const auto store = [=](Scene& s, bool fenced, bool reduce = false) {
    s.shadow().add(base, sizeof memory, Role::kInOut);
    s.store(4);
    if (fenced) s.c().fence_proxy_async(s.at(4), ProxyFence::kShared);
    s.sync(0x31);
    const SharedRange from{kBuffer, 128};
    const GlobalRange to{base, 128};
    s.c().bulk_store(s.lane0(0), {&from, 1}, {&to, 1}, reduce);
  };
  const auto end = [](Scene& s, BulkWait kind) {
    s.c().bulk_commit(s.lane0(0));
    s.c().bulk_wait(s.lane0(0), 0, kind);
  };
  run("store without proxy fence", fault_kind::kProxyFence, [=](Scene& s) { store(s, false); });
  run("store with the writer's fence", nullptr, [=](Scene& s) { store(s, true); });
  run("store with the reader's fence", nullptr, [=](Scene& s) {
    s.store(4);
    s.sync(0x31);
    s.c().fence_proxy_async(s.at(0), ProxyFence::kAll);
    const SharedRange from{kBuffer, 128};
    s.c().bulk_store(s.lane0(0), {&from, 1}, {}, false);
  });
  run("fence before the write", fault_kind::kProxyFence, [=](Scene& s) {
    s.c().fence_proxy_async(s.at(4), ProxyFence::kAll);
    s.store(4);
    s.sync(0x31);
    const SharedRange from{kBuffer, 128};
    s.c().bulk_store(s.lane0(0), {&from, 1}, {}, false);
  });
  run("fence in a bystander, not on the path", fault_kind::kProxyFence, [=](Scene& s) {
    s.store(4);
    s.sync(0x31);
    s.c().fence_proxy_async(s.at(5), ProxyFence::kAll);
    const SharedRange from{kBuffer, 128};
    s.c().bulk_store(s.lane0(0), {&from, 1}, {}, false);
  });
  run("fence of global memory alone", fault_kind::kProxyFence, [=](Scene& s) {
    s.store(4);
    s.c().fence_proxy_async(s.at(4), ProxyFence::kGlobal);
    s.sync(0x31);
    const SharedRange from{kBuffer, 128};
    s.c().bulk_store(s.lane0(0), {&from, 1}, {}, false);
  });
  run("source overwritten before wait_group.read", fault_kind::kSharedRace, [=](Scene& s) {
    store(s, true);
    s.c().bulk_commit(s.lane0(0));
    s.sync(0x31);
    s.store(4);
  });
  run("source overwritten after wait_group.read", nullptr, [=](Scene& s) {
    store(s, true);
    end(s, BulkWait::kRead);
    s.sync(0x31);
    s.store(4);
  });
  run("commit missing", fault_kind::kSharedRace, [=](Scene& s) {
    store(s, true);
    s.c().bulk_wait(s.lane0(0), 0, BulkWait::kRead);
    s.sync(0x31);
    s.store(4);
  });
  run("another lane waits", fault_kind::kSharedRace, [=](Scene& s) {
    store(s, true);
    s.c().bulk_commit(s.lane0(0));
    s.c().bulk_wait(s.at(0, 0, 2), 0, BulkWait::kRead);
    s.sync(0x31);
    s.store(4);
  });
  run("one group may stay pending", fault_kind::kSharedRace, [=](Scene& s) {
    store(s, true);
    s.c().bulk_commit(s.lane0(0));
    s.c().bulk_wait(s.lane0(0), 1, BulkWait::kRead);
    s.sync(0x31);
    s.store(4);
  });
  run("exit before the source is read", fault_kind::kAsyncAtExit, [=](Scene& s) {
    store(s, true);
    s.c().bulk_commit(s.lane0(0));
    s.c().cta_exit(0);
  });
  run("exit after the source is read", nullptr, [=](Scene& s) {
    store(s, true);
    end(s, BulkWait::kRead);
    s.c().cta_exit(0);
  });
  const auto publish = [=](Scene& s, BulkWait kind, bool reduce) {
    store(s, true, reduce);
    auto other = s.another();
    end(s, kind);
    s.global(s.c(), 0, Access::kReadWrite, flag, Scope::kGpu, Order::kRelease, 1);
    s.global(*other, 0, Access::kRead, flag, Scope::kGpu, Order::kAcquire, 1);
    s.global(*other, 0, Access::kRead, base);
  };
  run("published after wait_group", nullptr, [=](Scene& s) { publish(s, BulkWait::kFull, false); });
  run("published after wait_group.read", fault_kind::kGlobalRace,
      [=](Scene& s) { publish(s, BulkWait::kRead, false); });
  run("reduction published after wait_group", nullptr, [=](Scene& s) { publish(s, BulkWait::kFull, true); });
  run("reduction published after wait_group.read", fault_kind::kIncompleteReduction,
      [=](Scene& s) { publish(s, BulkWait::kRead, true); });
  run("reductions of two clusters", nullptr, [=](Scene& s) {
    store(s, true, true);
    auto other = s.another();
    const GlobalRange to{base, 128};
    other->bulk_store(s.lane0(0), {}, {&to, 1}, true);
  });
  const auto by_lanes = [=](Scene& s, uint32_t apart) {
    store(s, true);
    const Where first = s.lane0(0);
    for (uint32_t lane = 0; lane < 2; ++lane) {
      const SharedRange from{kBuffer, 64};
      const GlobalRange to{base + 256 + lane * apart, 64};
      s.c().bulk_store({0, 0, 1u << lane, first.pc}, {&from, 1}, {&to, 1}, false);
    }
  };
  run("one store issued by two lanes", nullptr, [=](Scene& s) { by_lanes(s, 0); });
  run("two lanes store overlapping bytes", fault_kind::kGlobalRace, [=](Scene& s) { by_lanes(s, 32); });
  run("generic global writes loaded by TMA", fault_kind::kProxyFence, [=](Scene& s) {
    s.shadow().add(base, sizeof memory, Role::kWorkspace);
    s.init_barriers();
    s.global(s.c(), 0, Access::kWrite, base);
    const SharedRange to{kBuffer, 128};
    const GlobalRange from{base, 128};
    s.c().async_load(s.lane0(0), 0, {&to, 1}, kBarrier, {&from, 1});
  });
  run("fenced global writes loaded by TMA", nullptr, [=](Scene& s) {
    s.shadow().add(base, sizeof memory, Role::kWorkspace);
    s.init_barriers();
    s.global(s.c(), 0, Access::kWrite, base);
    s.c().fence_proxy_async(s.at(0), ProxyFence::kAll);
    const SharedRange to{kBuffer, 128};
    const GlobalRange from{base, 128};
    s.c().async_load(s.lane0(0), 0, {&to, 1}, kBarrier, {&from, 1});
  });
}

void cp_async() {
  const auto copy = [](Scene& s) {
    uint32_t offsets[32];
    for (uint32_t i = 0; i < 32; ++i) offsets[i] = kBuffer + 16 * i;
    s.c().cp_async(s.at(0), offsets, 16, nullptr, 0);
  };
  run("cp.async read before the wait", fault_kind::kSharedRace, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.load(0);
  });
  run("cp.async read after the wait", nullptr, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_wait(s.at(0), 0);
    s.load(0);
  });
  run("cp.async read by another warp without barrier", fault_kind::kSharedRace, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_wait(s.at(0), 0);
    s.load(1);
  });
  run("cp.async, barrier before the wait", fault_kind::kSharedRace, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.sync(3);
    s.c().cp_async_wait(s.at(0), 0);
    s.load(1);
  });
  run("cp.async, wait, barrier, read", nullptr, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_wait(s.at(0), 0);
    s.sync(3);
    s.load(1);
  });
  run("cp.async with one group pending", fault_kind::kSharedRace, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_wait(s.at(0), 1);
    s.load(0);
  });
  run("older of two groups", nullptr, [=](Scene& s) {
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_wait(s.at(0), 1);
    s.load(0);
  });
  run("newer of two groups", fault_kind::kSharedRace, [=](Scene& s) {
    s.c().cp_async_commit(s.at(0));
    copy(s);
    s.c().cp_async_commit(s.at(0));
    s.c().cp_async_wait(s.at(0), 1);
    s.load(0);
  });
  run("wait_all covers what is not committed", nullptr, [=](Scene& s) {
    copy(s);
    s.c().cp_async_wait_all(s.at(0));
    s.load(0);
  });
  run("cp.async needs the proxy fence before wgmma", fault_kind::kProxyFence, [=](Scene& s) {
    s.define(0, 48);
    for (uint32_t half = 0; half < 2; ++half)
      for (uint32_t part = 0; part < 8; ++part) {
        uint32_t offsets[32];
        for (uint32_t i = 0; i < 32; ++i) offsets[i] = kBuffer + 512 * (8 * half + part) + 16 * i;
        s.c().cp_async(s.at(4), offsets, 16, nullptr, 0);
      }
    s.c().cp_async_wait_all(s.at(4));
    s.sync(0xf0);
    s.fence_wgmma();
    s.wgmma();
  });
  run("cp.async.mbarrier.arrive", nullptr, [=](Scene& s) {
    s.c().mbarrier_init(s.lane0(0), 0, kBarrier, 32);
    s.sync(0xfff);
    copy(s);
    s.c().cp_async_mbarrier_arrive(s.at(0), 0, kBarrier, true, true);
    s.wait(1);
    s.load(1);
  });
}

void wgmma() {
  const auto ready = [](Scene& s) {
    s.define(0, 48);
    s.init_barriers();
    s.issue(16384);
    s.land(16384);
    s.all_wait();
  };
  const auto case_of = [=](auto script) {
    return [=](Scene& s) {
      ready(s);
      script(s);
    };
  };
  run("fence, wgmma, wait, read", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma();
        s.use(4, 8);
      }));
  run("no fence at all", fault_kind::kWgmmaFence, case_of([](Scene& s) { s.wgmma(); }));
  run("A register written after the fence", fault_kind::kWgmmaFence, case_of([](Scene& s) {
        s.fence_wgmma();
        s.set(4, 1);
        s.wgmma();
      }));
  run("accumulator read between two wgmmas", fault_kind::kWgmmaFence, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma();
        s.use(5, 9);
        s.wgmma();
      }));
  run("chain of one shape", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wgmma(true);
        s.wait_wgmma(1);
        s.wgmma(true);
        s.wait_wgmma();
        s.use(4, 9);
      }));
  run("chain of two shapes", fault_kind::kWgmmaRegister, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wgmma(true, 2);
      }));
  run("two shapes, waited for, no fence", fault_kind::kWgmmaFence, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma();
        s.wgmma(true, 2);
      }));
  run("two shapes, waited for and fenced", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma();
        s.fence_wgmma();
        s.wgmma(true, 2);
      }));
  run("accumulator read in flight", fault_kind::kWgmmaRegister, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.use(4, 8);
      }));
  run("accumulator written in flight", fault_kind::kWgmmaRegister, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.set(4, 8);
      }));
  run("A register overwritten in flight", fault_kind::kWgmmaRegister, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.set(4, 3);
      }));
  run("group not committed", fault_kind::kWgmmaRegister, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma(false, 1, false);
        s.wait_wgmma();
        s.use(4, 8);
      }));
  run("wait with one group pending", fault_kind::kWgmmaRegister, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma(1);
        s.use(4, 8);
      }));
  run("other registers in flight", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.use(4, 45);
        s.set(4, 46);
        s.wait_wgmma();
      }));
  run("operand overwritten in flight", fault_kind::kSharedRace, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.store(4);
      }));
  run("operand overwritten after the wait", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma();
        s.store(4);
      }));
  run("operand overwritten elsewhere after wait and barrier", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.wait_wgmma();
        s.sync(0x1f);
        s.store(0);
      }));
  run("bytes that B does not touch", nullptr, case_of([](Scene& s) {
        s.fence_wgmma();
        s.wgmma();
        s.shared(4, Access::kWrite, kBuffer + 8192, 4);
      }));
  run("undefined A", fault_kind::kUninitialisedRegister, [](Scene& s) {
    s.init_barriers();
    s.issue(16384);
    s.land(16384);
    s.all_wait();
    s.fence_wgmma();
    s.wgmma();
  });
  run("undefined D ignored by scale-d 0", nullptr, [](Scene& s) {
    s.define(0, 4);
    s.init_barriers();
    s.issue(16384);
    s.land(16384);
    s.all_wait();
    s.fence_wgmma();
    s.wgmma(false);
    s.wait_wgmma();
    s.use(4, 8);
  });
  run("undefined D", fault_kind::kUninitialisedRegister, [](Scene& s) {
    s.define(0, 4);
    s.init_barriers();
    s.issue(16384);
    s.land(16384);
    s.all_wait();
    s.fence_wgmma();
    s.wgmma(true);
  });
  run("three warps wait, the fourth does not", fault_kind::kSharedRace, [](Scene& s) {
    s.define(0, 48);
    s.init_barriers();
    s.issue(16384);
    s.land(16384);
    s.wait(4);
    s.wait(5);
    s.wait(7);
    s.fence_wgmma();
    s.wgmma();
  });

  // A in shared memory, rows of each warp written by that warp, and no barrier between the warps.
  const auto own_rows = [](Scene& s, bool shifted) {
    s.define(0, 48);
    s.init_barriers();
    s.issue(16384);
    s.land(16384);
    s.all_wait();
    for (uint32_t warp = 4; warp < 8; ++warp) {
      const uint32_t rows = (shifted ? warp + 1 : warp) % 4;
      for (uint32_t i = 0; i < 4; ++i) s.shared(warp, Access::kWrite, kOther + 2048 * rows + 512 * i, 16);
      s.c().fence_proxy_async(s.at(warp), ProxyFence::kShared);
    }
    s.fence_wgmma();
    uint32_t d[32];
    for (uint32_t i = 0; i < 32; ++i) d[i] = 8 + i;
    for (uint32_t warp = 4; warp < 8; ++warp) s.c().wgmma_registers(s.at(warp), {}, d, false, 1);
    WgmmaOp op;
    op.n = 64;
    s.c().wgmma_shared(s.at(7), op, Scene::tile(kOther), Scene::tile(kBuffer));
  };
  run("each warp writes its own rows of A", nullptr, [=](Scene& s) { own_rows(s, false); });
  run("each warp writes its neighbour's rows of A", fault_kind::kSharedRace, [=](Scene& s) { own_rows(s, true); });
}

}  // namespace

int main() {
  pipelines();
  mbarriers();
  bulk_stores();
  cp_async();
  wgmma();
  if (failures == 0) std::printf("all sequences as expected\n");
  return failures != 0;
}
