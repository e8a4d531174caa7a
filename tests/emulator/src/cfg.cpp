// Control flow of a decoded kernel: where diverged lanes meet again, and which registers may share
// a slot of the frame.
#include <algorithm>
#include <cstring>

#include "decode.h"

namespace flash_ext::emulator {

namespace {

class Bits {
 public:
  explicit Bits(size_t count) : words_((count + 63) / 64) {}
  bool test(size_t i) const { return words_[i / 64] >> (i % 64) & 1; }
  void set(size_t i) { words_[i / 64] |= uint64_t(1) << (i % 64); }
  void reset(size_t i) { words_[i / 64] &= ~(uint64_t(1) << (i % 64)); }
  void clear() { std::fill(words_.begin(), words_.end(), 0); }
  bool merge(const Bits& other) {
    bool changed = false;
    for (size_t i = 0; i < words_.size(); ++i) {
      const uint64_t merged = words_[i] | other.words_[i];
      changed |= merged != words_[i];
      words_[i] = merged;
    }
    return changed;
  }
  template <class F>
  void for_each(F&& f) const {
    for (size_t w = 0; w < words_.size(); ++w) {
      for (uint64_t rest = words_[w]; rest; rest &= rest - 1) f(w * 64 + __builtin_ctzll(rest));
    }
  }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace

// Immediate post-dominators, with the iterative algorithm of Cooper, Harvey and Kennedy on the
// reversed graph; node `count` is the common exit.
void find_reconvergence(Program& program) {
  const uint32_t count = static_cast<uint32_t>(program.blocks.size());
  std::vector<std::vector<uint32_t>> predecessors(count + 1);
  for (uint32_t b = 0; b < count; ++b) {
    for (const uint32_t s : program.blocks[b].successors) predecessors[s].push_back(b);
    if (program.blocks[b].successors.empty()) predecessors[count].push_back(b);
  }
  std::vector<uint32_t> order, number(count + 1, UINT32_MAX);
  std::vector<std::pair<uint32_t, size_t>> stack = {{count, 0}};
  std::vector<bool> seen(count + 1, false);
  seen[count] = true;
  while (!stack.empty()) {
    auto& [node, next] = stack.back();
    if (next < predecessors[node].size()) {
      const uint32_t p = predecessors[node][next++];
      if (!seen[p]) {
        seen[p] = true;
        stack.push_back({p, 0});
      }
    } else {
      number[node] = static_cast<uint32_t>(order.size());
      order.push_back(node);
      stack.pop_back();
    }
  }
  std::vector<uint32_t> dominator(count + 1, UINT32_MAX);
  dominator[count] = count;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = order.size(); i-- > 0;) {
      const uint32_t node = order[i];
      if (node == count) continue;
      uint32_t found = UINT32_MAX;
      auto meet = [&](uint32_t other) {
        if (number[other] == UINT32_MAX || dominator[other] == UINT32_MAX) return;
        if (found == UINT32_MAX) {
          found = other;
          return;
        }
        while (found != other) {
          while (number[found] < number[other]) found = dominator[found];
          while (number[other] < number[found]) other = dominator[other];
        }
      };
      const Block& block = program.blocks[node];
      for (const uint32_t s : block.successors) meet(s);
      if (block.successors.empty()) meet(count);
      if (found != dominator[node]) {
        dominator[node] = found;
        changed = true;
      }
    }
  }
  for (uint32_t b = 0; b < count; ++b) {
    const uint32_t d = dominator[b];
    program.blocks[b].reconverge = d < count ? program.blocks[d].begin : UINT32_MAX;
  }
}

// Live ranges as intervals of the linear order, then a linear scan. Lanes write only their own part
// of a slot, so divergence needs no care. Operands of wgmma stay live until a wait for all groups.
void compact_registers(Program& program, const std::vector<Ref>& slots) {
  const size_t registers = slots.size(), blocks = program.blocks.size();
  std::vector<Bits> in(blocks, Bits(registers)), out(blocks, Bits(registers));
  std::vector<Bits> flying_out(blocks, Bits(registers));

  auto step_back = [&](uint32_t i, Bits& live) {
    const RegisterUses& uses = program.uses[i];
    if (program.code[i].guard == kNoRef) {
      for (const uint32_t r : uses.writes) live.reset(r);
    }
    for (const uint32_t r : uses.reads) live.set(r);
    if (uses.guard >= 0) live.set(uses.guard);
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;) {
      const Block& block = program.blocks[b];
      bool grew = false;
      for (const uint32_t s : block.successors) grew |= out[b].merge(in[s]);
      Bits live = out[b];
      for (uint32_t i = block.end; i-- > block.begin;) step_back(i, live);
      changed |= in[b].merge(live) || grew;
    }
  }
  std::vector<std::vector<size_t>> predecessors(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    for (const uint32_t s : program.blocks[b].successors) predecessors[s].push_back(b);
  }
  auto step_flight = [&](uint32_t i, Bits& flying) {
    const Inst& inst = program.code[i];
    if (inst.flags & kFlagAsyncRead) {
      for (const uint32_t r : program.uses[i].reads) flying.set(r);
      for (const uint32_t r : program.uses[i].writes) flying.set(r);
    }
    if ((inst.flags & kFlagWgmmaWait) && inst.imm == 0) flying.clear();
  };
  auto flight_in = [&](size_t b) {
    Bits flying(registers);
    for (const size_t p : predecessors[b]) flying.merge(flying_out[p]);
    return flying;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = 0; b < blocks; ++b) {
      Bits flying = flight_in(b);
      for (uint32_t i = program.blocks[b].begin; i < program.blocks[b].end; ++i) {
        step_flight(i, flying);
      }
      changed |= flying_out[b].merge(flying);
    }
  }

  std::vector<uint32_t> first(registers, UINT32_MAX), last(registers, 0);
  auto touch = [&](size_t r, uint32_t at) {
    first[r] = std::min(first[r], at);
    last[r] = std::max(last[r], at);
  };
  for (size_t b = 0; b < blocks; ++b) {
    const Block& block = program.blocks[b];
    in[b].for_each([&](size_t r) { touch(r, block.begin); });
    out[b].for_each([&](size_t r) { touch(r, block.end); });
    Bits flying = flight_in(b);
    flying.for_each([&](size_t r) { touch(r, block.begin); });
    for (uint32_t i = block.begin; i < block.end; ++i) {
      for (const uint32_t r : program.uses[i].reads) touch(r, i);
      for (const uint32_t r : program.uses[i].writes) touch(r, i);
      if (program.uses[i].guard >= 0) touch(program.uses[i].guard, i);
      if ((program.code[i].flags & kFlagWgmmaWait) && program.code[i].imm == 0) {
        flying.for_each([&](size_t r) { touch(r, i); });
      }
      step_flight(i, flying);
    }
    flying.for_each([&](size_t r) { touch(r, block.end); });
  }

  std::vector<uint32_t> order;
  for (uint32_t r = 0; r < registers; ++r) {
    if (first[r] != UINT32_MAX) order.push_back(r);
  }
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return first[a] < first[b]; });
  const uint32_t base = slots.empty() ? 0 : *std::min_element(slots.begin(), slots.end());
  auto size_of = [&](uint32_t r) {
    const PtxType type = program.function->registers[r].type;
    return type == PtxType::kPred ? 4u : type_bytes(type) <= 4 ? 128u : 32 * type_bytes(type);
  };
  std::unordered_map<uint32_t, std::vector<uint32_t>> free;  // by size
  using Ending = std::pair<uint32_t, uint32_t>;
  std::vector<Ending> active;
  auto later = [](const Ending& a, const Ending& b) { return a.first > b.first; };
  std::unordered_map<Ref, Ref> moved;
  std::vector<uint32_t> place(registers, 0);
  uint32_t end = (base + 63) / 64 * 64;
  for (const uint32_t r : order) {
    while (!active.empty() && active.front().first < first[r]) {
      const uint32_t gone = active.front().second;
      std::pop_heap(active.begin(), active.end(), later);
      active.pop_back();
      free[size_of(gone)].push_back(place[gone]);
    }
    const uint32_t bytes = size_of(r);
    std::vector<uint32_t>& list = free[bytes];
    if (list.empty()) {
      // Predicates come in packs, so that the lane arrays stay aligned.
      const uint32_t pack = bytes == 4 ? 16 : 1;
      for (uint32_t i = pack; i-- > 0;) list.push_back(end + i * bytes);
      end += pack * bytes;
    }
    place[r] = list.back();
    list.pop_back();
    active.push_back({last[r], r});
    std::push_heap(active.begin(), active.end(), later);
    moved[slots[r]] = place[r];
  }
  auto move = [&](Ref& ref) {
    if (ref == kNoRef || ref & kConstantBit) return;
    const auto found = moved.find(ref & kOffsetMask);
    if (found != moved.end()) ref = found->second | (ref & kNegateBit);
  };
  for (Inst& inst : program.code) {
    if (!(inst.flags & kFlagPlainExtra)) {
      for (uint32_t k = 0; k < inst.num_extra; ++k) move(program.refs[inst.extra + k]);
    }
    for (Ref* ref : {&inst.guard, &inst.member, &inst.d, &inst.a, &inst.b, &inst.c}) move(*ref);
  }
  program.frame_bytes = (end + 63) / 64 * 64;
}

}  // namespace flash_ext::emulator
