// Work in flight: when copies and wgmma take effect, and what they then do.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace flash_ext::emulator {

namespace {

bool is_load(const BulkCopy& copy) { return copy.kind == BulkCopy::kLoad || copy.kind == BulkCopy::kSharedToShared; }

[[noreturn]] void copy_fault(const BulkCopy& copy, const char* kind, const std::string& message, uint64_t address) {
  fault_at(*copy.cta->launch, copy.pc, copy.cta, copy.warp, 0, kind, message, address);
}

void read_source(BulkCopy& copy) {
  copy.read_done = true;
  switch (copy.kind) {
    case BulkCopy::kLoad:
      copy.staged.resize(copy.bytes);
      if (copy.tiled)
        read_tile(copy.map, copy.coords.data(), copy.staged.data());
      else
        std::memcpy(copy.staged.data(), reinterpret_cast<const void*>(copy.global), copy.bytes);
      break;
    case BulkCopy::kSharedToShared:
      // st.async brings its data along.
      if (copy.staged.empty()) {
        copy.staged.assign(copy.cta->shared + copy.source_address, copy.cta->shared + copy.source_address + copy.bytes);
      }
      break;
    default:
      copy.staged.resize(copy.bytes);
      if (copy.tiled)
        collect_tile(copy.map, copy.coords.data(), copy.cta->view(), copy.shared_address, copy.staged.data());
      else
        std::memcpy(copy.staged.data(), copy.cta->shared + copy.shared_address, copy.bytes);
      --copy.group->reads_pending;
      break;
  }
}

void write_destination(BulkCopy& copy) {
  switch (copy.kind) {
    case BulkCopy::kLoad:
    case BulkCopy::kSharedToShared:
      for (uint32_t rank = 0; rank < copy.cta->cluster->ctas.size(); ++rank) {
        if (!(copy.targets >> rank & 1)) continue;
        Cta& target = *copy.cta->cluster->ctas[rank];
        if (target.warps_left == 0) {
          copy_fault(copy, "cluster-exit",
                     "the copy lands in the shared memory of CTA rank " + std::to_string(rank) + ", which has exited",
                     copy.shared_address);
        }
        if (copy.tiled)
          place_tile(copy.map, copy.staged.data(), target.view(), copy.shared_address);
        else
          std::memcpy(target.shared + copy.shared_address, copy.staged.data(), copy.bytes);
        complete_tx(*copy.cta, copy.warp, copy.pc, target, copy.mbarrier, copy.bytes);
      }
      break;
    case BulkCopy::kStore:
      if (copy.tiled)
        write_tile(copy.map, copy.coords.data(), copy.staged.data());
      else
        std::memcpy(reinterpret_cast<void*>(copy.global), copy.staged.data(), copy.bytes);
      --copy.group->writes_pending;
      break;
    case BulkCopy::kReduce:
      if (copy.tiled)
        reduce_tile(copy.map, copy.coords.data(), copy.op, copy.staged.data());
      else
        reduce_bulk(copy.type, copy.op, reinterpret_cast<uint8_t*>(copy.global), copy.staged.data(), copy.bytes);
      --copy.group->writes_pending;
      break;
  }
}

// Takes the next step of a copy; true when it is finished. Steps happen once a copy is due.
bool step(BulkCopy& copy) {
  ++copy.cta->cluster->effects;
  try {
    if (!copy.read_done) {
      read_source(copy);
      if (!is_load(copy)) return false;
    }
    write_destination(copy);
  } catch (const OperandFault& e) {
    copy_fault(copy, "operand", e.what(), copy.shared_address);
  }
  return true;
}

void perform_lane(CpAsync& op, int l) {
  std::memcpy(op.to[l], op.from[l], op.source_bytes[l]);
  std::memset(op.to[l] + op.source_bytes[l], 0, op.bytes - op.source_bytes[l]);
  op.mask &= ~(1u << l);
}

// Fires arrivals whose earlier cp.async are all done.
bool run_cp_async_arrivals(Warp& w) {
  bool any = false;
  for (CpAsyncArrive& arrival : w.cp_async_arrivals) {
    for (int l = 0; l < kLanes; ++l) {
      if (!(arrival.mask >> l & 1)) continue;
      const bool busy = std::any_of(w.cp_async.begin(), w.cp_async.end(), [&](const CpAsync& op) {
        return (op.mask >> l & 1) && op.sequence < arrival.sequence;
      });
      if (busy) continue;
      arrival.mask &= ~(1u << l);
      any = true;
      Mbarrier* b = find_mbarrier(*w.cta, arrival.address[l]);
      const uint32_t pc = w.pc;
      w.pc = arrival.pc;
      if (!b) fault(w, 1u << l, "mbarrier", "cp.async.mbarrier.arrive finds no mbarrier", arrival.address[l]);
      const bool ended = arrive(w, 1u << l, *b, 1);
      if (w.checks)
        w.checks->cp_async_mbarrier_arrive(w.where(1u << l), w.cta->rank, arrival.address[l], arrival.noinc, ended);
      w.pc = pc;
    }
  }
  std::erase_if(w.cp_async_arrivals, [](const CpAsyncArrive& a) { return a.mask == 0; });
  return any;
}

void finish_cp_async(Warp& w) {
  std::erase_if(w.cp_async, [](const CpAsync& op) { return op.mask == 0; });
  run_cp_async_arrivals(w);
}

}  // namespace

