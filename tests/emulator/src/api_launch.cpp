// The runtime API, part 1: registration by nvcc's static constructors, and kernel launches.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "runtime.h"

using namespace flash_ext::emulator;

namespace {

Dim3 to_dim3(dim3 d) { return {d.x, d.y, d.z}; }

// <<<...>>> pushes its configuration, the host stub pops it.
struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
std::vector<CallConfiguration>& call_configurations() {
  thread_local std::vector<CallConfiguration> stack;
  return stack;
}

uint32_t shared_bytes(size_t bytes) {
  if (bytes > UINT32_MAX) throw ApiError(cudaErrorInvalidValue, "more than 4 GiB of shared memory");
  return static_cast<uint32_t>(bytes);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   bool cooperative = false) {
  return guarded([&] {
    Launch launch{to_dim3(grid), to_dim3(block), {}, shared_bytes(shared), {}};
    Runtime::get().run(function, launch, arguments, cooperative);
  });
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(Runtime::get().add_fat_binary(wrapper));
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) {
  Runtime::get().remove_fat_binary(reinterpret_cast<FatBinary*>(handle));
}

char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Runtime::get().add_kernel(reinterpret_cast<FatBinary*>(handle), host, name);
}

void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t bytes, int, int) {
  Runtime::get().add_variable(reinterpret_cast<FatBinary*>(handle), host, name, bytes);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  call_configurations().push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto& stack = call_configurations();
  if (stack.empty()) return fail(cudaErrorMissingConfiguration, "kernel stub called without <<<...>>>");
  *grid = stack.back().grid;
  *block = stack.back().block;
  *shared = stack.back().shared;
  *static_cast<cudaStream_t*>(stream) = stack.back().stream;
  stack.pop_back();
  return cudaSuccess;
}

cudaError_t cudaGetKernel(cudaKernel_t* handle, const void* host) {
  return guarded([&] { *handle = reinterpret_cast<cudaKernel_t>(Runtime::get().find_kernel(host)); });
}

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host) { return cudaGetKernel(handle, host); }

