// Virtual registers: definedness, and what wgmma does with them and with its shared operands.
#include "checks_state.h"

namespace flash_ext::emulator {

bool ClusterChecks::State::use_register(const Where& at, WarpShadow& warp, uint32_t id, bool writes) {
  RegisterShadow& reg = warp.registers[id];
  if (reg.group <= warp.wgmma_waited) return false;
  report(fault_kind::kWgmmaRegister, at, id,
         launch.register_name(id) + (writes ? " written" : " read") + " while the wgmma" + place(reg.pc) + " still " +
             (reg.accumulator ? "accumulates in it" : "reads it") + ": no wgmma.wait_group in between");
  return true;
}

void ClusterChecks::registers(const Where& at, std::span<const uint32_t> reads, std::span<const uint32_t> writes,
                              bool sink) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  const bool in_flight = me.busy_until > me.wgmma_waited;
  uint32_t undefined = 0;
  for (const uint32_t id : reads) {
    RegisterShadow& reg = me.registers[id];
    if (in_flight) s.use_register(at, me, id, false);
    const uint32_t missing = at.lanes & ~reg.defined;
    if (missing && sink)
      s.report(fault_kind::kUninitialisedRegister, {at.cta, at.warp, missing, at.pc}, id,
               s.launch.register_name(id) + " was never written in these lanes, or from such a register");
    undefined |= missing;
    reg.touched = me.fence_interval;
  }
  for (const uint32_t id : writes) {
    RegisterShadow& reg = me.registers[id];
    if (in_flight) s.use_register(at, me, id, true);
    reg.defined = (reg.defined & ~undefined) | (at.lanes & ~undefined);
    reg.touched = me.fence_interval;
  }
}

void ClusterChecks::select_register(const Where& at, uint32_t destination, uint32_t a, uint32_t b, uint32_t first) {
  State& s = *state_;
  const WarpShadow& me = s.warp(at);
  const uint32_t known = (me.registers[a].defined & first) | (me.registers[b].defined & ~first);
  const uint32_t sources[] = {a, b};
  registers(at, sources, {&destination, 1}, false);
  RegisterShadow& reg = s.warp(at).registers[destination];
  reg.defined = (reg.defined & ~at.lanes) | (known & at.lanes);
}

void ClusterChecks::wgmma_fence(const Where& at) { ++state_->warp(at).fence_interval; }

void ClusterChecks::wgmma_registers(const Where& at, std::span<const uint32_t> a, std::span<const uint32_t> d,
                                    bool reads_d, uint32_t shape) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  const uint32_t group = me.wgmma_committed + 1;
  if (me.fence_interval == 0)
    s.report(fault_kind::kWgmmaFence, at, 0, "the warp's first wgmma comes before any wgmma.fence");

  auto require_fence = [&](const RegisterShadow& reg, uint32_t id) {
    if (me.fence_interval && reg.touched == me.fence_interval)
      s.report(fault_kind::kWgmmaFence, at, id,
               s.launch.register_name(id) + " was accessed by another instruction since the last wgmma.fence");
  };
  auto require_defined = [&](const RegisterShadow& reg, uint32_t id) {
    if (const uint32_t missing = at.lanes & ~reg.defined)
      s.report(fault_kind::kUninitialisedRegister, {at.cta, at.warp, missing, at.pc}, id,
               s.launch.register_name(id) + " was never written in these lanes, or from such a register");
  };
  for (const uint32_t id : a) {
    RegisterShadow& reg = me.registers[id];
    if (reg.accumulator) s.use_register(at, me, id, false);
    require_fence(reg, id);
    require_defined(reg, id);
    reg.group = group;
    reg.interval = me.fence_interval;
    reg.shape = shape;
    reg.pc = at.pc;
    reg.accumulator = false;
  }
  for (const uint32_t id : d) {
    RegisterShadow& reg = me.registers[id];
    const bool chained = reg.accumulator && reg.shape == shape;
    if (!chained && !s.use_register(at, me, id, true) && reg.group && reg.interval == me.fence_interval)
      s.report(fault_kind::kWgmmaFence, at, id,
               s.launch.register_name(id) + " was used by the wgmma of another shape or role" + s.place(reg.pc) +
                   " since the last wgmma.fence");
    require_fence(reg, id);
    if (reads_d) require_defined(reg, id);
    reg.defined |= at.lanes;
    reg.group = group;
    reg.interval = me.fence_interval;
    reg.shape = shape;
    reg.pc = at.pc;
    reg.accumulator = true;
  }
  if (!a.empty() || !d.empty()) me.busy_until = group;
}

