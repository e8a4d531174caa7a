// PTX text to a syntax tree. Names inside nested { } scopes are resolved here, so later stages see
// register and label numbers only. Strings are views into PtxModule::text.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace flash_ext::emulator {

enum class PtxType : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBF16,
  kBF16x2,
  kF32,
  kF64,
  kTF32,
  kE4M3x2,
  kE5M2x2,
};

// kNone if the name (without the dot) is not a type.
PtxType parse_type(std::string_view name);
uint32_t type_bytes(PtxType type);  // predicates: 0
bool is_signed(PtxType type);
bool is_float(PtxType type);

struct PtxOperand {
  enum Kind : uint8_t {
    kRegister,  // index; negated for !%p
    kSpecial,   // name: "%tid.x"
    kInteger,   // value
    kFloat,     // value holds the bits of an f64, or of an f32 if single
    kSymbol,    // name (variable, parameter or function) + value
    kLabel,     // index of a label of this function
    kAddress,   // items[0] is the base (register, symbol, integer) + value; items[1] coordinates
    kVector,    // items
    kPair,      // items: a|b
    kList,      // items: the parenthesised lists of call
    kSink,      // _
  };
  Kind kind = kInteger;
  bool negated = false, single = false;
  uint32_t index = 0;
  int64_t value = 0;
  std::string_view name;
  std::vector<PtxOperand> items;
};

struct PtxInstruction {
  std::string_view opcode;              // with its modifiers
  std::vector<std::string_view> parts;  // opcode split at dots
  int32_t guard = -1;                   // register index
  bool guard_negated = false;
  uint32_t line = 0;                          // of the PTX
  uint32_t source_file = 0, source_line = 0;  // .loc
  uint32_t caller_file = 0, caller_line = 0;  // its inlined_at, if any
  std::vector<PtxOperand> operands;

  bool has(std::string_view part) const;
};

struct PtxVariable {
  std::string_view name;
  std::string_view space;  // "global", "const", "shared", "local", "param"
  uint64_t bytes = 0;      // 0 for extern arrays
  uint32_t alignment = 1;
  bool is_extern = false;
  std::vector<uint8_t> data;  // initial value, empty for zeros
  // Addresses of other variables to be stored into data.
  struct Fixup {
    uint64_t offset;
    std::string_view symbol;
    int64_t addend;
  };
  std::vector<Fixup> fixups;
};

struct PtxRegister {
  std::string_view name;  // of .reg .b32 %r<9>: "%r"
  int32_t number;         // in such a family; -1: none
  PtxType type;
  std::string full_name() const { return std::string(name) + (number < 0 ? "" : std::to_string(number)); }
};

struct PtxLabel {
  std::string_view name;
  uint32_t target = UINT32_MAX;          // instruction index
  std::vector<uint32_t> branch_targets;  // labels, for .branchtargets
};

struct PtxFunction {
  std::string_view name;
  bool is_entry = false;
  bool has_body = false;
  uint32_t line = 0;
  std::vector<PtxVariable> params, results;
  std::vector<PtxRegister> registers;
  std::vector<PtxLabel> labels;
  std::vector<PtxVariable> variables;  // .shared, .local, .param of the body
  std::vector<PtxInstruction> body;
  uint32_t required_threads[3] = {0, 0, 0}, max_threads[3] = {0, 0, 0};
  uint32_t required_cluster[3] = {0, 0, 0};
  uint32_t min_ctas = 0, max_registers = 0;
};

struct PtxModule {
  std::string text;
  std::string target;  // "sm_90a"
  std::vector<PtxVariable> variables;
  std::vector<std::unique_ptr<PtxFunction>> functions;
  std::unordered_map<uint32_t, std::string> files;  // .file
};

// Throws LoadError naming the line.
std::unique_ptr<PtxModule> parse_ptx(std::string text, const std::string& module_name);

}  // namespace flash_ext::emulator
