#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "decode.h"
#include "state.h"

namespace flash_ext::emulator {

namespace {

constexpr uint64_t kTurn = 200'000;  // instructions before another resident cluster has a turn
constexpr uint32_t kRegistersPerSm = 65536;
constexpr uint32_t kMaxShared = 228 * 1024;

std::string to_text(const Dim3& d) {
  return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
}

std::string fault_text(const Fault& f) {
  std::string text = f.kind + ": " + f.message + "\n  in " + f.kernel;
  if (!f.file.empty()) text += " at " + f.file + ":" + std::to_string(f.line);
  if (!f.caller_file.empty()) text += ", inlined at " + f.caller_file + ":" + std::to_string(f.caller_line);
  char lanes[16];
  std::snprintf(lanes, sizeof(lanes), "0x%08x", f.lanes);
  text += "\n  PTX line " + std::to_string(f.ptx_line) + ": " + f.ptx + "\n  CTA (" + to_text(f.cta) + "), warp " +
          std::to_string(f.warp) + ", lanes " + lanes;
  return text;
}

uint64_t align_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

KernelInfo kernel_info(const PtxFunction& function) {
  KernelInfo info;
  info.name = std::string(function.name);
  for (const PtxVariable& param : function.params) {
    info.param_bytes = align_up(info.param_bytes, param.alignment);
    info.params.push_back({std::string(param.name), info.param_bytes, param.bytes, param.alignment});
    info.param_bytes += param.bytes;
  }
  for (const PtxVariable& variable : function.variables) {
    if (variable.space == "shared") {
      info.static_shared_bytes = align_up(info.static_shared_bytes, variable.alignment) + variable.bytes;
    }
  }
  auto dim = [](const uint32_t* v) { return Dim3{v[0], v[1], v[2]}; };
  info.required_threads = dim(function.required_threads);
  info.max_threads = dim(function.max_threads);
  info.required_cluster = dim(function.required_cluster);
  info.min_ctas_per_sm = function.min_ctas;
  info.max_registers = function.max_registers;
  return info;
}

// A worker: one host thread with its counters and the clusters that it keeps resident.
class Worker {
 public:
  Worker(LaunchContext& launch, size_t residents)
      : launch_(launch),
        residents_(residents),
        random_(launch.options.seed),
        counts(launch.program->code.size()),
        traffic(launch.program->code.size()),
        copied(launch.program->code.size()) {}

  void run() {
    std::vector<std::unique_ptr<Cluster>> running;
    bool more = true;
    while (!launch_.stop) {
      while (more && running.size() < residents_) {
        const uint64_t id = launch_.next_cluster++;
        if (id >= launch_.grid_in_clusters.count()) {
          more = false;
          break;
        }
        running.push_back(make_cluster(id));
      }
      if (running.empty()) return;
      for (size_t i = 0; i < running.size() && !launch_.stop;) {
        // Hostile turns are of any length, so that what CTAs do to each other's memory comes in many orders.
        const uint64_t turn = launch_.hostile() ? kTurn >> random_() % 10 : kTurn;
        if (run_cluster(*running[i], turn)) {
          running.erase(running.begin() + static_cast<ptrdiff_t>(i));
        } else {
          ++i;
        }
      }
    }
  }

