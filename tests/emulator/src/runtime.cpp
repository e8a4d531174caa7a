#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace flash_ext::emulator {
namespace {

constexpr size_t kMaxLaunchRecords = 4096;

uint64_t environment_number(const char* name, uint64_t fallback) {
  const char* text = std::getenv(name);
  if (!text || !*text) return fallback;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 0);
  if (*end) throw std::invalid_argument(std::string(name) + "='" + text + "' is not a number");
  return value;
}

void add_counts(InstructionStats& sum, const InstructionStats& more) {
  sum.executions += more.executions;
  sum.shared_requests += more.shared_requests;
  sum.shared_wavefronts += more.shared_wavefronts;
  sum.global_requests += more.global_requests;
  sum.global_sectors += more.global_sectors;
  sum.tma_bytes += more.tma_bytes;
}

// Adds the counts of a launch to those of earlier launches of the same PTX.
void accumulate(Report& sum, const Report& more) {
  sum.warp_instructions += more.warp_instructions;
  sum.seconds += more.seconds;
  std::map<uint32_t, InstructionStats> by_line;
  for (InstructionStats& stats : sum.instructions) by_line.emplace(stats.ptx_line, std::move(stats));
  for (const InstructionStats& stats : more.instructions) {
    const auto [at, is_new] = by_line.try_emplace(stats.ptx_line, stats);
    if (!is_new) add_counts(at->second, stats);
  }
  sum.instructions.clear();
  for (auto& [line, stats] : by_line) sum.instructions.push_back(std::move(stats));
  for (size_t i = 0; i < std::min(sum.blocks.size(), more.blocks.size()); ++i) {
    sum.blocks[i].executions += more.blocks[i].executions;
  }
}

}  // namespace

void apply_schedule(const std::string& name, Options* options) {
  options->adversarial = name == "adversarial";
  if (name == "early") {
    options->asynchrony = Asynchrony::kEarly;
  } else if (name == "late") {
    options->asynchrony = Asynchrony::kLate;
  } else if (name == "random" || name == "adversarial") {
    options->asynchrony = Asynchrony::kRandom;
  } else {
    throw std::invalid_argument("schedule '" + name + "' is none of early, late, random, adversarial");
  }
}

void set_fp8_fraction_bits(uint64_t bits, Options* options) {
  if (bits > 13) throw std::invalid_argument("fp8 fraction bits must be at most 13 (0: float32), got " + std::to_string(bits));
  options->fp8_fraction_bits = static_cast<uint32_t>(bits);
}

Options options_from_environment() {
  Options options;
  const char* arch = std::getenv("FLASH_EXT_EMULATE");
  if (arch && *arch) options.sm_version = parse_sm_version(arch);
  options.num_sms = std::max<uint64_t>(1, environment_number("FLASH_EXT_EMULATE_SMS", 4));
  options.seed = environment_number("FLASH_EXT_EMULATE_SEED", 0);
  options.checks = environment_number("FLASH_EXT_EMULATE_CHECKS", 1) != 0;
  options.num_threads = std::max<uint64_t>(1, environment_number("FLASH_EXT_EMULATE_THREADS", 1));
  set_fp8_fraction_bits(environment_number("FLASH_EXT_EMULATE_FP8_BITS", 0), &options);
  const char* schedule = std::getenv("FLASH_EXT_EMULATE_SCHEDULE");
  if (schedule && *schedule) apply_schedule(schedule, &options);
  return options;
}

ThreadErrors& thread_errors() {
  thread_local ThreadErrors errors;
  return errors;
}

cudaError_t fail(cudaError_t code, const std::string& message) {
  ThreadErrors& errors = thread_errors();
  errors.last = errors.code = code;
  errors.message = message;
  return code;
}

cudaError_t fail(const std::exception& error) {
  if (const auto* diagnostic = dynamic_cast<const Diagnostic*>(&error)) {
    thread_errors().diagnostic = diagnostic->fault();
    return fail(cudaErrorLaunchFailure, error.what());
  }
  if (const auto* api = dynamic_cast<const ApiError*>(&error)) return fail(api->code, error.what());
  if (dynamic_cast<const LoadError*>(&error)) return fail(cudaErrorInvalidPtx, error.what());
  if (dynamic_cast<const LaunchError*>(&error)) {
    return fail(cudaErrorInvalidConfiguration, error.what());
  }
  if (dynamic_cast<const FatbinError*>(&error)) return fail(cudaErrorInvalidKernelImage, error.what());
  if (dynamic_cast<const std::bad_alloc*>(&error)) {
    return fail(cudaErrorMemoryAllocation, "out of memory");
  }
  return fail(cudaErrorUnknown, error.what());
}

Runtime& Runtime::get() {
  static Runtime* const runtime = new Runtime;
  return *runtime;
}

