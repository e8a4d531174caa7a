// Addresses of the kernel to host pointers, with the checks that are always on: bounds, alignment,
// roles, CTAs that have exited.
#include <algorithm>
#include <cstdio>

#include "state.h"

namespace flash_ext::emulator {

namespace {

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

const GlobalRangeEntry* find_range(const LaunchContext& launch, uint64_t address) {
  const auto& ranges = launch.ranges;
  auto it = std::upper_bound(ranges.begin(), ranges.end(), address,
                             [](uint64_t a, const GlobalRangeEntry& r) { return a < r.begin; });
  if (it == ranges.begin()) return nullptr;
  --it;
  return address < it->end ? &*it : nullptr;
}

const GlobalRangeEntry& range_of(const Warp& w, Mask lanes, uint64_t address, uint64_t bytes, bool write) {
  const GlobalRangeEntry* range = find_range(*w.launch, address);
  if (!range || address + bytes > range->end) {
    fault(w, lanes, "out-of-bounds",
          std::to_string(bytes) + " bytes at global address " + hex(address) + ": " +
              (address < 4096 ? "a null pointer" : w.launch->memory->describe(address)),
          address);
  }
  if (write && !range->writable) {
    fault(w, lanes, "read-only-write",
          "write to read-only memory" +
              (range->range ? " '" + range->range->name + "' at byte " + std::to_string(address - range->begin)
                            : std::string(" (a constant or a kernel parameter)")),
          address);
  }
  return *range;
}

// 32 banks of 4 bytes; wider accesses go by half or quarter warps.
uint32_t wavefronts(const uint64_t* addresses, Mask mask, uint32_t bytes) {
  const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint32_t total = 0;
  for (int first = 0; first < kLanes; first += group) {
    std::array<std::vector<uint64_t>, 32> banks;
    size_t most = 0;
    for (int l = first; l < first + group; ++l) {
      if (!(mask >> l & 1)) continue;
      for (uint64_t word = addresses[l] / 4; word <= (addresses[l] + bytes - 1) / 4; ++word) {
        auto& bank = banks[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    }
    total += static_cast<uint32_t>(most);
  }
  return total;
}

uint32_t sectors(const uint64_t* addresses, Mask mask, uint32_t bytes) {
  std::vector<uint64_t> seen;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    for (uint64_t s = addresses[l] / 32; s <= (addresses[l] + bytes - 1) / 32; ++s) seen.push_back(s);
  }
  std::sort(seen.begin(), seen.end());
  return static_cast<uint32_t>(std::unique(seen.begin(), seen.end()) - seen.begin());
}

void check_alignment(const Warp& w, Mask mask, const uint64_t* addresses, uint32_t bytes) {
  uint64_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (mask >> l) & 1 ? addresses[l] : 0;
  if ((bits & (bytes - 1)) == 0) return;
  for (int l = 0; l < kLanes; ++l) {
    if ((mask >> l & 1) && addresses[l] % bytes) {
      fault(w, 1u << l, "misaligned", std::to_string(bytes) + "-byte access at " + hex(addresses[l]), addresses[l]);
    }
  }
}

// Addresses here are 32-bit shared::cluster addresses, widened.
void resolve_shared(Warp& w, Mask mask, const uint64_t* addresses, uint32_t bytes, Access access, Scope scope,
                    Order order, Lookup& out) {
  uint64_t most = 0;
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t a = (mask >> l) & 1 ? addresses[l] : 0;
    most = most > a ? most : a;
  }
  Cta& own = *w.cta;
  if (most + bytes <= own.shared_bytes) {
    for (int l = 0; l < kLanes; ++l) out.data[l] = own.shared + addresses[l];
    if (w.checks) [[unlikely]] {
      uint32_t offsets[kLanes];
      for (int l = 0; l < kLanes; ++l) offsets[l] = static_cast<uint32_t>(addresses[l]);
      w.checks->shared_access(w.where(mask), access, own.rank, offsets, bytes, scope, order);
    }
  } else {
    std::array<Mask, 16> by_rank{};
    uint32_t offsets[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      if (addresses[l] >> 32) {
        fault(w, 1u << l, "out-of-bounds", "shared address " + hex(addresses[l]), addresses[l]);
      }
      Cta& cta = cluster_cta(w, 1u << l, static_cast<uint32_t>(addresses[l]));
      offsets[l] = static_cast<uint32_t>(addresses[l]) & kSharedOffsetMask;
      check_shared(w, 1u << l, cta, offsets[l], bytes);
      out.data[l] = cta.shared + offsets[l];
      by_rank[cta.rank] |= 1u << l;
    }
    if (w.checks) {
      for (uint32_t rank = 0; rank < by_rank.size(); ++rank) {
        if (by_rank[rank]) w.checks->shared_access(w.where(by_rank[rank]), access, rank, offsets, bytes, scope, order);
      }
    }
  }
  if (w.traffic) {
    LineTraffic& t = w.traffic[w.pc];
    ++t.shared_requests;
    t.shared_wavefronts += wavefronts(addresses, mask, bytes);
  }
}

void resolve_global(Warp& w, Mask mask, const uint64_t* addresses, uint32_t bytes, Access access, Scope scope,
                    Order order, Lookup& out) {
  uint64_t least = UINT64_MAX, most = 0;
  for (int l = 0; l < kLanes; ++l) {
    const bool on = (mask >> l) & 1;
    least = on && addresses[l] < least ? addresses[l] : least;
    most = on && addresses[l] > most ? addresses[l] : most;
  }
  const bool write = access != Access::kRead;
  const GlobalRangeEntry* cached = w.last_range;
  if (!cached || least < cached->begin || most + bytes > cached->end || (write && !cached->writable)) {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) w.last_range = &range_of(w, 1u << l, addresses[l], bytes, write);
    }
  }
  for (int l = 0; l < kLanes; ++l) out.data[l] = reinterpret_cast<uint8_t*>(addresses[l]);
  if (w.checks) [[unlikely]]
    w.checks->global_access(w.where(mask), access, addresses, bytes, scope, order);
  if (w.traffic) {
    LineTraffic& t = w.traffic[w.pc];
    ++t.global_requests;
    t.global_sectors += sectors(addresses, mask, bytes);
  }
}

}  // namespace

