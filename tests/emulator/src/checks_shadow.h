// Shadow cells: what happened last to each 16 bytes of memory, or to each byte where they differ.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "checks_clock.h"

namespace flash_ext::emulator {

constexpr uint32_t kGranule = 16;

// `write`: the last plain write. `access`: what came since, plain reads and strong operations; one
// epoch or a link to a set of them. A split cell keeps a link in `write` to one cell per byte.
template <class E>
struct Cell {
  E write, access;
  bool operator==(const Cell&) const = default;
};

enum class Problem : uint8_t { kNone, kRace, kUninitialised, kProxy };

template <class E>
struct Outcome {
  Problem problem = Problem::kNone;
  E other;  // of a race, or the write that the async proxy cannot see
};

template <class E>
struct Operation {
  E epoch;
  bool reads, writes;
  bool async;  // through the async proxy
  bool check_defined = true;

  bool plain_write() const { return writes && epoch.scope() == Scope::kWeak; }
};

// Access sets and split cells of one memory.
template <class E>
class ShadowPools {
 public:
  using Split = std::array<Cell<E>, kGranule>;

  struct Set {
    const E* begin_;
    const E* end_;
    const E* begin() const { return begin_; }
    const E* end() const { return end_; }
  };
  // The members of an `access` field; `single` must outlive the result.
  Set members(const E& single) const {
    if (single.none()) return {&single, &single};
    if (!single.is_set()) return {&single, &single + 1};
    const auto [first, count] = sets_[single.link()];
    return {members_.data() + first, members_.data() + first + count};
  }
  E make_set(const std::vector<E>& members) {
    if (members.empty()) return E();
    if (members.size() == 1) return members[0];
    E link;
    link.set_link(Epoch::kSetLink, uint32_t(sets_.size()));
    sets_.push_back({members_.size(), uint32_t(members.size())});
    members_.insert(members_.end(), members.begin(), members.end());
    return link;
  }

  Split& split(const E& link) { return splits_[link.link()]; }
  E make_split(const Cell<E>& cell) {
    E link;
    uint32_t index;
    if (free_splits_.empty()) {
      index = uint32_t(splits_.size());
      splits_.emplace_back();
    } else {
      index = free_splits_.back();
      free_splits_.pop_back();
    }
    splits_[index].fill(cell);
    link.set_link(Epoch::kSplitLink, index);
    return link;
  }
  void free_split(const E& link) { free_splits_.push_back(link.link()); }

  std::vector<E>& scratch() { return scratch_; }

  bool crowded() const { return members_.size() > limit_; }
  // Drops sets that no cell uses any more. `for_each` calls its argument with every top-level cell.
  template <class ForEachCell>
  void compact(ForEachCell&& for_each) {
    std::vector<E> old_members;
    std::vector<SetPlace> old_sets;
    old_members.swap(members_);
    old_sets.swap(sets_);
    std::vector<uint32_t> moved(old_sets.size(), kNotMoved);
    auto move = [&](Cell<E>& cell) {
      if (!cell.access.is_set()) return;
      uint32_t& target = moved[cell.access.link()];
      if (target == kNotMoved) {
        const auto [first, count] = old_sets[cell.access.link()];
        target = uint32_t(sets_.size());
        sets_.push_back({members_.size(), count});
        members_.insert(members_.end(), old_members.begin() + first, old_members.begin() + first + count);
      }
      cell.access.set_link(Epoch::kSetLink, target);
    };
    for_each([&](Cell<E>& cell) {
      if (cell.write.is_split()) {
        for (Cell<E>& byte : split(cell.write)) move(byte);
      } else {
        move(cell);
      }
    });
    limit_ = std::max(kFirstLimit, 4 * members_.size());
  }
  void clear_sets() {
    sets_.clear();
    members_.clear();
    limit_ = kFirstLimit;
  }

 private:
  struct SetPlace {
    size_t first;
    uint32_t count;
  };
  static constexpr size_t kFirstLimit = size_t(1) << 20;
  static constexpr uint32_t kNotMoved = ~0u;

  std::vector<SetPlace> sets_;
  std::vector<E> members_;
  std::vector<Split> splits_;
  std::vector<uint32_t> free_splits_;
  std::vector<E> scratch_;
  size_t limit_ = kFirstLimit;
};

// Applies one operation to many cells. Neighbouring cells mostly have equal contents: the last
// transition is remembered, so that a range costs a comparison and a copy per cell.
//
// Judge: bool ordered(E) const: the operation comes after it; bool proxied(E) const: if it is a
// generic write, the async proxy sees it; bool in_scope(E) const: both scopes hold both agents.
template <class E, class Judge>
class ShadowCursor {
 public:
  ShadowCursor(ShadowPools<E>& pools, const Judge& judge, const Operation<E>& operation)
      : pools_(pools), judge_(judge), operation_(operation) {}

  // `bytes`: mask of the cell's 16 bytes.
  void apply(Cell<E>& cell, uint32_t bytes) {
    if (remembered_ && bytes == 0xffff && cell == before_) {
      cell = after_;
    } else {
      apply_slowly(cell, bytes);
    }
  }