Runtime::Runtime() {
  try {
    options_ = options_from_environment();
    memory_.track_from_start(options_.checks);
  } catch (const std::exception& error) {
    // Called from static constructors, where nobody can catch.
    std::fprintf(stderr, "flash_ext emulator: %s\n", error.what());
    std::exit(2);
  }
}

FatBinary* Runtime::add_fat_binary(const void* wrapper) {
  auto binary = std::make_unique<FatBinary>();
  try {
    binary->images = parse_fatbin(wrapper);
  } catch (const FatbinError& error) {
    binary->parse_error = error.what();
  }
  std::lock_guard lock(mutex_);
  FatBinary* const key = binary.get();
  binaries_.emplace(key, std::move(binary));
  return key;
}

void Runtime::remove_fat_binary(FatBinary* binary) {
  std::lock_guard lock(mutex_);
  std::erase_if(handles_, [&](const auto& item) { return item.second->binary == binary; });
  std::erase_if(kernels_, [&](const auto& item) { return item.second->binary == binary; });
  std::erase_if(variables_, [&](const auto& item) { return item.second.binary == binary; });
  binaries_.erase(binary);
}

void Runtime::add_kernel(FatBinary* binary, const void* host, const std::string& name) {
  auto kernel = std::make_unique<Kernel>(Kernel{binary, name, {}});
  std::lock_guard lock(mutex_);
  handles_[kernel.get()] = kernel.get();
  kernels_[host] = std::move(kernel);
}

void Runtime::add_variable(FatBinary* binary, const void* host, const std::string& name, size_t bytes) {
  std::lock_guard lock(mutex_);
  variables_[host] = Variable{binary, name, bytes};
}

Kernel* Runtime::find_kernel(const void* function) {
  std::lock_guard lock(mutex_);
  if (const auto at = kernels_.find(function); at != kernels_.end()) return at->second.get();
  if (const auto at = handles_.find(function); at != handles_.end()) return at->second;
  throw ApiError(cudaErrorInvalidDeviceFunction, "not a kernel that any object file registered");
}

Kernel* Runtime::find_by_name(const std::string& name) {
  std::lock_guard lock(mutex_);
  Kernel* found = nullptr;
  for (const auto& [host, kernel] : kernels_) {
    if (kernel->name != name) continue;
    // Extensions for different GPUs may share names: one that this GPU runs comes first.
    std::string why;
    found = kernel.get();
    if (select_ptx(found->binary->images, {static_cast<int>(options_.sm_version), 0}, &why)) break;
  }
  if (!found) {
    throw ApiError(cudaErrorInvalidDeviceFunction, "no kernel named '" + name + "' is registered");
  }
  return found;
}

std::shared_ptr<Module> Runtime::load_module(FatBinary& binary) {
  const Arch device{static_cast<int>(options().sm_version), 0};
  std::lock_guard lock(mutex_);
  if (const auto at = binary.loaded.find(device.number); at != binary.loaded.end()) return at->second;
  std::string text, name = "replaced PTX";
  if (const auto at = binary.replaced.find(device.number); at != binary.replaced.end()) {
    text = at->second;
  } else {
    if (!binary.parse_error.empty()) throw FatbinError(binary.parse_error);
    std::string why;
    const FatbinImage* image = select_ptx(binary.images, device, &why);
    if (!image) throw ApiError(cudaErrorNoKernelImageForDevice, why);
    text = ptx_text(*image);
    name = "PTX for " + image->arch.name();
  }
  return binary.loaded[device.number] = Module::load(text, name);
}

LoadedKernel Runtime::load_kernel(const void* function) {
  const Kernel* kernel = find_kernel(function);
  LoadedKernel loaded{load_module(*kernel->binary), nullptr, kernel->limits};
  loaded.info = loaded.module->find_kernel(kernel->name);
  if (!loaded.info) {
    throw ApiError(cudaErrorInvalidDeviceFunction, "kernel '" + kernel->name + "' is not in its PTX");
  }
  return loaded;
}

void* Runtime::symbol_address(const void* host, size_t* bytes) {
  Variable variable;
  {
    std::lock_guard lock(mutex_);
    const auto at = variables_.find(host);
    if (at == variables_.end()) {
      throw ApiError(cudaErrorInvalidSymbol, "not a device variable that any object file registered");
    }
    variable = at->second;
  }
  void* const address = load_module(*variable.binary)->find_symbol(variable.name, bytes);
  if (!address) {
    throw ApiError(cudaErrorInvalidSymbol, "variable '" + variable.name + "' is not in its PTX");
  }
  return address;
}

void Runtime::set_limits(const void* function, const KernelLimits& limits) {
  Kernel* const kernel = find_kernel(function);
  std::lock_guard lock(mutex_);
  kernel->limits = limits;
}

