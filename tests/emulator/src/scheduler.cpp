// The inner loop: paths of a warp, warps of a cluster, and what to do when nothing moves.
#include <algorithm>

#include "state.h"

namespace flash_ext::emulator {

namespace {

constexpr uint64_t kPlainSlice = 1024;
// A try_wait returns false at most this often for one phase, so that loops around it cannot hide a
// deadlock.
constexpr uint32_t kMaxTimeouts = 3;
constexpr uint64_t kDefaultLimit = 20'000'000'000;
// Warps that spin on memory are not blocked: they are stopped when for so long nothing had an effect.
constexpr uint64_t kMaxIdle = 50'000'000;
constexpr uint64_t kPatience = 200'000;

void remove_path(Warp& w, uint32_t index) {
  w.paths[index] = w.paths.back();
  w.paths.pop_back();
}

int32_t new_join(Warp& w, const Join& join) {
  for (size_t j = 0; j < w.joins.size(); ++j) {
    if (w.joins[j].pending == 0) {
      w.joins[j] = join;
      return static_cast<int32_t>(j);
    }
  }
  w.joins.push_back(join);
  return static_cast<int32_t>(w.joins.size() - 1);
}

// One path or inner join of `index` has arrived or died.
void release_join(Warp& w, int32_t index) {
  while (index >= 0) {
    Join& join = w.joins[index];
    if (--join.pending) return;
    if (join.mask) {
      w.paths.push_back({join.pc, join.mask, join.stop, join.parent, {}});
      return;
    }
    index = join.parent;
  }
}

void arrive_at_join(Warp& w, uint32_t index) {
  const Path path = w.paths[index];
  remove_path(w, index);
  w.joins[path.join].mask |= path.mask;
  release_join(w, path.join);
}

// Paths that stand at one instruction with the same future become one.
void merge_paths(Warp& w) {
  for (uint32_t i = 0; i < w.paths.size(); ++i) {
    for (uint32_t j = i + 1; j < w.paths.size();) {
      Path &a = w.paths[i], &b = w.paths[j];
      if (a.pc == b.pc && a.stop == b.stop && a.join == b.join) {
        a.mask |= b.mask;
        if (b.join >= 0) --w.joins[b.join].pending;
        remove_path(w, j);
      } else {
        ++j;
      }
    }
  }
}

// The lanes that `inst` names, as the first lane of `mask` says.
Mask member_mask(const Warp& w, const Inst& inst, Mask mask) {
  return inst.member == kNoRef ? kFullMask : in<uint32_t>(w, inst.member)[first_lane(mask)];
}

// Whether a path waits for the very lanes that execute `inst` at `pc` for the lanes `member`.
bool stands_with(const Warp& w, const Path& path, const Inst& inst, uint32_t pc, Mask member) {
  const Inst& other = w.code[path.pc];
  const bool same_place = path.pc == pc || (inst.flags & other.flags & kFlagAnyPlace);
  return same_place && member_mask(w, other, path.mask) == member;
}

enum class Gathered { kRun, kWait };

// Whether all lanes that `inst` needs stand at it; `mask` grows to those that execute it.
Gathered gather(Warp& w, const Inst& inst, uint32_t pc, Mask& mask) {
  const Mask path_mask = w.path->mask;
  Mask arrived = path_mask;
  const Mask member = member_mask(w, inst, mask);
  const Mask need = member & w.live;
  if ((arrived & need) == need) return Gathered::kRun;
  Mask all = mask;
  for (const Path& other : w.paths) {
    if (&other == w.path || !stands_with(w, other, inst, pc, member)) continue;
    arrived |= other.mask;
    all |= inst.guard == kNoRef ? other.mask : other.mask & read_predicate(w, inst.guard);
  }
  if ((arrived & need) != need) return Gathered::kWait;
  mask = all;
  // A barrier that they wait at together is remembered by the path that came first.
  for (uint32_t i = 0; i < w.paths.size(); ++i) {
    Path& other = w.paths[i];
    if (other.pc != pc || other.wait.kind == Wait::kNone || other.wait.kind == Wait::kGather) continue;
    w.path = &other;
    w.current = i;
  }
  w.path->wait.kind = w.path->wait.kind == Wait::kGather ? Wait::kNone : w.path->wait.kind;
  return Gathered::kRun;
}

void check_registers(Warp& w, const Inst& inst, uint32_t pc, Mask path_mask, Mask mask) {
  const RegisterUses& uses = w.launch->program->uses[pc];
  w.pc = pc;
  if (uses.guard >= 0) {
    const uint32_t guard = static_cast<uint32_t>(uses.guard);
    w.checks->registers(w.where(path_mask), {&guard, 1}, {}, true);
  }
  if (!mask || (inst.flags & kFlagAsyncRead)) return;
  if (inst.flags & kFlagSelect && uses.reads.size() == 3 && uses.writes.size() == 1) {
    w.checks->registers(w.where(mask), {&uses.reads[2], 1}, {}, false);
    w.checks->select_register(w.where(mask), uses.writes[0], uses.reads[0], uses.reads[1], read_predicate(w, inst.c));
    return;
  }
  if (!uses.reads.empty() || !uses.writes.empty()) {
    w.checks->registers(w.where(mask), uses.reads, uses.writes, uses.sink);
  }
}

// Runs one path of the warp, and others if it blocks, for about `slice` instructions.
template <bool kChecked>
uint64_t run_warp(Warp& w, uint64_t slice) {
  uint64_t executed = 0;
  size_t blocked = 0;  // paths in a row that could not move
  const Inst* const code = w.code;
  while (!w.done && blocked < w.paths.size()) {
    if (w.current >= w.paths.size()) w.current = 0;
    w.path = &w.paths[w.current];
    uint32_t pc = w.path->pc;
    bool switch_path = false;
    while (!switch_path) {
      const Mask path_mask = w.path->mask;
      const uint32_t stop = w.path->stop;
      if (pc == stop) {
        arrive_at_join(w, w.current);
        blocked = 0;
        break;
      }
      if (executed >= slice) {
        w.path->pc = pc;
        ++w.current;  // the other paths have a turn next time
        return executed;
      }
      const Inst& inst = code[pc];
      Mask mask = path_mask;
      if (inst.guard != kNoRef) mask &= read_predicate(w, inst.guard);
      if (mask == 0) {
        if constexpr (kChecked) check_registers(w, inst, pc, path_mask, 0);
        ++w.counts[pc];
        ++executed;
        ++pc;
        blocked = 0;
        continue;
      }
      w.path->pc = w.pc = pc;
      bool together = false;
      if ((inst.flags & kFlagGather) && path_mask != w.live) [[unlikely]] {
        if (gather(w, inst, pc, mask) == Gathered::kWait) {
          w.path->wait.kind = Wait::kGather;
          ++blocked;
          ++w.current;
          break;
        }
        together = true;
      }
      // Lanes that stand elsewhere have operands of their own.
      if constexpr (kChecked) {
        check_registers(w, inst, pc, path_mask, inst.flags & kFlagAnyPlace ? mask & path_mask : mask);
      }
      const Status status = inst.run(w, inst, mask);
      if (status == Status::kBlocked) {
        ++blocked;
        ++w.current;
        break;
      }
      ++w.counts[pc];
      ++executed;
      ++w.executed;
      blocked = 0;
      if constexpr (kChecked) {
        if (w.launch->checks->failed()) return executed;
      }
      if (status == Status::kJump) {
        if (w.done) return executed;
        break;
      }
      ++pc;
      if (together) [[unlikely]] {
        const Mask member = member_mask(w, inst, mask);
        for (Path& path : w.paths) {
          if (stands_with(w, path, inst, pc - 1, member)) ++path.pc;
        }
        merge_paths(w);
        w.current = 0;
        break;
      }
      if (status == Status::kYield) {
        w.path->pc = pc;
        ++w.current;
        if (pc == stop) arrive_at_join(w, w.current - 1);
        return executed;
      }
    }
  }
  return executed;
}

// try_wait may return false at any time: code that polls two barriers in turn relies on it.
bool force_timeouts(Cluster& cluster) {
  bool any = false;
  for (auto& cta : cluster.ctas) {
    for (Warp& w : cta->warps) {
      for (Path& path : w.paths) {
        if (path.wait.kind == Wait::kMbarrier && path.wait.tries < kMaxTimeouts && !path.wait.forced_timeout) {
          path.wait.forced_timeout = true;
          any = true;
        }
      }
    }
  }
  return any;
}

// Lanes that wait at a join may be the very ones that others wait for in a .sync instruction: they
// go on by themselves.
bool release_waiting_lanes(Cluster& cluster) {
  bool any = false;
  for (auto& cta : cluster.ctas) {
    for (Warp& w : cta->warps) {
      const bool gathers =
          std::any_of(w.paths.begin(), w.paths.end(), [](const Path& p) { return p.wait.kind == Wait::kGather; });
      if (!gathers) continue;
      for (Join& join : w.joins) {
        if (!join.pending || !join.mask) continue;
        w.paths.push_back({join.pc, join.mask, join.stop, join.parent, {}});
        if (join.parent >= 0) ++w.joins[join.parent].pending;
        join.mask = 0;
        any = true;
      }
    }
  }
  return any;
}

// Ends the launch with a fault that tells where every warp stands.
[[noreturn]] void stop_running(Cluster& cluster, const char* kind, std::string text) {
  Warp* first = nullptr;
  for (auto& cta : cluster.ctas) {
    for (Warp& w : cta->warps) {
      for (const Path& path : w.paths) {
        text += "\n  " + describe_wait(w, path);
        if (!first) first = &w;
      }
    }
  }
  if (!first) fault_at(*cluster.launch, 0, cluster.ctas[0].get(), 0, 0, kind, text);
  first->pc = first->paths.front().pc;
  fault(*first, first->paths.front().mask, kind, text);
}

}  // namespace

void branch_to(Warp& w, const Inst& inst, Mask taken, uint32_t target) {
  Path& path = *w.path;
  const Mask rest = path.mask & ~taken;
  if (!rest) {
    path.pc = target;
    return;
  }
  const Program& program = *w.launch->program;
  // Lanes that do not take a table branch come back for their own target.
  const uint32_t next = inst.num_targets == 1 ? w.pc + 1 : w.pc;
  const uint32_t meet = program.blocks[program.block_of[w.pc]].reconverge;
  Path other = path;
  if (meet == UINT32_MAX || meet == path.stop) {
    if (path.join >= 0) ++w.joins[path.join].pending;
  } else {
    other.join = new_join(w, {meet, path.stop, path.join, 2, 0});
    other.stop = meet;
  }
  path.join = other.join;
  path.stop = other.stop;
  path.pc = next;
  path.mask = rest;
  other.pc = target;
  other.mask = taken;
  w.paths.push_back(other);
  if (w.launch->hostile() && (w.cluster->random() & 1)) w.current = static_cast<uint32_t>(w.paths.size() - 1);
}

void exit_lanes(Warp& w, Mask mask) {
  Path& path = *w.path;
  path.mask &= ~mask;
  w.live &= ~mask;
  ++path.pc;
  if (path.mask) return;
  const int32_t join = path.join;
  remove_path(w, static_cast<uint32_t>(w.path - w.paths.data()));
  release_join(w, join);
  if (!w.live) {
    w.done = true;
    warp_exited(w);
  }
}

bool run_cluster(Cluster& cluster, uint64_t budget) {
  LaunchContext& launch = *cluster.launch;
  const bool hostile = launch.hostile();
  uint64_t executed = 0;
  const uint64_t effects = cluster.effects;
  while (executed < budget) {
    if (launch.stop.load(std::memory_order_relaxed)) return true;
    ++cluster.round;
    bool progress = run_due(cluster);
    bool starved = false;
    if (hostile) std::shuffle(cluster.order.begin(), cluster.order.end(), cluster.random);
    for (auto& [cta, index] : cluster.order) {
      Warp& w = cta->warps[index];
      if (w.done) continue;
      uint64_t slice = kPlainSlice;
      if (hostile) {
        if (w.starved_until > cluster.round) {
          starved = true;
          continue;
        }
        const uint64_t dice = cluster.random();
        if (dice % 64 == 0) w.starved_until = cluster.round + 1 + (dice >> 8) % 400;
        slice = 1 + (dice >> 20) % (dice & 0x10000 ? 16 : 256);
      }
      const uint64_t n = w.checks ? run_warp<true>(w, slice) : run_warp<false>(w, slice);
      executed += n;
      progress |= n > 0;
      if (w.checks && launch.checks->failed()) {
        launch.stop = true;
        return true;
      }
    }
    if (cluster.ctas_left == 0) {
      while (force_one(cluster)) {
      }
      launch.executed += executed;
      return true;
    }
    if (progress) continue;
    if (starved) {
      for (auto& cta : cluster.ctas) {
        for (Warp& w : cta->warps) w.starved_until = 0;
      }
      continue;
    }
    if (release_waiting_lanes(cluster) || force_one(cluster) || force_timeouts(cluster)) continue;
    stop_running(cluster, "deadlock", "no warp can go on");
  }
  const uint64_t total = launch.executed += executed;
  const uint64_t limit = launch.options.max_instructions ? launch.options.max_instructions : kDefaultLimit;
  if (total > limit)
    stop_running(cluster, "watchdog", std::to_string(total) + " warp instructions executed and no end");
  // A warp that polls memory always moves: work in flight, which it may be waiting for, comes all the same in the end.
  cluster.polled = cluster.effects != effects ? 0 : cluster.polled + executed;
  if (cluster.polled >= kPatience) {
    cluster.polled = 0;
    force_one(cluster);
  }
  const uint64_t idle = cluster.effects != effects ? (launch.idle = 0) : launch.idle += executed;
  if (idle > kMaxIdle) {
    stop_running(cluster, "livelock",
                 std::to_string(idle) + " warp instructions executed since anything was stored or signalled");
  }
  return false;
}

}  // namespace flash_ext::emulator
