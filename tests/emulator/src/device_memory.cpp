#include "device_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace flash_ext::emulator {
namespace {

constexpr size_t kAlignment = 256;  // as cudaMalloc promises
constexpr int kPoison = 0xff;       // NaN in every floating-point format

using Ranges = std::map<uint64_t, MemoryRange>;

uint64_t end_of(const MemoryRange& range) { return range.begin + range.bytes; }

Ranges& thread_ranges() {
  thread_local Ranges ranges;
  return ranges;
}

// Adds a range to disjoint ones, uniting it with those that overlap. Calls `dropped` for those.
template <class Dropped>
MemoryRange unite(Ranges& ranges, MemoryRange range, Dropped&& dropped) {
  auto at = ranges.lower_bound(range.begin);
  if (at != ranges.begin() && end_of(std::prev(at)->second) > range.begin) --at;
  uint64_t end = end_of(range);
  while (at != ranges.end() && at->first < end) {
    const MemoryRange& old = at->second;
    if (old.name != range.name) range.name = old.name + "+" + range.name;
    if (old.role != range.role) range.role = Role::kInOut;
    range.begin = std::min(range.begin, old.begin);
    end = std::max(end, end_of(old));
    dropped(old.begin);
    at = ranges.erase(at);
  }
  range.bytes = end - range.begin;
  return ranges[range.begin] = range;
}

}  // namespace

void* DeviceMemory::allocate(size_t bytes, Role role, const std::string& name) {
  // Room behind the block keeps blocks from touching: an overrun never lands in a neighbour.
  const size_t room = (bytes / kAlignment + 2) * kAlignment;
  void* const memory = std::aligned_alloc(kAlignment, room);
  if (!memory) return nullptr;
  std::memset(memory, kPoison, bytes);
  const MemoryRange range{reinterpret_cast<uint64_t>(memory), bytes, role, name};
  std::lock_guard lock(mutex_);
  allocations_[range.begin] = range;
  if (track_from_start_) shadow_add(range, false);
  return memory;
}

bool DeviceMemory::release(void* pointer) {
  {
    std::lock_guard lock(mutex_);
    if (!allocations_.erase(reinterpret_cast<uint64_t>(pointer))) return false;
    shadow_remove(reinterpret_cast<uint64_t>(pointer));
  }
  std::free(pointer);
  return true;
}

std::optional<MemoryRange> DeviceMemory::find_allocation(const void* pointer) {
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  std::lock_guard lock(mutex_);
  auto at = allocations_.upper_bound(address);
  if (at == allocations_.begin() || address >= end_of((--at)->second)) return std::nullopt;
  return at->second;
}

void DeviceMemory::add(const void* pointer, size_t bytes, Role role, const std::string& name) {
  if (bytes == 0) return;
  std::lock_guard lock(mutex_);
  const auto range = unite(thread_ranges(), {reinterpret_cast<uint64_t>(pointer), bytes, role, name},
                           [&](uint64_t begin) { shadow_remove(begin); });
  if (track_from_start_) shadow_add(range, false);
}

void DeviceMemory::clear() {
  std::lock_guard lock(mutex_);
  for (const auto& [begin, range] : thread_ranges()) shadow_remove(begin);
  thread_ranges().clear();
}

void DeviceMemory::host_write(const void* pointer, size_t bytes) {
  std::lock_guard lock(mutex_);
  if (!shadowed_.empty() && bytes) shadow_.host_write(reinterpret_cast<uint64_t>(pointer), bytes);
}

MemoryMap DeviceMemory::map(bool checks) {
  std::lock_guard lock(mutex_);
  Ranges ranges = thread_ranges();
  for (const auto& [begin, range] : allocations_) {
    unite(ranges, range, [&](uint64_t dropped) { shadow_remove(dropped); });
  }
  MemoryMap map;
  for (const auto& [begin, range] : ranges) {
    map.add(reinterpret_cast<const void*>(begin), range.bytes, range.role, range.name);
    // Nobody watched it until now, so what it holds counts as written.
    if (checks && !shadowed_.contains(begin)) shadow_add(range, true);
  }
  return map;
}

void DeviceMemory::track_from_start(bool on) {
  std::lock_guard lock(mutex_);
  track_from_start_ = on;
  if (on) return;
  // Launches without checks write unseen.
  while (!shadowed_.empty()) shadow_remove(shadowed_.begin()->first);
}

void DeviceMemory::shadow_add(const MemoryRange& range, bool initialised) {
  const Role role = initialised && range.role != Role::kIn ? Role::kInOut : range.role;
  shadow_.add(range.begin, range.bytes, role);
  shadowed_[range.begin] = range.bytes;
}

void DeviceMemory::shadow_remove(uint64_t begin) {
  if (shadowed_.erase(begin)) shadow_.remove(begin);
}

}  // namespace flash_ext::emulator
