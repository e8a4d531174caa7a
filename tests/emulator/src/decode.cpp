#include "decode.h"

#include <algorithm>
#include <cstring>

#include "state.h"

namespace flash_ext::emulator {

namespace {

// Parts of the frame below the registers: 0 is where `_` goes, the rest is scratch for instructions
// that decode to several steps.
constexpr uint32_t kScratchBytes = 4096;
constexpr uint32_t kSinkBytes = 512;

uint32_t slot_bytes(PtxType type) {
  if (type == PtxType::kPred) return 4;
  return type_bytes(type) <= 4 ? 128 : 32 * type_bytes(type);
}

uint64_t align_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

}  // namespace

Decoder::Decoder(ModuleImpl& module, const PtxFunction& function, uint32_t sm_version)
    : module_(module), function_(function), sm_version_(sm_version) {}

const PtxOperand& Decoder::operand(size_t i) const {
  if (i >= current_->operands.size()) unsupported("operand " + std::to_string(i + 1) + " is missing");
  return current_->operands[i];
}

void Decoder::unsupported(const std::string& why) const {
  std::string place;
  const auto file = module_.ptx().files.find(current_->source_file);
  if (file != module_.ptx().files.end()) {
    place = " (" + file->second + ":" + std::to_string(current_->source_line) + ")";
  }
  throw LoadError("kernel " + std::string(function_.name) + ": PTX line " + std::to_string(current_->line) + place +
                  ": not supported: '" + std::string(current_->opcode) + "'" + (why.empty() ? "" : ": " + why));
}

Ref Decoder::slot(uint32_t reg, bool is_write) {
  (is_write ? pending_.writes : pending_.reads).push_back(reg);
  return slots_[reg];
}

Ref Decoder::constant32(uint32_t value) {
  const auto [it, added] = constants32_.try_emplace(value, 0);
  if (added) {
    it->second = kConstantBit | static_cast<Ref>(program_->constants.size() * 4);
    program_->constants.insert(program_->constants.end(), kLanes, value);
  }
  return it->second;
}

Ref Decoder::constant64(uint64_t value) {
  const auto [it, added] = constants64_.try_emplace(value, 0);
  if (added) {
    it->second = kConstantBit | static_cast<Ref>(program_->constants.size() * 4);
    for (int l = 0; l < kLanes; ++l) {
      program_->constants.push_back(static_cast<uint32_t>(value));
      program_->constants.push_back(static_cast<uint32_t>(value >> 32));
    }
  }
  return it->second;
}

Ref Decoder::scratch(uint32_t bytes) {
  const uint32_t offset = special_scratch_;
  special_scratch_ += static_cast<uint32_t>(align_up(bytes, 128));
  if (special_scratch_ > kScratchBytes) unsupported("too many operands");
  return offset;
}

bool Decoder::is_wide(const PtxOperand& operand) const {
  return operand.kind == PtxOperand::kRegister && type_bytes(function_.registers[operand.index].type) == 8;
}

Ref Decoder::source(const PtxOperand& operand, PtxType type) {
  const bool wide = type_bytes(type) == 8;
  switch (operand.kind) {
    case PtxOperand::kRegister: {
      const PtxType declared = function_.registers[operand.index].type;
      if (declared == PtxType::kPred) unsupported("a predicate where a value is expected");
      if (wide != (type_bytes(declared) == 8)) unsupported("operand of another width");
      return slot(operand.index, false);
    }
    case PtxOperand::kInteger:
    case PtxOperand::kFloat: {
      uint64_t bits = static_cast<uint64_t>(operand.value);
      if (is_float(type)) {
        double value;
        if (operand.kind == PtxOperand::kInteger) {
          value = static_cast<double>(operand.value);
        } else if (operand.single) {
          float single;
          std::memcpy(&single, &bits, 4);
          value = single;
        } else {
          std::memcpy(&value, &bits, 8);
        }
        if (type == PtxType::kF64) {
          std::memcpy(&bits, &value, 8);
        } else if (type == PtxType::kF32 && !(operand.kind == PtxOperand::kFloat && operand.single)) {
          const float single = static_cast<float>(value);
          bits = 0;
          std::memcpy(&bits, &single, 4);
        }
      }
      if (type_bytes(type) == 2) bits &= 0xffff;
      if (type_bytes(type) == 1) bits &= 0xff;
      return wide ? constant64(bits) : constant32(static_cast<uint32_t>(bits));
    }
    case PtxOperand::kSymbol: {
      const uint64_t address = symbol_address(operand.name) + operand.value;
      return wide ? constant64(address) : constant32(static_cast<uint32_t>(address));
    }
    case PtxOperand::kSpecial: {
      Inst in;
      const Ref target = scratch(wide ? 256 : 128);
      if (!decode_special(*this, operand.name, wide, in)) {
        unsupported("special register " + std::string(operand.name));
      }
      in.d = target;
      emit(in);
      return target;
    }
    default:
      unsupported("unexpected kind of operand");
  }
}

Ref Decoder::destination(const PtxOperand& operand, PtxType type) {
  if (operand.kind == PtxOperand::kSink) return 0;
  if (operand.kind != PtxOperand::kRegister) unsupported("the result is not a register");
  const PtxType declared = function_.registers[operand.index].type;
  if (declared == PtxType::kPred) unsupported("the result is a predicate");
  if ((type_bytes(type) == 8) != (type_bytes(declared) == 8)) unsupported("result of another width");
  return slot(operand.index, true);
}

Ref Decoder::predicate(const PtxOperand& operand) {
  if (operand.kind == PtxOperand::kInteger) {
    return constant32((operand.value != 0) != operand.negated ? kFullMask : 0);
  }
  if (operand.kind != PtxOperand::kRegister || function_.registers[operand.index].type != PtxType::kPred) {
    unsupported("a predicate is expected");
  }
  return slot(operand.index, false) | (operand.negated ? kNegateBit : 0);
}

Ref Decoder::predicate_destination(const PtxOperand& operand) {
  if (operand.kind == PtxOperand::kSink) return 0;
  if (operand.kind != PtxOperand::kRegister || function_.registers[operand.index].type != PtxType::kPred) {
    unsupported("a predicate is expected");
  }
  return slot(operand.index, true);
}

uint64_t Decoder::symbol_address(std::string_view name, std::string_view* space) const {
  const auto local = locals_.find(name);
  if (local != locals_.end()) {
    if (space) *space = local->second.second;
    return local->second.first;
  }
  uint64_t offset;
  if (find_parameter(name, &offset)) unsupported("address of a parameter in this position");
  const auto variable = module_.variables().find(name);
  if (variable == module_.variables().end()) unsupported("unknown name " + std::string(name));
  if (space) *space = variable->second.is_const ? "const" : "global";
  return reinterpret_cast<uint64_t>(variable->second.data);
}

const PtxVariable* Decoder::find_parameter(std::string_view name, uint64_t* offset) const {
  uint64_t at = 0;
  for (const PtxVariable& param : function_.params) {
    at = align_up(at, param.alignment);
    if (param.name == name) {
      *offset = at;
      return &param;
    }
    at += param.bytes;
  }
  return nullptr;
}

uint32_t Decoder::call_parameter(std::string_view name) const {
  const auto found = call_parameters_.find(name);
  if (found == call_parameters_.end()) unsupported("unknown name " + std::string(name));
  return found->second;
}

Decoder::Address Decoder::address(const PtxOperand& operand) {
  if (operand.kind != PtxOperand::kAddress) unsupported("an address is expected");
  const PtxOperand& base = operand.items[0];
  pending_.sink = true;
  if (base.kind == PtxOperand::kRegister) {
    const bool wide = is_wide(base);
    return {source(base, wide ? PtxType::kU64 : PtxType::kU32), wide, operand.value};
  }
  if (base.kind == PtxOperand::kInteger) return {constant64(base.value), true, operand.value};
  if (base.kind != PtxOperand::kSymbol) unsupported("unexpected kind of address");
  return {constant64(symbol_address(base.name)), true, operand.value};
}

Ref Decoder::add_offset(const Address& address) {
  Inst in;
  in.run = add_handler(address.wide);
  in.a = address.base;
  in.b = address.wide ? constant64(address.offset) : constant32(static_cast<uint32_t>(address.offset));
  in.d = scratch(address.wide ? 256 : 128);
  emit(in);
  return in.d;
}

int64_t Decoder::integer(const PtxOperand& operand) const {
  if (operand.kind != PtxOperand::kInteger) unsupported("an integer constant is expected");
  return operand.value;
}

void Decoder::add_extra(Inst& in, Ref ref) {
  if (in.num_extra == 0) in.extra = static_cast<uint32_t>(program_->refs.size());
  program_->refs.push_back(ref);
  ++in.num_extra;
}

Inst& Decoder::emit(const Inst& in) {
  program_->code.push_back(in);
  Inst& added = program_->code.back();
  added.source = current_index_;
  if (current_->guard >= 0) {
    added.guard = slots_[current_->guard] | (current_->guard_negated ? kNegateBit : 0);
  }
  pending_.guard = current_->guard;
  program_->uses.push_back(std::move(pending_));
  pending_ = {};
  return added;
}

uint32_t Decoder::label_target(const PtxOperand& operand) const {
  if (operand.kind != PtxOperand::kLabel) unsupported("a label is expected");
  return function_.labels[operand.index].target;
}

std::vector<uint32_t> Decoder::table_targets(const PtxOperand& operand) const {
  if (operand.kind != PtxOperand::kLabel) unsupported("a list of targets is expected");
  std::vector<uint32_t> targets;
  for (const uint32_t label : function_.labels[operand.index].branch_targets) {
    targets.push_back(function_.labels[label].target);
  }
  return targets;
}

void Decoder::layout_variables() {
  // The first KiB of the shared window belongs to the system on sm_90.
  program_->shared_base = sm_version_ >= 90 ? 1024 : 0;
  uint64_t shared = program_->shared_base, local = 0, call = 0;
  auto place = [](uint64_t& at, const PtxVariable& variable) {
    at = align_up(at, variable.alignment);
    const uint64_t offset = at;
    at += variable.bytes;
    return offset;
  };
  std::vector<const PtxVariable*> dynamic;
  auto place_shared = [&](const PtxVariable& variable) {
    if (variable.bytes == 0) {
      dynamic.push_back(&variable);
    } else {
      locals_[variable.name] = {place(shared, variable), "shared"};
    }
  };
  for (const PtxVariable& variable : module_.ptx().variables) {
    if (variable.space == "shared" && uses_symbol(variable.name)) place_shared(variable);
  }
  for (const PtxVariable& variable : function_.variables) {
    if (variable.space == "shared") {
      place_shared(variable);
    } else if (variable.space == "local") {
      locals_[variable.name] = {place(local, variable), "local"};
    } else {
      // Call sequences reuse names; each name keeps one place, large enough for all.
      const auto [it, added] = call_parameters_.try_emplace(variable.name, 0);
      if (added) {
        call = align_up(call, 16);
        it->second = static_cast<uint32_t>(call);
        call += std::max<uint64_t>(variable.bytes, 64);
      } else if (variable.bytes > 64) {
        throw LoadError("kernel " + std::string(function_.name) + ": call parameter too large");
      }
    }
  }
  for (const PtxVariable* variable : dynamic) {
    program_->dynamic_shared_alignment = std::max(program_->dynamic_shared_alignment, variable->alignment);
  }
  shared = align_up(shared, program_->dynamic_shared_alignment);
  for (const PtxVariable* variable : dynamic) locals_[variable->name] = {shared, "shared"};
  program_->static_shared_bytes = static_cast<uint32_t>(shared);
  program_->local_bytes = static_cast<uint32_t>(align_up(local, 16));
  program_->call_bytes = static_cast<uint32_t>(align_up(call, 16));
}

bool Decoder::uses_symbol(std::string_view name) const {
  for (const PtxInstruction& in : function_.body) {
    for (const PtxOperand& operand : in.operands) {
      if (operand.name == name) return true;
      for (const PtxOperand& item : operand.items) {
        if (item.name == name) return true;
      }
    }
  }
  return false;
}

void Decoder::layout_registers() {
  uint32_t at = kSinkBytes + kScratchBytes;
  slots_.resize(function_.registers.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    const uint32_t bytes = slot_bytes(function_.registers[i].type);
    if (bytes > 4) at = static_cast<uint32_t>(align_up(at, 64));
    slots_[i] = at;
    at += bytes;
  }
  program_->frame_bytes = static_cast<uint32_t>(align_up(at, 64));
}

void Decoder::decode_one() {
  static constexpr bool (*kFamilies[])(Decoder&) = {
      decode_move,   decode_integer,  decode_float, decode_compare, decode_convert,
      decode_memory, decode_control,  decode_half,  decode_warp,    decode_barrier,
      decode_atomic, decode_mbarrier, decode_bulk,  decode_async,   decode_matrix,
  };
  special_scratch_ = kSinkBytes;
  for (const auto family : kFamilies) {
    if (family(*this)) return;
  }
  unsupported();
}

std::unique_ptr<Program> Decoder::run() {
  program_ = std::make_unique<Program>();
  program_->module = &module_.ptx();
  program_->function = &function_;
  layout_variables();
  layout_registers();
  first_inst_.resize(function_.body.size() + 1);
  program_->code.reserve(function_.body.size() + 64);
  for (current_index_ = 0; current_index_ < function_.body.size(); ++current_index_) {
    current_ = &function_.body[current_index_];
    first_inst_[current_index_] = static_cast<uint32_t>(program_->code.size());
    decode_one();
  }
  first_inst_.back() = static_cast<uint32_t>(program_->code.size());
  Inst end;
  end.run = exit_handler();
  end.flags = kFlagBranch;
  end.source = function_.body.empty() ? 0 : static_cast<uint32_t>(function_.body.size() - 1);
  program_->code.push_back(end);
  program_->uses.emplace_back();
  resolve_branches();
  find_reconvergence(*program_);
  compact_registers(*program_, slots_);
  return std::move(program_);
}

// Branches hold PTX indices until here.
void Decoder::resolve_branches() {
  Program& p = *program_;
  for (Inst& in : p.code) {
    if (in.flags & kFlagTargets) {
      for (uint32_t i = 0; i < in.num_targets; ++i) {
        uint32_t& target = p.targets[in.first_target + i];
        target = first_inst_[target];
      }
    }
  }
  std::vector<bool> leader(p.code.size() + 1, false);
  leader[0] = true;
  for (size_t i = 0; i < p.code.size(); ++i) {
    const Inst& in = p.code[i];
    if (in.flags & kFlagBranch) leader[i + 1] = true;
    if (in.flags & kFlagTargets) {
      for (uint32_t t = 0; t < in.num_targets; ++t) leader[p.targets[in.first_target + t]] = true;
    }
  }
  for (const PtxLabel& label : function_.labels) leader[first_inst_[label.target]] = true;
  p.block_of.resize(p.code.size());
  for (uint32_t i = 0; i < p.code.size(); ++i) {
    if (leader[i]) p.blocks.push_back({i, i, {}, UINT32_MAX});
    p.blocks.back().end = i + 1;
    p.block_of[i] = static_cast<uint32_t>(p.blocks.size() - 1);
  }
  for (Block& block : p.blocks) {
    const Inst& last = p.code[block.end - 1];
    if (last.flags & kFlagTargets) {
      for (uint32_t t = 0; t < last.num_targets; ++t) {
        block.successors.push_back(p.block_of[p.targets[last.first_target + t]]);
      }
    }
    const bool falls = !(last.flags & kFlagBranch) || last.guard != kNoRef;
    if (falls && block.end < p.code.size()) block.successors.push_back(p.block_of[block.end]);
  }
}

}  // namespace flash_ext::emulator