cudaError_t cudaGetFuncBySymbol(cudaFunction_t* handle, const void* host) {
  return guarded([&] { *handle = reinterpret_cast<cudaFunction_t>(Runtime::get().find_kernel(host)); });
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t) {
  return launch(function, grid, block, arguments, shared, /*cooperative=*/true);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return guarded([&] {
    if (!config) throw ApiError(cudaErrorInvalidValue, "null launch configuration");
    Launch launch{to_dim3(config->gridDim), to_dim3(config->blockDim), {}, shared_bytes(config->dynamicSmemBytes), {}};
    bool cooperative = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = config->attrs[i];
      switch (attribute.id) {
        case cudaLaunchAttributeClusterDimension: {
          const auto& dim = attribute.val.clusterDim;
          launch.cluster = {dim.x, dim.y, dim.z};
          break;
        }
        case cudaLaunchAttributeCooperative:
          cooperative = attribute.val.cooperative != 0;
          break;
        // Hints, and overlap with other launches, which cannot happen: kernels run one by one.
        case cudaLaunchAttributeIgnore:
        case cudaLaunchAttributeAccessPolicyWindow:
        case cudaLaunchAttributeSynchronizationPolicy:
        case cudaLaunchAttributeClusterSchedulingPolicyPreference:
        case cudaLaunchAttributeProgrammaticStreamSerialization:
        case cudaLaunchAttributePriority:
        case cudaLaunchAttributeMemSyncDomainMap:
        case cudaLaunchAttributeMemSyncDomain:
        case cudaLaunchAttributePreferredClusterDimension:
        case cudaLaunchAttributePreferredSharedMemoryCarveout:
          break;
        default:
          throw ApiError(cudaErrorNotSupported,
                         "launch attribute " + std::to_string(attribute.id) + " is not emulated");
      }
    }
    Runtime::get().run(function, launch, arguments, cooperative);
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return guarded([&] {
    Runtime& runtime = Runtime::get();
    LoadedKernel kernel = runtime.load_kernel(function);
    const DeviceModel& device = device_model(static_cast<int>(runtime.options().sm_version));
    switch (attribute) {
      case cudaFuncAttributeMaxDynamicSharedMemorySize: {
        const int allowed = device.shared_per_cta_optin - static_cast<int>(kernel.info->static_shared_bytes);
        if (value < 0 || value > allowed) {
          throw ApiError(cudaErrorInvalidValue, kernel.info->name + ": " + std::to_string(value) +
                                                    " bytes of dynamic shared memory asked for, " + device.name +
                                                    " allows " + std::to_string(allowed));
        }
        kernel.limits.max_dynamic_shared = value;
        break;
      }
      case cudaFuncAttributeNonPortableClusterSizeAllowed:
        kernel.limits.non_portable_cluster = value != 0;
        break;
      case cudaFuncAttributePreferredSharedMemoryCarveout:
      case cudaFuncAttributeClusterSchedulingPolicyPreference:
        break;
      default:
        throw ApiError(cudaErrorInvalidValue, "function attribute " + std::to_string(attribute) + " cannot be set");
    }
    runtime.set_limits(function, kernel.limits);
  });
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute, int value, int) {
  return cudaFuncSetAttribute(kernel, attribute, value);
}

cudaError_t cudaFuncSetCacheConfig(const void* function, cudaFuncCache) {
  return guarded([&] { Runtime::get().find_kernel(function); });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  return guarded([&] {
    Runtime& runtime = Runtime::get();
    const LoadedKernel kernel = runtime.load_kernel(function);
    const Options options = runtime.options();
    *out = {};
    out->sharedSizeBytes = kernel.info->static_shared_bytes;
    out->maxThreadsPerBlock = max_threads(*kernel.info);
    out->numRegs = register_bound(*kernel.info);
    out->ptxVersion = out->binaryVersion = static_cast<int>(options.sm_version);
    out->maxDynamicSharedSizeBytes = max_dynamic_shared(*kernel.info, kernel.limits);
    out->preferredShmemCarveout = -1;
    const Dim3& cluster = kernel.info->required_cluster;
    out->clusterDimMustBeSet = cluster.x != 0;
    out->requiredClusterWidth = static_cast<int>(cluster.x);
    out->requiredClusterHeight = static_cast<int>(cluster.y);
    out->requiredClusterDepth = static_cast<int>(cluster.z);
    out->nonPortableClusterSizeAllowed = kernel.limits.non_portable_cluster;
  });
}

cudaError_t cudaFuncGetName(const char** name, const void* function) {
  return guarded([&] { *name = Runtime::get().find_kernel(function)->name.c_str(); });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t dynamic_shared, unsigned) {
  return guarded([&] {
    Runtime& runtime = Runtime::get();
    const DeviceModel& device = device_model(static_cast<int>(runtime.options().sm_version));
    *blocks = occupancy(device, *runtime.load_kernel(function).info, threads, dynamic_shared);
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, dynamic_shared, 0);
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config) {
  return guarded([&] {
    Runtime& runtime = Runtime::get();
    const Options options = runtime.options();
    const DeviceModel& device = device_model(static_cast<int>(options.sm_version));
    const LoadedKernel kernel = runtime.load_kernel(function);
    Dim3 cluster = kernel.info->required_cluster.x ? kernel.info->required_cluster : Dim3{};
    for (unsigned i = 0; i < config->numAttrs; ++i) {
      if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
        const auto& dim = config->attrs[i].val.clusterDim;
        cluster = {dim.x, dim.y, dim.z};
      }
    }
    Launch launch{cluster, to_dim3(config->blockDim), cluster, shared_bytes(config->dynamicSmemBytes), {}};
    const Refusal refusal = check_launch(device, *kernel.info, kernel.limits, launch);
    if (refusal.error) throw ApiError(static_cast<cudaError_t>(refusal.error), refusal.reason);
    const int per_sm =
        occupancy(device, *kernel.info, static_cast<int>(launch.block.count()), launch.dynamic_shared_bytes);
    *clusters = static_cast<int>(uint64_t{options.num_sms} * per_sm / cluster.count());
  });
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* function, const cudaLaunchConfig_t*) {
  return guarded([&] {
    Runtime& runtime = Runtime::get();
    const bool clusters = device_model(static_cast<int>(runtime.options().sm_version)).has_clusters();
    const bool large = runtime.load_kernel(function).limits.non_portable_cluster;
    *size = !clusters ? 1 : large ? kMaxClusterSize : kPortableClusterSize;
  });
}

}  // extern "C"
