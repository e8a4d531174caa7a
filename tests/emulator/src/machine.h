// The emulator's front door: load PTX, launch a kernel on host memory, read the report.
// Everything that goes wrong, in the PTX or in the kernel, is an exception (Diagnostic for the latter).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace flash_ext::emulator {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

// A fault of the emulated kernel, with the place where it happened. what() is the whole report.
struct Fault {
  std::string kind;     // short and stable, for tests: "out-of-bounds", "race", "deadlock", ...
  std::string message;  // one or more lines
  std::string kernel;   // mangled name
  std::string file;     // of the CUDA source, from .loc; empty without line information
  uint32_t line = 0;
  std::string caller_file;  // where that line was inlined, if it was
  uint32_t caller_line = 0;
  uint32_t ptx_line = 0;
  std::string ptx;  // the instruction's opcode
  Dim3 cta = {0, 0, 0};
  uint32_t warp = 0;   // within the CTA
  uint32_t lanes = 0;  // active lanes at the fault
  uint64_t address = 0;
};

class Diagnostic : public std::runtime_error {
 public:
  explicit Diagnostic(Fault fault);
  const Fault& fault() const { return fault_; }

 private:
  Fault fault_;
};

// Text that is not PTX, an unknown kernel, a launch beyond the limits.
class LoadError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
class LaunchError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ParamInfo {
  std::string name;
  size_t offset = 0, bytes = 0, alignment = 1;
};

struct KernelInfo {
  std::string name;
  std::vector<ParamInfo> params;
  size_t param_bytes = 0;
  size_t static_shared_bytes = 0;
  Dim3 required_threads = {0, 0, 0};  // .reqntid, zeros if absent
  Dim3 max_threads = {0, 0, 0};       // .maxntid
  Dim3 required_cluster = {0, 0, 0};  // .reqnctapercluster
  uint32_t min_ctas_per_sm = 0;       // .minnctapersm
  uint32_t max_registers = 0;         // .maxnreg
};

class GlobalShadow;  // checks.h
class ModuleImpl;

// One PTX file. Kernels are decoded on their first launch. Safe to use from several threads.
class Module {
 public:
  // Throws LoadError for truncated or malformed text, with the line.
  static std::shared_ptr<Module> load(const std::string& ptx, const std::string& name = "module");
  ~Module();

  std::vector<std::string> kernel_names() const;
  const KernelInfo* find_kernel(const std::string& name) const;  // null if absent
  // Host address of a .global or .const variable; null if absent.
  void* find_symbol(const std::string& name, size_t* bytes) const;
  ModuleImpl& impl() const { return *impl_; }

 private:
  explicit Module(std::unique_ptr<ModuleImpl> impl);
  std::unique_ptr<ModuleImpl> impl_;
};

enum class Role : uint8_t { kIn, kOut, kInOut, kWorkspace };

struct MemoryRange {
  uint64_t begin = 0, bytes = 0;
  Role role = Role::kInOut;
  std::string name;  // "q", "workspace", ...
};

// The global memory that a launch may touch. Module variables are added by the launch itself.
class MemoryMap {
 public:
  void add(const void* begin, size_t bytes, Role role, std::string name);
  void remove(const void* begin);
  const MemoryRange* find(uint64_t address) const;
  const std::map<uint64_t, MemoryRange>& ranges() const { return ranges_; }
  // The ranges next to an address, for messages.
  std::string describe(uint64_t address) const;

 private:
  std::map<uint64_t, MemoryRange> ranges_;
};

// When asynchronous work (copies, wgmma) takes effect between its issue and the wait for it.
enum class Asynchrony : uint8_t { kEarly, kLate, kRandom };

struct Options {
  uint64_t seed = 0;
  Asynchrony asynchrony = Asynchrony::kEarly;
  bool adversarial = false;  // starve warps, delay copies, let try_wait time out, as the seed says
  bool checks = false;
  bool profile = false;           // bank conflicts and sectors in the report (counts are always on)
  uint32_t num_threads = 1;       // host threads
  uint32_t num_sms = 4;           // clusters resident together
  uint32_t sm_version = 90;       // 80, 86, 89, 90, 120
  uint32_t fp8_fraction_bits = 0;  // of the sums of 8-bit wgmma and mma.sync (fp8_accumulator.h), 13 on Hopper; 0: float32
  uint64_t max_instructions = 0;  // warp instructions per launch before the watchdog; 0: 20 billion
};

struct Launch {
  Dim3 grid, block, cluster;  // cluster 1x1x1: none
  uint32_t dynamic_shared_bytes = 0;
  std::vector<uint8_t> params;  // as laid out by KernelInfo::params
  // What the checks know of global memory from earlier launches; null: only what the roles say.
  GlobalShadow* shadow = nullptr;
};

// What happened at one PTX instruction, over all CTAs of a launch.
struct InstructionStats {
  uint32_t ptx_line = 0;
  std::string file;
  uint32_t line = 0;
  std::string opcode;       // "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
  uint64_t executions = 0;  // by warps
  // With Options::profile, or for asynchronous copies always:
  uint64_t shared_requests = 0, shared_wavefronts = 0;
  uint64_t global_requests = 0, global_sectors = 0;
  uint64_t tma_bytes = 0;
};

struct BlockCoverage {
  std::string label;  // of the PTX, empty if the block has none
  uint32_t first_line = 0, last_line = 0;
  uint64_t executions = 0;
};

struct Report {
  std::string kernel;
  uint64_t warp_instructions = 0;
  double seconds = 0;
  std::vector<InstructionStats> instructions;  // executed at least once, in PTX order
  std::vector<BlockCoverage> blocks;           // all of them
  std::string printed;                         // what the kernel printed with printf
};

// Runs a kernel to its end. Throws LaunchError before it starts and Diagnostic when it fails.
Report launch(const Module& module, const std::string& kernel, const Launch& launch, const MemoryMap& memory,
              const Options& options);

}  // namespace flash_ext::emulator
