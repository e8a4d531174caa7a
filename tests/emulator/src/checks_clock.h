// Epochs and vector clocks of the happens-before engine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "checks.h"

namespace flash_ext::emulator {

// One access: agent:12 | clock:28 | pc:21 | scope:2 | writes:1. Zero: never accessed.
struct Epoch {
  uint64_t bits = 0;

  static constexpr uint32_t kMaxAgents = 4094;  // the last two mark links into the pools
  static constexpr uint32_t kSetLink = 4095, kSplitLink = 4094;

  Epoch() = default;
  Epoch(uint32_t agent, uint32_t clock, uint32_t pc, Scope scope, bool writes)
      : bits(uint64_t(agent) << 52 | uint64_t(clock & 0xfffffff) << 24 | uint64_t(pc & 0x1fffff) << 3 |
             uint64_t(scope) << 1 | uint64_t(writes)) {}

  uint32_t agent() const { return uint32_t(bits >> 52); }
  uint32_t clock() const { return uint32_t(bits >> 24) & 0xfffffff; }
  uint32_t pc() const { return uint32_t(bits >> 3) & 0x1fffff; }
  Scope scope() const { return Scope(bits >> 1 & 3); }
  bool writes() const { return bits & 1; }
  bool none() const { return bits == 0; }

  void set_link(uint32_t mark, uint32_t index) { bits = uint64_t(mark) << 52 | index; }
  bool is_set() const { return agent() == kSetLink; }
  bool is_split() const { return agent() == kSplitLink; }
  uint32_t link() const { return uint32_t(bits); }
  bool same_agent(const Epoch& other) const { return agent() == other.agent(); }
  bool operator==(const Epoch&) const = default;
};

// Agents are numbered per cluster; in global memory the cluster's number (its domain) goes along.
struct GlobalEpoch : Epoch {
  uint32_t domain = 0;

  GlobalEpoch() = default;
  GlobalEpoch(uint32_t domain, Epoch epoch) : Epoch(epoch), domain(domain) {}
  bool same_agent(const GlobalEpoch& other) const { return domain == other.domain && agent() == other.agent(); }
  bool operator==(const GlobalEpoch&) const = default;
};

class VectorClock {
 public:
  uint32_t get(uint32_t agent) const { return agent < clocks_.size() ? clocks_[agent] : 0; }
  void raise(uint32_t agent, uint32_t clock) {
    if (agent >= clocks_.size()) clocks_.resize((agent + 16) & ~15u, 0);
    clocks_[agent] = std::max(clocks_[agent], clock);
  }
  void join(const VectorClock& other) {
    if (other.clocks_.size() > clocks_.size()) clocks_.resize(other.clocks_.size(), 0);
    for (size_t i = 0; i < other.clocks_.size(); ++i) clocks_[i] = std::max(clocks_[i], other.clocks_[i]);
  }
  void meet(const VectorClock& other) {
    for (size_t i = 0; i < clocks_.size(); ++i) clocks_[i] = std::min(clocks_[i], other.get(i));
  }
  uint32_t size() const { return uint32_t(clocks_.size()); }

 private:
  std::vector<uint32_t> clocks_;
};

// What is known of other clusters, by acquiring something that they released. Immutable, shared.
struct ForeignClocks {
  struct Entry {
    VectorClock order, shared_proxy, global_proxy;
  };
  std::map<uint32_t, Entry> domains;
};
using Foreign = std::shared_ptr<const ForeignClocks>;

Foreign join_foreign(const Foreign& a, const Foreign& b);

// `order`: what happened before. The proxy clocks: which of the generic writes among it the async
// proxy sees, in shared and in global memory.
struct Clock {
  VectorClock order, shared_proxy, global_proxy;
  Foreign foreign;

  void join(const Clock& other) {
    order.join(other.order);
    shared_proxy.join(other.shared_proxy);
    global_proxy.join(other.global_proxy);
    if (other.foreign && other.foreign != foreign) foreign = join_foreign(foreign, other.foreign);
  }
};

}  // namespace flash_ext::emulator
