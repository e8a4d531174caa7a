// The global memory of the emulated GPU: cudaMalloc'ed blocks, which any launch may touch, and the
// tensors that an op body registers for the launches of its own thread.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "checks.h"
#include "machine.h"

namespace flash_ext::emulator {

class DeviceMemory {
 public:
  // Poisoned with NaN. Null when the host has no memory left.
  void* allocate(size_t bytes, Role role, const std::string& name);
  bool release(void* pointer);  // false: not an allocation
  std::optional<MemoryRange> find_allocation(const void* pointer);

  // Overlapping ranges of one thread are united; roles that differ become kInOut.
  void add(const void* pointer, size_t bytes, Role role, const std::string& name);
  void clear();  // of this thread

  // Bytes that the host wrote through the runtime.
  void host_write(const void* pointer, size_t bytes);

  // What a launch of this thread may touch. With checks every range has a shadow from here on.
  MemoryMap map(bool checks);

  // Held while a launch uses the shadow.
  std::mutex& shadow_mutex() { return mutex_; }
  GlobalShadow& shadow() { return shadow_; }
  void track_from_start(bool on);  // shadow ranges as soon as they are added

 private:
  void shadow_add(const MemoryRange& range, bool initialised);
  void shadow_remove(uint64_t begin);

  std::mutex mutex_;
  std::map<uint64_t, MemoryRange> allocations_;
  std::map<uint64_t, uint64_t> shadowed_;  // begin -> bytes
  GlobalShadow shadow_;
  bool track_from_start_ = false;
};

}  // namespace flash_ext::emulator