  const Outcome<E>& outcome() const { return outcome_; }
  bool found() const { return outcome_.problem != Problem::kNone; }

 private:
  [[gnu::noinline]] void apply_slowly(Cell<E>& cell, uint32_t bytes) {
    if (!cell.write.is_split()) {
      if (bytes == 0xffff) return step(cell);
      Cell<E> changed = cell;
      step(changed);
      if (changed == cell) return;
      const E link = pools_.make_split(cell);
      cell.write = link;
      cell.access = E();
      for (uint32_t left = bytes; left; left &= left - 1) pools_.split(link)[__builtin_ctz(left)] = changed;
      return;
    }
    auto& split = pools_.split(cell.write);
    for (uint32_t left = bytes; left; left &= left - 1) step(split[__builtin_ctz(left)]);
    for (const Cell<E>& byte : split)
      if (byte != split[0]) return;
    const Cell<E> whole = split[0];
    pools_.free_split(cell.write);
    cell = whole;
  }

  void step(Cell<E>& cell) {
    if (remembered_ && cell == before_) {
      cell = after_;
      return;
    }
    before_ = cell;
    check(cell);
    update(cell);
    after_ = cell;
    remembered_ = true;
  }

  void note(Problem problem, const E& other) {
    if (!found()) outcome_ = {problem, other};
  }

  bool conflicts(const E& other) const {
    if (!other.writes() && !operation_.writes) return false;
    const bool both_strong = operation_.epoch.scope() != Scope::kWeak && other.scope() != Scope::kWeak;
    return !(both_strong && judge_.in_scope(other));
  }

  void check_write(const E& write) {
    if (conflicts(write) && !judge_.ordered(write)) {
      note(Problem::kRace, write);
    } else if (operation_.async && !judge_.proxied(write)) {
      note(Problem::kProxy, write);
    }
  }

  void check(const Cell<E>& cell) {
    bool defined = !cell.write.none();
    if (defined) check_write(cell.write);
    for (const E& other : pools_.members(cell.access)) {
      if (other.writes()) {
        defined = true;
        check_write(other);
      } else if (conflicts(other) && !judge_.ordered(other)) {
        note(Problem::kRace, other);
      }
    }
    if (operation_.reads && operation_.check_defined && !defined) note(Problem::kUninitialised, E());
  }

  // `newer` stands for `older` in every later check.
  static bool covers(const E& newer, const E& older) {
    return newer.writes() >= older.writes() && newer.scope() <= older.scope();
  }

  void update(Cell<E>& cell) {
    const E& epoch = operation_.epoch;
    if (operation_.plain_write()) {
      cell.write = epoch;
      cell.access = E();
      return;
    }
    std::vector<E>& kept = pools_.scratch();
    kept.clear();
    for (const E& other : pools_.members(cell.access)) {
      if (other.same_agent(epoch) && other.clock() == epoch.clock() && covers(other, epoch)) return;
      if (!(covers(epoch, other) && (other.same_agent(epoch) || judge_.ordered(other)))) kept.push_back(other);
    }
    kept.push_back(epoch);
    cell.access = pools_.make_set(kept);
  }

  ShadowPools<E>& pools_;
  const Judge& judge_;
  Operation<E> operation_;
  Outcome<E> outcome_;
  Cell<E> before_, after_;
  bool remembered_ = false;
};

// Calls f(granule address, byte mask) for what `lanes` access, merging neighbours.
template <class Address, class F>
void for_each_granule(const Address* addresses, uint32_t lanes, uint32_t bytes, F&& f) {
  if (bytes == kGranule) {
    Address bits = 0;
    for (uint32_t left = lanes; left; left &= left - 1) bits |= addresses[__builtin_ctz(left)];
    if (bits % kGranule == 0) {
      for (uint32_t left = lanes; left; left &= left - 1) f(addresses[__builtin_ctz(left)], 0xffffu);
      return;
    }
  }
  Address granule = ~Address(0);
  uint32_t mask = 0;
  for (uint32_t left_lanes = lanes; left_lanes; left_lanes &= left_lanes - 1) {
    Address address = addresses[__builtin_ctz(left_lanes)];
    for (uint32_t left = bytes; left;) {
      const Address base = address & ~Address(kGranule - 1);
      const uint32_t first = uint32_t(address - base);
      const uint32_t count = std::min(left, kGranule - first);
      if (base != granule) {
        if (mask) f(granule, mask);
        granule = base;
        mask = 0;
      }
      mask |= ((1u << count) - 1) << first;
      address += count;
      left -= count;
    }
  }
  if (mask) f(granule, mask);
}

template <class Address, class F>
void for_each_granule_of_range(Address begin, uint32_t bytes, F&& f) {
  const Address end = begin + bytes;
  for (Address base = begin & ~Address(kGranule - 1); base < end; base += kGranule) {
    const uint32_t first = begin > base ? uint32_t(begin - base) : 0;
    const uint32_t last = uint32_t(std::min<Address>(kGranule, end - base));
    f(base, ((1u << last) - 1) & ~((1u << first) - 1));
  }
}

}  // namespace flash_ext::emulator