const std::vector<uint32_t>& OperandChunks::find(uint64_t descriptor, bool mn_major, uint32_t extent, bool is_a) {
  const MatrixDescriptor layout = decode_descriptor(descriptor);
  // The swizzle repeats after 1 KiB: up to there the start is part of the pattern.
  const uint32_t shift = layout.start & ~1023u;
  const uint64_t pattern = descriptor & ~0x3fc0ull;
  const uint32_t shape = extent * 4 + mn_major * 2 + is_a;
  const uint64_t mixed = (pattern * 0x9e3779b97f4a7c15ull + shape) * 0x9e3779b97f4a7c15ull;
  Entry& entry = entries_[mixed >> 58];
  if (entry.pattern != pattern || entry.shape != shape) {
    entry.pattern = pattern;
    entry.shape = shape;
    entry.relative.clear();
    // wgmma's K is 32 bytes: two chunks of a row, or 16 rows of 16-bit elements.
    const uint32_t outer = mn_major ? 16 : extent, chunks = mn_major ? extent / 8 : 2;
    const uint32_t parts = is_a ? 4 : 1;
    for (uint32_t part = 0; part < parts; ++part) {
      const uint32_t rows = mn_major ? outer : outer / parts;
      const uint32_t columns = mn_major ? chunks / parts : chunks;
      for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t column = 0; column < columns; ++column)
          entry.relative.push_back((chunk_address(layout, mn_major, mn_major ? row : part * rows + row,
                                                  mn_major ? part * columns + column : column) &
                                    ~(kGranule - 1)) -
                                   shift);
    }
  }
  absolute_.resize(entry.relative.size());
  for (size_t i = 0; i < absolute_.size(); ++i) absolute_[i] = entry.relative[i] + shift;
  return absolute_;
}

void ClusterChecks::wgmma_shared(const Where& at, const WgmmaOp& op, uint64_t a_desc, uint64_t b_desc) {
  State& s = *state_;
  CtaShadow& cta = s.ctas[at.cta];
  const uint32_t number = at.warp / 4;
  if (cta.wgmma_agents.size() <= number) cta.wgmma_agents.resize(number + 1);
  uint32_t& agent = cta.wgmma_agents[number];
  if (!agent) agent = s.new_agent(AgentKind::kWgmma, at.cta, number);
  const Epoch read(agent, s.warp(at).wgmma_committed + 1, at.pc, Scope::kWeak, false);
  const Operation<Epoch> operation{read, true, false, true};

  // B is ordered after what all four warps have waited for; each quarter of A is its own warp's.
  VectorClock order = s.warp(at).clock.order, proxy = s.warp(at).clock.shared_proxy;
  const uint32_t first = 4 * number;
  for (uint32_t i = first; i < first + 4 && i < cta.warps.size(); ++i) {
    order.meet(cta.warps[i].clock.order);
    proxy.meet(cta.warps[i].clock.shared_proxy);
  }
  const auto& b = s.b_chunks.find(b_desc, op.mn_major_b, uint32_t(op.n), false);
  s.on_shared_chunks({at, at.cta, order, proxy, operation, "wgmma read (B)"}, b);
  if (op.a_in_registers) return;
  const auto& a = s.a_chunks.find(a_desc, op.mn_major_a, 64, true);
  const size_t quarter = a.size() / 4;
  for (uint32_t i = 0; i < 4 && first + i < cta.warps.size(); ++i) {
    const Clock& clock = cta.warps[first + i].clock;
    s.on_shared_chunks({at, at.cta, clock.order, clock.shared_proxy, operation, "wgmma read (A)"},
                       std::span(a).subspan(i * quarter, quarter));
  }
}

void ClusterChecks::wgmma_commit(const Where& at) { ++state_->warp(at).wgmma_committed; }

void ClusterChecks::wgmma_wait(const Where& at, uint32_t pending) {
  State& s = *state_;
  WarpShadow& me = s.warp(at);
  if (me.wgmma_committed <= pending) return;
  me.wgmma_waited = std::max(me.wgmma_waited, me.wgmma_committed - pending);
  const auto& agents = s.ctas[at.cta].wgmma_agents;
  if (at.warp / 4 < agents.size() && agents[at.warp / 4]) me.clock.order.raise(agents[at.warp / 4], me.wgmma_waited);
}

}  // namespace flash_ext::emulator