Options Runtime::options() {
  std::lock_guard lock(mutex_);
  return options_;
}

void Runtime::set_options(const Options& options) {
  device_model(static_cast<int>(options.sm_version));
  memory_.track_from_start(options.checks);
  std::lock_guard lock(mutex_);
  options_ = options;
}

void Runtime::run(const void* function, Launch launch, void** arguments, bool cooperative) {
  const LoadedKernel kernel = load_kernel(function);
  const KernelInfo& info = *kernel.info;
  Options options = this->options();
  const DeviceModel& device = device_model(static_cast<int>(options.sm_version));
  if (launch.cluster.count() == 1 && info.required_cluster.x != 0) launch.cluster = info.required_cluster;
  if (const Refusal refusal = check_launch(device, info, kernel.limits, launch); refusal.error) {
    throw ApiError(static_cast<cudaError_t>(refusal.error), info.name + ": " + refusal.reason);
  }
  if (cooperative) {
    const int per_sm = occupancy(device, info, static_cast<int>(launch.block.count()), launch.dynamic_shared_bytes);
    if (launch.grid.count() > uint64_t{options.num_sms} * per_sm) {
      throw ApiError(cudaErrorCooperativeLaunchTooLarge,
                     info.name + ": " + std::to_string(launch.grid.count()) + " CTAs, but only " +
                         std::to_string(uint64_t{options.num_sms} * per_sm) + " are resident together");
    }
    options.num_sms = static_cast<uint32_t>(launch.grid.count());  // all of them run together
  }
  if (!info.params.empty() && !arguments) {
    throw ApiError(cudaErrorInvalidValue, info.name + ": launched without arguments");
  }
  launch.params.assign(info.param_bytes, 0);
  for (size_t i = 0; i < info.params.size(); ++i) {
    std::memcpy(launch.params.data() + info.params[i].offset, arguments[i], info.params[i].bytes);
  }
  const MemoryMap memory = memory_.map(options.checks);
  std::unique_lock<std::mutex> shadow_lock;
  if (options.checks) {
    launch.shadow = &memory_.shadow();
    shadow_lock = std::unique_lock(memory_.shadow_mutex());
  }
  Report report = emulator::launch(*kernel.module, info.name, launch, memory, options);
  if (shadow_lock) shadow_lock.unlock();
  std::fwrite(report.printed.data(), 1, report.printed.size(), stdout);
  if (!report.printed.empty()) std::fflush(stdout);
  record(launch, std::move(report));
}

void Runtime::record(const Launch& launch, Report report) {
  report.printed.clear();
  std::lock_guard lock(mutex_);
  if (launches_.size() == kMaxLaunchRecords) launches_.pop_front();
  launches_.push_back({report.kernel, launch.grid, launch.block, launch.cluster, launch.dynamic_shared_bytes,
                       report.warp_instructions, report.seconds});
  const auto at = reports_.find(report.kernel);
  // A kernel whose PTX was replaced, or that runs for another GPU, starts afresh.
  if (at == reports_.end() || at->second.blocks.size() != report.blocks.size()) {
    const std::string name = report.kernel;
    reports_.insert_or_assign(name, std::move(report));
  } else {
    accumulate(at->second, report);
  }
}

std::vector<std::string> Runtime::kernel_names() {
  std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [host, kernel] : kernels_) names.push_back(kernel->name);
  std::sort(names.begin(), names.end());
  return names;
}

std::string Runtime::kernel_ptx(const std::string& name) {
  const FatBinary& binary = *find_by_name(name)->binary;
  if (!binary.parse_error.empty()) throw FatbinError(binary.parse_error);
  std::string why;
  const FatbinImage* image = select_ptx(binary.images, {static_cast<int>(options().sm_version), 0}, &why);
  if (!image) throw ApiError(cudaErrorNoKernelImageForDevice, why);
  return ptx_text(*image);
}

void Runtime::replace_ptx(const std::string& name, const std::optional<std::string>& ptx) {
  FatBinary& binary = *find_by_name(name)->binary;
  const int device = static_cast<int>(options().sm_version);
  std::lock_guard lock(mutex_);
  binary.loaded.erase(device);
  if (ptx) {
    binary.replaced[device] = *ptx;
  } else {
    binary.replaced.erase(device);
  }
}

std::vector<Report> Runtime::reports() {
  std::lock_guard lock(mutex_);
  std::vector<Report> all;
  for (const auto& [name, report] : reports_) all.push_back(report);
  return all;
}

std::vector<LaunchRecord> Runtime::launches() {
  std::lock_guard lock(mutex_);
  return {launches_.begin(), launches_.end()};
}

void Runtime::reset_reports() {
  std::lock_guard lock(mutex_);
  reports_.clear();
  launches_.clear();
}

}  // namespace flash_ext::emulator