uint64_t pick_delay(Cluster& cluster) {
  switch (cluster.launch->options.asynchrony) {
    case Asynchrony::kEarly:
      return 0;
    case Asynchrony::kLate:
      return kNever;
    case Asynchrony::kRandom:
      break;
  }
  const uint64_t dice = cluster.random();
  switch (dice & 7) {
    case 0:
    case 1:
      return 0;
    case 2:
    case 3:
    case 4:
      return 1 + (dice >> 8) % 16;
    case 5:
      return 1 + (dice >> 8) % 400;
    default:
      return kNever;
  }
}

void start_copy(Warp& w, std::unique_ptr<BulkCopy> copy) {
  Cluster& cluster = *w.cluster;
  w.copied[w.pc] += copy->bytes;
  const uint64_t read = pick_delay(cluster), write = pick_delay(cluster);
  copy->read_due = read == kNever ? kNever : cluster.round + read;
  copy->write_due = is_load(*copy)                      ? copy->read_due
                    : write == kNever || read == kNever ? kNever
                                                        : copy->read_due + write;
  if (read == 0) {
    if (step(*copy)) return;
    if (write == 0 && step(*copy)) return;
  }
  cluster.copies.push_back(std::move(copy));
}

bool run_due(Cluster& cluster) {
  bool any = false;
  for (size_t i = 0; i < cluster.copies.size();) {
    BulkCopy& copy = *cluster.copies[i];
    const uint64_t due = copy.read_done || is_load(copy) ? copy.write_due : copy.read_due;
    if (due > cluster.round) {
      ++i;
      continue;
    }
    any = true;
    if (step(copy)) cluster.copies.erase(cluster.copies.begin() + static_cast<ptrdiff_t>(i));
  }
  if (cluster.wgmmas_due || cluster.cp_async_due) {
    for (auto& cta : cluster.ctas) {
      for (uint32_t g = 0; g < cta->warpgroups.size(); ++g) {
        Warpgroup& group = cta->warpgroups[g];
        while (!group.queue.empty() && group.queue.front().issued == 0xf && group.queue.front().due <= cluster.round) {
          run_wgmma(*cta, g, group.executed + 1);
          any = true;
        }
      }
      if (!cluster.cp_async_due) continue;
      for (Warp& w : cta->warps) {
        bool some = false;
        for (CpAsync& op : w.cp_async) {
          if (op.due > cluster.round) continue;
          --cluster.cp_async_due;
          op.due = kNever;
          for (int l = 0; l < kLanes; ++l) {
            if (op.mask >> l & 1) perform_lane(op, l);
          }
          some = any = true;
        }
        if (some) finish_cp_async(w);
      }
    }
  }
  return any;
}

bool force_one(Cluster& cluster) {
  auto& copies = cluster.copies;
  if (!copies.empty()) {
    // Loads first, then reads of stores, then their writes: what comes last is what fewest wait for.
    size_t chosen = 0;
    if (cluster.launch->options.asynchrony == Asynchrony::kRandom) {
      chosen = cluster.random() % copies.size();
    } else {
      auto rank = [](const BulkCopy& c) { return is_load(c) ? 0 : c.read_done ? 2 : 1; };
      for (size_t i = 1; i < copies.size(); ++i) {
        if (rank(*copies[i]) < rank(*copies[chosen])) chosen = i;
      }
    }
    if (step(*copies[chosen])) copies.erase(copies.begin() + static_cast<ptrdiff_t>(chosen));
    return true;
  }
  for (auto& cta : cluster.ctas) {
    for (Warp& w : cta->warps) {
      if (w.cp_async_arrivals.empty()) continue;
      run_cp_async(w, kFullMask, 0, true);
      return true;
    }
  }
  return false;
}

void run_cp_async(Warp& w, Mask lanes, uint32_t keep_groups, bool all) {
  for (CpAsync& op : w.cp_async) {
    for (int l = 0; l < kLanes; ++l) {
      if (!(op.mask & lanes & (1u << l))) continue;
      // Groups are numbered by commits: the lane's group is complete when it has been committed.
      if (all || op.group[l] + keep_groups < w.cp_async_group[l]) perform_lane(op, l);
    }
    if (op.mask == 0 && op.due != kNever) {
      op.due = kNever;
      --w.cluster->cp_async_due;
    }
  }
  finish_cp_async(w);
}

void issue_cp_async(Warp& w, CpAsync op) {
  const uint64_t delay = pick_delay(*w.cluster);
  if (delay == 0) {
    for (int l = 0; l < kLanes; ++l) {
      if (op.mask >> l & 1) perform_lane(op, l);
    }
    return;
  }
  if (delay != kNever) {
    op.due = w.cluster->round + delay;
    ++w.cluster->cp_async_due;
  }
  op.sequence = w.cp_async_sequence++;
  w.cp_async.push_back(std::move(op));
}

void issue_cp_async_arrive(Warp& w, CpAsyncArrive arrival) {
  arrival.sequence = w.cp_async_sequence++;
  w.cp_async_arrivals.push_back(std::move(arrival));
  run_cp_async_arrivals(w);
}

}  // namespace flash_ext::emulator
