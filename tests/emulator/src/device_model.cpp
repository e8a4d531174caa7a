#include "device_model.h"

#include <driver_types.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace flash_ext::emulator {
namespace {

constexpr int kKiB = 1024, kMiB = 1024 * 1024;

// CUDA programming guide, "Technical Specifications per Compute Capability".
constexpr DeviceModel kDevices[] = {
    {80, "Emulated sm80 (A100)", 164 * kKiB, 163 * kKiB, 2048, 32, 40 * kMiB},
    {86, "Emulated sm86 (A10)", 100 * kKiB, 99 * kKiB, 1536, 16, 6 * kMiB},
    {89, "Emulated sm89 (L40)", 100 * kKiB, 99 * kKiB, 1536, 24, 96 * kMiB},
    {90, "Emulated sm90 (H100)", 228 * kKiB, 227 * kKiB, 2048, 32, 50 * kMiB},
    {100, "Emulated sm100 (B200)", 228 * kKiB, 227 * kKiB, 2048, 32, 126 * kMiB},
    {120, "Emulated sm120 (RTX 5090)", 100 * kKiB, 99 * kKiB, 1536, 24, 96 * kMiB},
};

std::string text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

template <class... Parts>
Refusal refuse(cudaError error, const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return {error, out.str()};
}

bool given(const Dim3& d) { return d.x != 0; }
bool same(const Dim3& a, const Dim3& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

Refusal check_cluster(const DeviceModel& device, const KernelInfo& kernel, const KernelLimits& limits,
                      const Launch& launch) {
  const Dim3& c = launch.cluster;
  if (c.count() == 0) return refuse(cudaErrorInvalidValue, "cluster ", text(c), " is empty");
  if (given(kernel.required_cluster) && !same(kernel.required_cluster, c)) {
    return refuse(cudaErrorInvalidClusterSize, "cluster ", text(c), ", but the kernel was compiled for ",
                  text(kernel.required_cluster));
  }
  if (c.count() == 1) return {};
  if (!device.has_clusters()) {
    return refuse(cudaErrorNotSupported, "clusters need sm90 or later, the device is sm", device.sm_version);
  }
  const uint64_t limit = limits.non_portable_cluster ? kMaxClusterSize : kPortableClusterSize;
  if (c.count() > limit) {
    return refuse(cudaErrorInvalidClusterSize, "cluster of ", c.count(), " CTAs, the limit is ", limit,
                  limits.non_portable_cluster ? "" : " without cudaFuncAttributeNonPortableClusterSizeAllowed");
  }
  if (launch.grid.x % c.x || launch.grid.y % c.y || launch.grid.z % c.z) {
    return refuse(cudaErrorInvalidValue, "grid ", text(launch.grid), " is not a multiple of the cluster ", text(c));
  }
  return {};
}

}  // namespace

const DeviceModel& device_model(int sm_version) {
  for (const DeviceModel& device : kDevices) {
    if (device.sm_version == sm_version) return device;
  }
  std::string known;
  for (const DeviceModel& device : kDevices) known += " sm" + std::to_string(device.sm_version);
  throw std::invalid_argument("no GPU sm" + std::to_string(sm_version) + " to emulate; known:" + known);
}

int parse_sm_version(const std::string& text) { return device_model(parse_arch(text).number).sm_version; }

int max_dynamic_shared(const KernelInfo& kernel, const KernelLimits& limits) {
  if (limits.max_dynamic_shared >= 0) return limits.max_dynamic_shared;
  return std::max(0, kSharedPerCta - static_cast<int>(kernel.static_shared_bytes));
}

int max_threads(const KernelInfo& kernel) {
  const Dim3& bound = given(kernel.required_threads) ? kernel.required_threads : kernel.max_threads;
  return given(bound) ? std::min<int>(kMaxThreadsPerCta, bound.count()) : kMaxThreadsPerCta;
}

int register_bound(const KernelInfo& kernel) {
  if (kernel.max_registers) return std::min(255u, kernel.max_registers);
  const int ctas = std::max(1u, kernel.min_ctas_per_sm);
  const int warps = (max_threads(kernel) + 31) / 32;
  return std::min(255, kRegistersPerSm / (ctas * warps * 32) / 8 * 8);
}

int occupancy(const DeviceModel& device, const KernelInfo& kernel, int threads, size_t dynamic_shared) {
  const int warps = (threads + 31) / 32;
  if (warps == 0 || threads > max_threads(kernel)) return 0;
  const int per_cta = static_cast<int>(kernel.static_shared_bytes + dynamic_shared);
  if (per_cta > device.shared_per_cta_optin) return 0;
  int ctas = std::min(device.ctas_per_sm, device.threads_per_sm / (warps * 32));
  ctas = std::min(ctas, device.shared_per_sm / (per_cta + kReservedSharedPerCta));
  if (kernel.max_registers || kernel.min_ctas_per_sm) {
    ctas = std::min(ctas, kRegistersPerSm / (register_bound(kernel) * warps * 32));
  }
  return ctas;
}

Refusal check_launch(const DeviceModel& device, const KernelInfo& kernel, const KernelLimits& limits,
                     const Launch& launch) {
  const Dim3 &grid = launch.grid, &block = launch.block;
  if (grid.count() == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "grid ", text(grid),
                  " is outside (1..2147483647, 1..65535, 1..65535)");
  }
  if (block.count() == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || block.count() > kMaxThreadsPerCta) {
    return refuse(cudaErrorInvalidConfiguration, "block ", text(block),
                  " is outside (1..1024, 1..1024, 1..64) or has more than 1024 threads");
  }
  if (given(kernel.required_threads) && !same(kernel.required_threads, block)) {
    return refuse(cudaErrorInvalidValue, "block ", text(block), ", but the kernel requires ",
                  text(kernel.required_threads));
  }
  if (block.count() > static_cast<uint64_t>(max_threads(kernel))) {
    return refuse(cudaErrorLaunchOutOfResources, "block of ", block.count(),
                  " threads, but the kernel's launch bounds allow ", max_threads(kernel));
  }
  const int allowed = max_dynamic_shared(kernel, limits);
  if (static_cast<int64_t>(launch.dynamic_shared_bytes) > allowed) {
    return refuse(cudaErrorInvalidValue, launch.dynamic_shared_bytes, " bytes of dynamic shared memory, but ", allowed,
                  " are allowed",
                  limits.max_dynamic_shared < 0 ? " without cudaFuncAttributeMaxDynamicSharedMemorySize"
                                                : " by cudaFuncAttributeMaxDynamicSharedMemorySize");
  }
  const size_t shared = kernel.static_shared_bytes + launch.dynamic_shared_bytes;
  if (shared > static_cast<size_t>(device.shared_per_cta_optin)) {
    return refuse(cudaErrorInvalidValue, shared, " bytes of shared memory, but a CTA has ",
                  device.shared_per_cta_optin);
  }
  return check_cluster(device, kernel, limits, launch);
}

}  // namespace flash_ext::emulator