Cta& cluster_cta(Warp& w, Mask lanes, uint32_t address) {
  const uint32_t high = address >> kRankShift;
  if (high == 0) return *w.cta;
  if (high > w.cluster->ctas.size()) {
    fault(w, lanes, "out-of-bounds", "shared::cluster address " + hex(address) + " names no CTA of the cluster",
          address);
  }
  Cta& cta = *w.cluster->ctas[high - 1];
  if (cta.warps_left == 0) {
    fault(w, lanes, "cluster-exit",
          "access to the shared memory of CTA rank " + std::to_string(cta.rank) + ", which has exited", address);
  }
  return cta;
}

void check_shared(Warp& w, Mask lanes, const Cta& cta, uint32_t offset, uint64_t bytes) {
  if (offset + bytes > cta.shared_bytes) {
    fault(w, lanes, "out-of-bounds",
          std::to_string(bytes) + " bytes at shared address " + hex(offset) + " of CTA rank " +
              std::to_string(cta.rank) + ", which has " + std::to_string(cta.shared_bytes) + " bytes",
          offset);
  }
}

void check_global(Warp& w, Mask lanes, uint64_t address, uint64_t bytes, bool write) {
  range_of(w, lanes, address, bytes, write);
}

void resolve(Warp& w, Mask mask, Space space, const uint64_t* addresses, uint32_t bytes, Access access, Scope scope,
             Order order, Lookup& out) {
  check_alignment(w, mask, addresses, bytes);
  if (space == Space::kGeneric) {
    Mask shared = 0, local = 0;
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t window = addresses[l] & kWindowMask;
      shared |= Mask(window == kSharedWindow) << l;
      local |= Mask(window == kLocalWindow) << l;
    }
    shared &= mask;
    local &= mask;
    const Mask global = mask & ~shared & ~local;
    alignas(64) uint64_t offsets[kLanes];
    if (shared | local) {
      for (int l = 0; l < kLanes; ++l) offsets[l] = addresses[l] & ~kWindowMask;
    }
    Lookup part;
    auto take = [&](Mask lanes) {
      for (int l = 0; l < kLanes; ++l) out.data[l] = lanes >> l & 1 ? part.data[l] : out.data[l];
    };
    if (shared) {
      resolve(w, shared, Space::kShared, offsets, bytes, access, scope, order, part);
      take(shared);
    }
    if (local) {
      resolve(w, local, Space::kLocal, offsets, bytes, access, scope, order, part);
      take(local);
    }
    if (global) {
      resolve_global(w, global, addresses, bytes, access, scope, order, part);
      take(global);
    }
    return;
  }
  if (space == Space::kShared) return resolve_shared(w, mask, addresses, bytes, access, scope, order, out);
  if (space == Space::kLocal || space == Space::kCallParam) {
    const bool call = space == Space::kCallParam;
    const uint64_t size = call ? w.launch->program->call_bytes : w.launch->program->local_bytes;
    std::vector<uint8_t>& storage = call ? w.call_parameters : w.local;
    if (storage.empty()) storage.resize(size * kLanes);
    for (int l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      if (addresses[l] + bytes > size) {
        fault(w, 1u << l, "out-of-bounds", std::to_string(bytes) + " bytes at local address " + hex(addresses[l]),
              addresses[l]);
      }
      out.data[l] = storage.data() + l * size + addresses[l];
    }
    return;
  }
  resolve_global(w, mask, addresses, bytes, access, scope, order, out);
}

}  // namespace flash_ext::emulator
