// What the emulated GPUs report about themselves, and what they refuse to launch.
#pragma once

#include <cstdint>
#include <string>

#include "fatbin.h"
#include "machine.h"

namespace flash_ext::emulator {

struct DeviceModel {
  int sm_version;  // major * 10 + minor
  const char* name;
  int shared_per_sm;         // bytes
  int shared_per_cta_optin;  // what cudaFuncSetAttribute may ask for
  int threads_per_sm;
  int ctas_per_sm;
  int l2_bytes;

  int major() const { return sm_version / 10; }
  int minor() const { return sm_version % 10; }
  bool has_clusters() const { return major() >= 9; }
};

inline constexpr int kSharedPerCta = 48 * 1024;  // without the opt-in
inline constexpr int kRegistersPerSm = 65536;
inline constexpr int kMaxThreadsPerCta = 1024;
inline constexpr int kPortableClusterSize = 8, kMaxClusterSize = 16;

// Shared memory that the system keeps for itself in every CTA.
inline constexpr int kReservedSharedPerCta = 1024;

// Throws std::invalid_argument, listing the known ones, for a GPU that is not modelled.
const DeviceModel& device_model(int sm_version);

// Reads "sm90", "sm_90a" or "90".
int parse_sm_version(const std::string& text);

// A refused launch: the error code that a GPU returns, and why in words.
struct Refusal {
  int error = 0;  // cudaError_t; 0: none
  std::string reason;
};

// What the host set on a kernel with cudaFuncSetAttribute.
struct KernelLimits {
  int max_dynamic_shared = -1;  // -1: the default, 48 KiB less the static part
  bool non_portable_cluster = false;
};

int max_dynamic_shared(const KernelInfo& kernel, const KernelLimits& limits);
int max_threads(const KernelInfo& kernel);

Refusal check_launch(const DeviceModel& device, const KernelInfo& kernel, const KernelLimits& limits,
                     const Launch& launch);

// CTAs of a kernel that fit on one SM. Register use is bounded by the kernel's launch bounds, as
// PTX does not tell it.
int occupancy(const DeviceModel& device, const KernelInfo& kernel, int threads, size_t dynamic_shared);

// Registers per thread that the launch bounds allow.
int register_bound(const KernelInfo& kernel);

}  // namespace flash_ext::emulator