 private:
  std::unique_ptr<Cluster> make_cluster(uint64_t id) {
    auto cluster = std::make_unique<Cluster>();
    cluster->launch = &launch_;
    cluster->id = id;
    cluster->random.seed(launch_.options.seed * 0x9e3779b97f4a7c15ull + id);
    const Dim3 clusters = launch_.grid_in_clusters, shape = launch_.launch.cluster;
    const Dim3 origin = {static_cast<uint32_t>(id % clusters.x) * shape.x,
                         static_cast<uint32_t>(id / clusters.x % clusters.y) * shape.y,
                         static_cast<uint32_t>(id / clusters.x / clusters.y) * shape.z};
    ClusterShape checked;
    for (uint32_t rank = 0; rank < launch_.cluster_size; ++rank) {
      cluster->ctas.push_back(std::make_unique<Cta>());
      Cta& cta = *cluster->ctas.back();
      cta.rank = rank;
      cta.index = {origin.x + rank % shape.x, origin.y + rank / shape.x % shape.y, origin.z + rank / shape.x / shape.y};
      checked.ctas.push_back(cta.index);
      make_cta(*cluster, cta);
    }
    cluster->ctas_left = launch_.cluster_size;
    if (launch_.checks) {
      checked.warps = launch_.warps_per_cta;
      checked.shared_bytes = launch_.shared_bytes;
      checked.registers = static_cast<uint32_t>(launch_.program->function->registers.size());
      checked.launch_registers = launch_.launch_registers;
      cluster->checks = std::make_unique<ClusterChecks>(*launch_.checks, checked);
      for (auto& cta : cluster->ctas) {
        for (Warp& w : cta->warps) w.checks = cluster->checks.get();
      }
    }
    return cluster;
  }

  void make_cta(Cluster& cluster, Cta& cta) {
    const Program& program = *launch_.program;
    cta.cluster = &cluster;
    cta.launch = &launch_;
    cta.shared_bytes = launch_.shared_bytes;
    // Bytes that nobody has written read as NaN in every float format.
    cta.shared_storage.assign(launch_.shared_bytes + 1024, 0xff);
    cta.shared = cta.shared_storage.data();
    cta.shared += -reinterpret_cast<uintptr_t>(cta.shared) & 1023;
    cta.mbarrier_index.assign(launch_.shared_bytes / 8 + 1, 0);
    cta.warps_left = launch_.warps_per_cta;
    const uint32_t count = launch_.warps_per_cta;
    cta.frames.assign(size_t(program.frame_bytes) * count + 64, 0);
    uint8_t* frame = cta.frames.data();
    frame += -reinterpret_cast<uintptr_t>(frame) & 63;
    cta.warps = std::vector<Warp>(count);
    cta.warpgroups = std::vector<Warpgroup>((count + 3) / 4);
    for (uint32_t i = 0; i < count; ++i) {
      Warp& w = cta.warps[i];
      w.base[0] = frame + size_t(program.frame_bytes) * i;
      w.base[1] = launch_.constants;
      w.index = i;
      w.cta = &cta;
      w.cluster = &cluster;
      w.launch = &launch_;
      w.counts = counts.data();
      w.traffic = launch_.options.profile ? traffic.data() : nullptr;
      w.copied = copied.data();
      w.code = program.code.data();
      w.max_registers = launch_.launch_registers;
      const uint32_t threads = std::min(32u, launch_.threads_per_cta - 32 * i);
      w.live = threads == 32 ? kFullMask : (1u << threads) - 1;
      w.paths.reserve(8);
      w.paths.push_back({0, w.live, UINT32_MAX, -1, {}});
      cluster.order.push_back({&cta, i});
    }
  }

  LaunchContext& launch_;
  size_t residents_;
  std::mt19937_64 random_;  // of turns

