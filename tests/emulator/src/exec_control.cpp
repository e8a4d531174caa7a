// Branches, exits, calls of what the system offers (printf, assert), sleeping.
#include <cstdio>
#include <cstring>

#include "lanes.h"

namespace flash_ext::emulator {

namespace {

Status branch(Warp& w, const Inst& i, Mask mask) {
  branch_to(w, i, mask, w.launch->program->targets[i.first_target]);
  return Status::kJump;
}
// brx.idx: one target per lane.
Status branch_table(Warp& w, const Inst& i, Mask mask) {
  const uint32_t* index = in<uint32_t>(w, i.a);
  const uint32_t first = index[first_lane(mask)];
  Mask same = 0;
  for (int l = 0; l < kLanes; ++l) same |= Mask((mask >> l & 1) && index[l] == first) << l;
  if (first >= i.num_targets) fault(w, same, "branch-table", "index " + std::to_string(first) + " has no target");
  branch_to(w, i, same, w.launch->program->targets[i.first_target + first]);
  return Status::kJump;
}
Status leave(Warp& w, const Inst&, Mask mask) {
  exit_lanes(w, mask);
  return Status::kJump;
}
Status trap(Warp& w, const Inst&, Mask mask) { fault(w, mask, "trap", "the kernel executed trap"); }
Status sleep(Warp&, const Inst&, Mask) { return Status::kYield; }
Status nothing(Warp&, const Inst&, Mask) { return Status::kNext; }

const char* string_at(Warp& w, Mask lanes, uint64_t address) {
  check_global(w, lanes, address, 1, false);
  return reinterpret_cast<const char*>(address);
}

// printf: the format, then a buffer of 4 and 8-byte arguments at their natural alignment.
std::string format_lane(Warp& w, int lane, const char* format, uint64_t arguments) {
  std::string out;
  uint64_t at = 0;
  auto fetch = [&](uint32_t bytes) {
    at = (at + bytes - 1) / bytes * bytes;
    uint64_t addresses[kLanes] = {};
    addresses[lane] = arguments + at;
    Lookup found;
    resolve(w, 1u << lane, Space::kGeneric, addresses, bytes, Access::kRead, Scope::kWeak, Order::kRelaxed, found);
    uint64_t value = 0;
    std::memcpy(&value, found.data[lane], bytes);
    at += bytes;
    return value;
  };
  for (const char* c = format; *c; ++c) {
    if (*c != '%') {
      out += *c;
      continue;
    }
    std::string spec = "%";
    int longs = 0;
    for (++c; *c && std::strchr("-+ #0123456789.*hlzjtL", *c); ++c) {
      if (*c == '*') {
        spec += std::to_string(static_cast<int>(fetch(4)));
      } else if (*c == 'l' || *c == 'z' || *c == 'j' || *c == 't') {
        ++longs;
      } else if (*c != 'h' && *c != 'L') {
        spec += *c;
      }
    }
    char text[512];
    if (*c == 0) break;
    if (*c == '%') {
      out += '%';
      continue;
    }
    if (std::strchr("diuoxXc", *c)) {
      const bool is_signed = *c == 'd' || *c == 'i';
      const uint64_t value = fetch(longs && *c != 'c' ? 8 : 4);
      spec += *c == 'c' ? "c" : std::string("ll") + *c;
      const long long extended = longs || !is_signed ? static_cast<long long>(value) : static_cast<int32_t>(value);
      if (*c == 'c')
        std::snprintf(text, sizeof(text), spec.c_str(), static_cast<int>(value));
      else
        std::snprintf(text, sizeof(text), spec.c_str(), extended);
    } else if (std::strchr("fFeEgGaA", *c)) {
      spec += *c;
      std::snprintf(text, sizeof(text), spec.c_str(), std::bit_cast<double>(fetch(8)));
    } else if (*c == 's') {
      spec += 's';
      std::snprintf(text, sizeof(text), spec.c_str(), string_at(w, 1u << lane, fetch(8)));
    } else if (*c == 'p') {
      std::snprintf(text, sizeof(text), "%p", reinterpret_cast<void*>(fetch(8)));
    } else {
      continue;
    }
    out += text;
  }
  return out;
}

uint64_t call_argument(const Warp& w, const Inst& i, uint32_t k, int lane) {
  uint64_t value = 0;
  const uint32_t offset = w.launch->program->refs[i.extra + k];
  std::memcpy(&value, w.call_parameters.data() + lane * w.launch->program->call_bytes + offset, 8);
  return value;
}

Status call_printf(Warp& w, const Inst& i, Mask mask) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const std::string text =
        format_lane(w, l, string_at(w, 1u << l, call_argument(w, i, 0, l)), call_argument(w, i, 1, l));
    const std::lock_guard lock(w.launch->mutex);
    w.launch->printed += text;
  }
  return Status::kNext;
}
Status call_assert(Warp& w, const Inst& i, Mask mask) {
  const int l = first_lane(mask);
  const std::string expression = string_at(w, mask, call_argument(w, i, 0, l));
  const std::string file = string_at(w, mask, call_argument(w, i, 1, l));
  fault(w, mask, "assert",
        file + ":" + std::to_string(static_cast<uint32_t>(call_argument(w, i, 2, l))) + ": assertion '" + expression +
            "' failed");
}

void decode_call(Decoder& d) {
  // call (result), name, (arguments): the lists are optional.
  std::string_view name;
  const PtxOperand* arguments = nullptr;
  for (const PtxOperand& operand : d.ptx().operands) {
    if (operand.kind == PtxOperand::kSymbol && name.empty())
      name = operand.name;
    else if (operand.kind == PtxOperand::kList && !name.empty() && !arguments)
      arguments = &operand;
  }
  Inst in;
  if (name == "vprintf")
    in.run = call_printf;
  else if (name == "__assertfail")
    in.run = call_assert;
  else
    d.unsupported("call of " + std::string(name) + "; only inlined functions, printf and assert");
  if (!arguments) d.unsupported("call without arguments");
  for (const PtxOperand& argument : arguments->items) d.add_extra(in, d.call_parameter(argument.name));
  // The references are offsets, not registers: out of reach of the slot allocation.
  d.emit(in).flags |= kFlagPlainExtra;
}

}  // namespace

Handler exit_handler() { return leave; }

bool decode_control(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  Inst in;
  if (op == "bra") {
    in.run = branch;
    in.flags = kFlagBranch | kFlagTargets;
    in.first_target = static_cast<uint32_t>(d.program().targets.size());
    in.num_targets = 1;
    d.program().targets.push_back(d.label_target(d.operand(0)));
  } else if (op == "brx") {
    in.run = branch_table;
    in.flags = kFlagBranch | kFlagTargets;
    in.a = d.source(0, PtxType::kU32);
    d.sink();
    in.first_target = static_cast<uint32_t>(d.program().targets.size());
    for (const uint32_t target : d.table_targets(d.operand(1))) {
      d.program().targets.push_back(target);
      ++in.num_targets;
    }
  } else if (op == "ret" || op == "exit") {
    in.run = leave;
    in.flags = kFlagBranch;
  } else if (op == "trap") {
    in.run = trap;
  } else if (op == "brkpt" || op == "pmevent" || op == "griddepcontrol") {
    // A grid starts when its predecessors in the stream have ended, so there is nothing to wait for.
    in.run = nothing;
  } else if (op == "nanosleep") {
    in.run = sleep;
  } else if (op == "call") {
    decode_call(d);
    return true;
  } else {
    return false;
  }
  d.emit(in);
  return true;
}

}  // namespace flash_ext::emulator
