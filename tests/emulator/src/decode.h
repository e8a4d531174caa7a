// Turning PTX instructions into Insts. Each family of instructions offers one decode function,
// which returns false if the opcode is not its own.
#pragma once

#include <map>
#include <string>

#include "program.h"

namespace flash_ext::emulator {

class Decoder {
 public:
  Decoder(ModuleImpl& module, const PtxFunction& function, uint32_t sm_version);
  std::unique_ptr<Program> run();

  // -- for the families --
  const PtxInstruction& ptx() const { return *current_; }
  size_t operand_count() const { return current_->operands.size(); }
  const PtxOperand& operand(size_t i) const;
  // Stops decoding: the text, line and source of the current instruction go into the message.
  [[noreturn]] void unsupported(const std::string& why = "") const;

  // Where a source operand can be read. Integers and floats become constants of `type`.
  Ref source(const PtxOperand& operand, PtxType type);
  Ref source(size_t i, PtxType type) { return source(operand(i), type); }
  Ref destination(const PtxOperand& operand, PtxType type);
  Ref destination(size_t i, PtxType type) { return destination(operand(i), type); }
  Ref predicate(const PtxOperand& operand);  // a source; 0 and 1 are constants
  Ref predicate_destination(const PtxOperand& operand);
  // Whether a register holds 64-bit lanes (ld, st and cvt accept registers wider than the type).
  bool is_wide(const PtxOperand& operand) const;
  PtxType register_type(const PtxOperand& operand) const { return function_.registers[operand.index].type; }
  Ref constant32(uint32_t value);
  Ref constant64(uint64_t value);
  Ref scratch(uint32_t bytes);  // a private part of the frame
  // The base of an address operand, as 64-bit lanes (or 32-bit lanes: see wide), and its offset.
  struct Address {
    Ref base;
    bool wide;
    int64_t offset;
  };
  Address address(const PtxOperand& operand);
  Ref add_offset(const Address& address);  // emits an addition into scratch
  uint64_t symbol_address(std::string_view name, std::string_view* space = nullptr) const;
  void sink() { pending_.sink = true; }  // the instruction's sources leave the registers
  const PtxVariable* find_parameter(std::string_view name, uint64_t* offset) const;
  int64_t integer(const PtxOperand& operand) const;  // must be an integer literal

  void add_extra(Inst& in, Ref ref);  // consecutive calls for one instruction
  // Appends with the guard; the handler may be one of several for the current instruction.
  Inst& emit(const Inst& in);
  uint32_t label_target(const PtxOperand& operand) const;  // PTX index
  std::vector<uint32_t> table_targets(const PtxOperand& operand) const;
  Program& program() { return *program_; }
  ModuleImpl& module() { return module_; }
  uint32_t sm_version() const { return sm_version_; }
  // .param space of the body (arguments of calls) lives in a buffer per lane.
  uint32_t call_parameter(std::string_view name) const;

 private:
  void layout_variables();
  void layout_registers();
  void decode_one();
  void resolve_branches();
  bool uses_symbol(std::string_view name) const;
  Ref slot(uint32_t reg, bool is_write);

  ModuleImpl& module_;
  const PtxFunction& function_;
  uint32_t sm_version_;
  std::unique_ptr<Program> program_;
  const PtxInstruction* current_ = nullptr;
  uint32_t current_index_ = 0;
  std::vector<Ref> slots_;            // per PTX register
  std::vector<uint32_t> first_inst_;  // per PTX instruction
  RegisterUses pending_;
  std::map<std::string_view, std::pair<uint64_t, std::string_view>> locals_;  // offset, space
  std::map<std::string_view, uint32_t> call_parameters_;
  std::unordered_map<uint64_t, Ref> constants32_, constants64_;
  uint32_t special_scratch_ = 0;
};

// The step that fills in.d with a special register; false if there is none of that name.
Handler add_handler(bool wide);  // d = a + b
bool decode_special(Decoder& decoder, std::string_view name, bool wide, Inst& in);
Handler exit_handler();

// cfg.cpp: Block::reconverge, and registers that share slots.
void find_reconvergence(Program& program);
void compact_registers(Program& program, const std::vector<Ref>& slots);

bool decode_integer(Decoder& decoder);
bool decode_float(Decoder& decoder);
bool decode_half(Decoder& decoder);
bool decode_compare(Decoder& decoder);
bool decode_convert(Decoder& decoder);
bool decode_move(Decoder& decoder);
bool decode_control(Decoder& decoder);
bool decode_memory(Decoder& decoder);
bool decode_atomic(Decoder& decoder);
bool decode_warp(Decoder& decoder);
bool decode_barrier(Decoder& decoder);
bool decode_mbarrier(Decoder& decoder);
bool decode_async(Decoder& decoder);
bool decode_bulk(Decoder& decoder);
bool decode_matrix(Decoder& decoder);

}  // namespace flash_ext::emulator