 public:
  std::vector<uint64_t> counts;
  std::vector<LineTraffic> traffic;
  std::vector<uint64_t> copied;
};

void check_launch(const KernelInfo& info, const Program& program, LaunchContext& context) {
  Launch& l = context.launch;
  const auto fail = [&](const std::string& what) { throw LaunchError("launch of " + info.name + ": " + what); };
  auto positive = [](const Dim3& d) { return d.x && d.y && d.z; };
  if (!positive(l.grid) || !positive(l.block) || !positive(l.cluster)) {
    fail("grid (" + to_text(l.grid) + "), block (" + to_text(l.block) + ") and cluster (" + to_text(l.cluster) +
         ") must be positive");
  }
  if (l.block.count() > 1024 || l.block.x > 1024 || l.block.y > 1024 || l.block.z > 64) {
    fail("block (" + to_text(l.block) + ") exceeds 1024 threads");
  }
  if (l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535)
    fail("grid (" + to_text(l.grid) + ") exceeds the limits");
  if (info.required_threads.x && to_text(info.required_threads) != to_text(l.block)) {
    fail("block (" + to_text(l.block) + ") is not the required (" + to_text(info.required_threads) + ")");
  }
  if (info.max_threads.x && l.block.count() > info.max_threads.count()) {
    fail("block (" + to_text(l.block) + ") exceeds __launch_bounds__ (" + to_text(info.max_threads) + ")");
  }
  if (info.required_cluster.x) {
    if (l.cluster.count() > 1 && to_text(l.cluster) != to_text(info.required_cluster)) {
      fail("cluster (" + to_text(l.cluster) + ") is not the required (" + to_text(info.required_cluster) + ")");
    }
    l.cluster = info.required_cluster;
  }
  if (l.cluster.count() > 16) fail("cluster (" + to_text(l.cluster) + ") exceeds 16 CTAs");
  if (l.cluster.count() > 1 && context.options.sm_version < 90) fail("clusters need sm_90");
  if (l.grid.x % l.cluster.x || l.grid.y % l.cluster.y || l.grid.z % l.cluster.z) {
    fail("grid (" + to_text(l.grid) + ") is not a multiple of cluster (" + to_text(l.cluster) + ")");
  }
  const uint64_t shared = uint64_t(program.static_shared_bytes) + l.dynamic_shared_bytes;
  if (shared > kMaxShared) {
    fail(std::to_string(shared - program.shared_base) + " bytes of shared memory exceed " +
         std::to_string(kMaxShared - 1024));
  }
  if (l.params.size() < info.param_bytes) {
    fail("parameters of " + std::to_string(l.params.size()) + " bytes, " + std::to_string(info.param_bytes) +
         " expected");
  }
  context.shared_bytes = static_cast<uint32_t>(shared);
}

SourcePlace place_of(const LaunchContext& launch, uint32_t pc) {
  const PtxInstruction& in = launch.program->source(launch.program->code[pc]);
  const auto file = launch.program->module->files.find(in.source_file);
  return {file == launch.program->module->files.end() ? "" : file->second, in.source_line, in.line,
          std::string(in.opcode)};
}

// Where the line of an instruction was inlined.
void add_caller(const Program& program, const PtxInstruction& in, Fault& f) {
  if (!in.caller_line) return;
  const auto caller = program.module->files.find(in.caller_file);
  if (caller != program.module->files.end()) f.caller_file = caller->second;
  f.caller_line = in.caller_line;
}

void collect_report(const LaunchContext& launch, const std::vector<std::unique_ptr<Worker>>& workers, Report& report) {
  const Program& program = *launch.program;
  std::vector<uint64_t> counts(program.code.size());
  std::vector<LineTraffic> traffic(program.code.size());
  std::vector<uint64_t> copied(program.code.size());
  for (const auto& worker : workers) {
    for (size_t i = 0; i < counts.size(); ++i) {
      counts[i] += worker->counts[i];
      LineTraffic& t = traffic[i];
      const LineTraffic& o = worker->traffic[i];
      t.shared_requests += o.shared_requests;
      t.shared_wavefronts += o.shared_wavefronts;
      t.global_requests += o.global_requests;
      t.global_sectors += o.global_sectors;
      copied[i] += worker->copied[i];
    }
  }
  for (uint32_t i = 0; i < counts.size(); ++i) {
    // Of the steps that one instruction became, the last one counts.
    const bool last = i + 2 >= counts.size() || program.code[i + 1].source != program.code[i].source;
    if (!counts[i] || !last) continue;
    const SourcePlace place = place_of(launch, i);
    const LineTraffic& t = traffic[i];
    report.warp_instructions += counts[i];
    report.instructions.push_back({place.ptx_line, place.file, place.line, place.ptx, counts[i], t.shared_requests,
                                   t.shared_wavefronts, t.global_requests, t.global_sectors, copied[i]});
  }
  for (const Block& block : program.blocks) {
    BlockCoverage coverage;
    const uint32_t first = program.code[block.begin].source;
    for (const PtxLabel& label : program.function->labels) {
      if (label.target == first && label.branch_targets.empty()) coverage.label = std::string(label.name);
    }
    if (program.function->body.empty()) continue;
    coverage.first_line = program.source(program.code[block.begin]).line;
    coverage.last_line = program.source(program.code[block.end - 1]).line;
    coverage.executions = counts[block.begin];
    // The exit that every kernel ends with is not in its text.
    if (block.begin + 1 == program.code.size()) continue;
    report.blocks.push_back(coverage);
  }
}

struct AlignedBytes {
  explicit AlignedBytes(size_t bytes) : storage(bytes + 128) {
    data = storage.data() + (-reinterpret_cast<uintptr_t>(storage.data()) & 63);
  }
  std::vector<uint8_t> storage;
  uint8_t* data;
};

}  // namespace

Diagnostic::Diagnostic(Fault fault) : std::runtime_error(fault_text(fault)), fault_(std::move(fault)) {}

Where Warp::where(Mask lanes) const { return {cta->rank, index, lanes, pc}; }

void fault_at(const LaunchContext& launch, uint32_t pc, const Cta* cta, uint32_t warp, Mask lanes, const char* kind,
              const std::string& message, uint64_t address) {
  Fault f;
  f.kind = kind;
  f.message = message;
  f.kernel = launch.kernel;
  const SourcePlace place = place_of(launch, pc);
  f.file = place.file;
  f.line = place.line;
  add_caller(*launch.program, launch.program->source(launch.program->code[pc]), f);
  f.ptx_line = place.ptx_line;
  f.ptx = place.ptx;
  if (cta) f.cta = cta->index;
  f.warp = warp;
  f.lanes = lanes;
  f.address = address;
  throw Diagnostic(std::move(f));
}

void fault(const Warp& w, Mask lanes, const char* kind, const std::string& message, uint64_t address) {
  fault_at(*w.launch, w.pc, w.cta, w.index, lanes, kind, message, address);
}

void MemoryMap::add(const void* begin, size_t bytes, Role role, std::string name) {
  const uint64_t address = reinterpret_cast<uint64_t>(begin);
  ranges_[address] = {address, bytes, role, std::move(name)};
}
void MemoryMap::remove(const void* begin) { ranges_.erase(reinterpret_cast<uint64_t>(begin)); }

const MemoryRange* MemoryMap::find(uint64_t address) const {
  auto it = ranges_.upper_bound(address);
  if (it == ranges_.begin()) return nullptr;
  --it;
  return address - it->second.begin < it->second.bytes ? &it->second : nullptr;
}

std::string MemoryMap::describe(uint64_t address) const {
  auto next = ranges_.upper_bound(address);
  std::string text;
  if (next != ranges_.begin()) {
    const MemoryRange& before = std::prev(next)->second;
    const uint64_t past = address - before.begin - before.bytes;
    text = address - before.begin < before.bytes ? std::to_string(address - before.begin) + " bytes into '" +
                                                       before.name + "' of " + std::to_string(before.bytes) + " bytes"
                                                 : std::to_string(past) + " bytes past the end of '" + before.name +
                                                       "' of " + std::to_string(before.bytes) + " bytes";
  }
  if (next != ranges_.end()) {
    text += (text.empty() ? "" : ", ") + std::to_string(next->second.begin - address) + " bytes before '" +
            next->second.name + "'";
  }
  return text.empty() ? "no memory is registered" : text;
}

ModuleImpl::ModuleImpl(std::unique_ptr<PtxModule> ptx) : ptx_(std::move(ptx)) {
  for (const PtxVariable& variable : ptx_->variables) {
    if (variable.space == "shared" || variable.is_extern) continue;
    const uint64_t alignment = std::max<uint64_t>(variable.alignment, 16);
    storage_.push_back(std::make_unique<uint8_t[]>(variable.bytes + alignment));
    uint8_t* data = storage_.back().get();
    data += -reinterpret_cast<uintptr_t>(data) & (alignment - 1);
    std::memset(data, 0, variable.bytes);
    if (!variable.data.empty()) std::memcpy(data, variable.data.data(), variable.data.size());
    variables_[variable.name] = {std::string(variable.name), data, variable.bytes, variable.space == "const"};
  }
  for (const PtxVariable& variable : ptx_->variables) {
    for (const PtxVariable::Fixup& fixup : variable.fixups) {
      const auto target = variables_.find(fixup.symbol);
      // Tables of functions stay zero: calls through pointers are refused where they stand.
      const bool is_function = std::any_of(ptx_->functions.begin(), ptx_->functions.end(),
                                           [&](const auto& f) { return f->name == fixup.symbol; });
      if (is_function) continue;
      if (target == variables_.end())
        throw LoadError("initialiser of " + std::string(variable.name) + " names unknown " + std::string(fixup.symbol));
      const uint64_t address = reinterpret_cast<uint64_t>(target->second.data) + static_cast<uint64_t>(fixup.addend);
      std::memcpy(variables_[variable.name].data + fixup.offset, &address, 8);
    }
  }
  for (const auto& function : ptx_->functions) {
    if (!function->has_body) continue;
    functions_[function->name] = function.get();
    if (function->is_entry) kernels_[std::string(function->name)] = kernel_info(*function);
  }
}

const PtxFunction* ModuleImpl::function(std::string_view name) const {
  const auto found = functions_.find(name);
  return found == functions_.end() ? nullptr : found->second;
}

const Program& ModuleImpl::program(const std::string& kernel, uint32_t sm_version) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Program>& program = programs_[{kernel, sm_version}];
  if (!program) program = Decoder(*this, *function(kernel), sm_version).run();
  return *program;
}

