// A kernel decoded for execution: one Inst with a function pointer per PTX instruction.
//
// Registers live in a frame per warp, as lane arrays: 32 x u32 for types of up to 32 bits (narrow
// values zero-extended), 32 x u64 for 64-bit types, one u32 bit mask for a predicate. Constants
// lie in an area of the same form that all warps share, so every operand is read in one way.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "ptx.h"

namespace flash_ext::emulator {

constexpr int kLanes = 32;
using Mask = uint32_t;
constexpr Mask kFullMask = 0xffffffffu;

struct Warp;
struct Inst;

enum class Status : uint8_t {
  kNext,
  kYield,    // done, and a good moment to run another warp
  kBlocked,  // not done: try again later
  kJump,     // the handler has set the path's pc
};

using Handler = Status (*)(Warp&, const Inst&, Mask);

// A byte offset into the warp's frame or, with kConstantBit, into the constants.
using Ref = uint32_t;
constexpr Ref kConstantBit = 1u << 31;
constexpr Ref kNegateBit = 1u << 30;  // predicates: read the complement
constexpr Ref kOffsetMask = kNegateBit - 1;
constexpr Ref kNoRef = kOffsetMask;

enum InstFlags : uint16_t {
  kFlagBranch = 1,     // ends a block
  kFlagGather = 2,     // all lanes of `member` (kNoRef: all that live) execute it together
  kFlagAnyPlace = 4,   // with kFlagGather: lanes may stand at different instructions of this kind
  kFlagAsyncRead = 8,  // wgmma: register operands stay in use until the wait
  kFlagWgmmaWait = 16,
  kFlagTargets = 32,      // first_target and num_targets are set
  kFlagPlainExtra = 128,  // the extra operands are no registers
  kFlagSelect = 64,       // selp: the checks follow the chosen operand only
};

struct Inst {
  Handler run = nullptr;
  Ref guard = kNoRef;
  Ref member = kNoRef;
  Ref d = kNoRef, a = kNoRef, b = kNoRef, c = kNoRef;
  uint32_t aux = 0;    // meaning is the family's own
  uint32_t extra = 0;  // first of further operands in Program::refs
  uint16_t num_extra = 0;
  uint16_t flags = 0;
  // Of branches, in Program::targets; other families may use them as they like.
  uint32_t first_target = 0, num_targets = 0;
  uint32_t source = 0;  // index into PtxFunction::body; several Insts may share one
  int64_t imm = 0;
};

// The registers that an instruction touches, by their number in PtxFunction::registers.
struct RegisterUses {
  std::vector<uint32_t> reads, writes;
  int32_t guard = -1;
  bool sink = false;  // the values leave the registers: addresses, stored values, shuffles
};

struct Block {
  uint32_t begin, end;  // Inst range
  std::vector<uint32_t> successors;
  uint32_t reconverge = UINT32_MAX;  // Inst where lanes that part at the end meet again
};

struct Program {
  const PtxModule* module = nullptr;
  const PtxFunction* function = nullptr;
  std::vector<Inst> code;  // ends in an exit
  std::vector<Ref> refs;
  std::vector<uint32_t> targets;
  std::vector<RegisterUses> uses;  // per Inst
  std::vector<Block> blocks;
  std::vector<uint32_t> block_of;  // per Inst
  std::vector<uint32_t> constants;
  uint32_t frame_bytes = 0;
  uint32_t local_bytes = 0;
  uint32_t call_bytes = 0;           // .param space of call sequences, per lane
  uint32_t static_shared_bytes = 0;  // from the base of the window
  uint32_t shared_base = 0;          // where user variables start
  uint32_t dynamic_shared_alignment = 16;

  const PtxInstruction& source(const Inst& in) const { return function->body[in.source]; }
  std::string opcode(const Inst& in) const { return std::string(source(in).opcode); }
};

// Storage for the module-scope variables of one PTX file, and its decoded kernels.
class ModuleImpl {
 public:
  explicit ModuleImpl(std::unique_ptr<PtxModule> ptx);

  struct Variable {
    std::string name;
    uint8_t* data;
    uint64_t bytes;
    bool is_const;
  };

  const PtxModule& ptx() const { return *ptx_; }
  const std::unordered_map<std::string_view, Variable>& variables() const { return variables_; }
  const std::unordered_map<std::string, KernelInfo>& kernels() const { return kernels_; }
  const PtxFunction* function(std::string_view name) const;
  // Decodes on first use; throws LoadError for what is not supported.
  const Program& program(const std::string& kernel, uint32_t sm_version);

 private:
  std::unique_ptr<PtxModule> ptx_;
  std::vector<std::unique_ptr<uint8_t[]>> storage_;
  std::unordered_map<std::string_view, Variable> variables_;
  std::unordered_map<std::string, KernelInfo> kernels_;
  std::unordered_map<std::string_view, const PtxFunction*> functions_;
  std::mutex mutex_;
  std::map<std::pair<std::string, uint32_t>, std::unique_ptr<Program>> programs_;
};

}  // namespace flash_ext::emulator
