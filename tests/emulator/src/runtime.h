// Process-wide state of the stand-in CUDA runtime: what nvcc's static constructors registered, the
// options, and what launches did.
//
// Registration runs in static constructors of other files, and unregistration at exit: the state is
// created on first use and never destroyed.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "device_memory.h"
#include "device_model.h"
#include "fatbin.h"
#include "machine.h"

namespace flash_ext::emulator {

// A failed runtime call: thrown inside, turned into its code at the C interface.
struct ApiError : std::runtime_error {
  ApiError(cudaError_t error, const std::string& message) : std::runtime_error(message), code(error) {}
  cudaError_t code;
};

// The images registered by one translation unit.
struct FatBinary {
  std::vector<FatbinImage> images;
  std::string parse_error;                        // reported when one of its kernels is used
  std::map<int, std::shared_ptr<Module>> loaded;  // by emulated architecture
  std::map<int, std::string> replaced;            // PTX that stands in for the compiled one
};

// A __global__ function. Its address serves as cudaKernel_t and cudaFunction_t.
struct Kernel {
  FatBinary* binary = nullptr;
  std::string name;
  KernelLimits limits;
};

struct Variable {
  FatBinary* binary = nullptr;
  std::string name;
  size_t bytes = 0;
};

struct LaunchRecord {
  std::string kernel;
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared_bytes = 0;
  uint64_t warp_instructions = 0;
  double seconds = 0;
};

struct LoadedKernel {
  std::shared_ptr<Module> module;
  const KernelInfo* info;
  KernelLimits limits;
};

class Runtime {
 public:
  static Runtime& get();

  FatBinary* add_fat_binary(const void* wrapper);
  void remove_fat_binary(FatBinary* binary);
  void add_kernel(FatBinary* binary, const void* host, const std::string& name);
  void add_variable(FatBinary* binary, const void* host, const std::string& name, size_t bytes);

  // `function` is the host stub's address or a handle; both throw ApiError if nobody registered it.
  Kernel* find_kernel(const void* function);
  LoadedKernel load_kernel(const void* function);
  void* symbol_address(const void* host, size_t* bytes);
  void set_limits(const void* function, const KernelLimits& limits);

  Options options();
  void set_options(const Options& options);

  void run(const void* function, Launch launch, void** arguments, bool cooperative);

  DeviceMemory& memory() { return memory_; }

  std::vector<std::string> kernel_names();
  std::string kernel_ptx(const std::string& name);
  // Launches of any kernel that shares a translation unit with `name` use this PTX until it is
  // replaced by nothing.
  void replace_ptx(const std::string& name, const std::optional<std::string>& ptx);

  std::vector<Report> reports();  // one per kernel, summed over launches
  std::vector<LaunchRecord> launches();
  void reset_reports();

 private:
  Runtime();
  std::shared_ptr<Module> load_module(FatBinary& binary);
  Kernel* find_by_name(const std::string& name);
  void record(const Launch& launch, Report report);

  std::mutex mutex_;
  Options options_;
  std::map<FatBinary*, std::unique_ptr<FatBinary>> binaries_;
  std::unordered_map<const void*, std::unique_ptr<Kernel>> kernels_;  // by host address
  std::unordered_map<const void*, Kernel*> handles_;
  std::unordered_map<const void*, Variable> variables_;
  DeviceMemory memory_;
  std::map<std::string, Report> reports_;
  std::deque<LaunchRecord> launches_;
};

// Options as the environment sets them: FLASH_EXT_EMULATE, _SMS, _SEED, _CHECKS, _SCHEDULE, _THREADS, _FP8_BITS.
Options options_from_environment();

// Names of FLASH_EXT_EMULATE_SCHEDULE: "early", "late", "random", "adversarial".
void apply_schedule(const std::string& name, Options* options);

// 0 to 13; see fp8_accumulator.h.
void set_fp8_fraction_bits(uint64_t bits, Options* options);

// The error state of the calling thread.
struct ThreadErrors {
  cudaError_t last = cudaSuccess;   // until cudaGetLastError
  cudaError_t code = cudaSuccess;   // of `message`
  std::string message;              // of the last failed call
  std::optional<Fault> diagnostic;  // of the last launch that the emulator stopped
};
ThreadErrors& thread_errors();
cudaError_t fail(cudaError_t code, const std::string& message);
cudaError_t fail(const std::exception& error);

// Runs the body of an API function: exceptions become error codes with a message.
template <class Body>
cudaError_t guarded(Body&& body) {
  try {
    body();
    return cudaSuccess;
  } catch (const std::exception& error) {
    return fail(error);
  }
}

// "emulated" driver functions for cudaGetDriverEntryPoint; null if there is none.
void* driver_entry_point(const std::string& name);

}  // namespace flash_ext::emulator