Module::Module(std::unique_ptr<ModuleImpl> impl) : impl_(std::move(impl)) {}
Module::~Module() = default;

std::shared_ptr<Module> Module::load(const std::string& ptx, const std::string& name) {
  return std::shared_ptr<Module>(new Module(std::make_unique<ModuleImpl>(parse_ptx(ptx, name))));
}

std::vector<std::string> Module::kernel_names() const {
  std::vector<std::string> names;
  for (const auto& [name, info] : impl_->kernels()) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

const KernelInfo* Module::find_kernel(const std::string& name) const {
  const auto found = impl_->kernels().find(name);
  return found == impl_->kernels().end() ? nullptr : &found->second;
}

void* Module::find_symbol(const std::string& name, size_t* bytes) const {
  const auto found = impl_->variables().find(name);
  if (found == impl_->variables().end()) return nullptr;
  if (bytes) *bytes = found->second.bytes;
  return found->second.data;
}

Report launch(const Module& module, const std::string& kernel, const Launch& launch, const MemoryMap& memory,
              const Options& options) {
  const KernelInfo* info = module.find_kernel(kernel);
  if (!info) throw LaunchError("no kernel named " + kernel + " in the module");
  const auto start = std::chrono::steady_clock::now();
  std::unique_ptr<GlobalShadow> own_shadow;  // outlives the checks in the context
  LaunchContext context;
  context.kernel = kernel;
  context.launch = launch;
  context.options = options;
  context.options.num_sms = std::max(1u, options.num_sms);
  context.memory = &memory;
  context.program = &module.impl().program(kernel, options.sm_version);
  check_launch(*info, *context.program, context);

  AlignedBytes params(std::max<size_t>(info->param_bytes, 1)), constants(context.program->constants.size() * 4);
  if (info->param_bytes) std::memcpy(params.data, launch.params.data(), info->param_bytes);
  if (!context.program->constants.empty()) {
    std::memcpy(constants.data, context.program->constants.data(), context.program->constants.size() * 4);
  }
  context.params = params.data;
  context.constants = constants.data;

  for (const auto& [begin, range] : memory.ranges()) {
    context.ranges.push_back({range.begin, range.begin + range.bytes, range.role != Role::kIn, &range});
  }
  for (const auto& [name, variable] : module.impl().variables()) {
    const uint64_t begin = reinterpret_cast<uint64_t>(variable.data);
    context.ranges.push_back({begin, begin + variable.bytes, !variable.is_const, nullptr});
  }
  const uint64_t param_begin = reinterpret_cast<uint64_t>(params.data);
  context.ranges.push_back({param_begin, param_begin + info->param_bytes, false, nullptr});
  std::sort(context.ranges.begin(), context.ranges.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });

  const Dim3 grid = launch.grid, cluster = context.launch.cluster;
  context.cluster_size = static_cast<uint32_t>(cluster.count());
  context.grid_in_clusters = {grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
  context.threads_per_cta = static_cast<uint32_t>(launch.block.count());
  context.warps_per_cta = (context.threads_per_cta + 31) / 32;
  // What ptxas may use at most: the register file divided among the threads that must fit.
  const uint32_t bound =
      info->max_threads.x ? static_cast<uint32_t>(info->max_threads.count()) : context.threads_per_cta;
  const uint32_t ctas = std::max(1u, info->min_ctas_per_sm);
  context.launch_registers = std::min(255u, kRegistersPerSm / std::max(1u, bound * ctas) / 8 * 8);
  if (info->max_registers) context.launch_registers = std::min(context.launch_registers, info->max_registers);

  if (options.checks) {
    GlobalShadow* shadow = launch.shadow;
    if (!shadow) {
      own_shadow = std::make_unique<GlobalShadow>();
      shadow = own_shadow.get();
    }
    shadow->sync(memory);
    LaunchInfo checked;
    checked.kernel = kernel;
    checked.locate = [&context](uint32_t pc) { return place_of(context, pc); };
    checked.register_name = [&context](uint32_t id) { return context.program->function->registers[id].full_name(); };
    context.checks = std::make_unique<LaunchChecks>(checked, *shadow);
  }

  const size_t threads = options.checks ? 1 : std::clamp<size_t>(options.num_threads, 1, 256);
  const size_t residents = std::max<size_t>(1, context.options.num_sms / context.cluster_size / threads);
  std::vector<std::unique_ptr<Worker>> workers;
  std::mutex mutex;
  std::exception_ptr failure;
  auto body = [&](Worker& worker) {
    try {
      worker.run();
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
      context.stop = true;
    }
  };
  for (size_t t = 0; t < threads; ++t) workers.push_back(std::make_unique<Worker>(context, residents));
  std::vector<std::thread> pool;
  for (size_t t = 1; t < threads; ++t) pool.emplace_back([&, t] { body(*workers[t]); });
  body(*workers[0]);
  for (std::thread& thread : pool) thread.join();

  try {
    if (context.checks && context.checks->failed()) {
      Fault found = context.checks->faults().front();
      for (const PtxInstruction& in : context.program->function->body) {
        if (in.line == found.ptx_line) add_caller(*context.program, in, found);
      }
      throw Diagnostic(std::move(found));
    }
    if (failure) std::rethrow_exception(failure);
  } catch (const Diagnostic& d) {
    if (context.printed.empty()) throw;
    Fault f = d.fault();
    f.message += "\n  printed before: " + context.printed;
    throw Diagnostic(std::move(f));
  }
  Report report;
  report.kernel = kernel;
  collect_report(context, workers, report);
  report.printed = context.printed;
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace flash_ext::emulator
