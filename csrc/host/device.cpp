#include "host/device.h"

#include <array>
#include <mutex>

#include "host/check.h"
#include "host/emulator.h"

namespace flash_ext {

namespace {

DeviceInfo query(int device_index) {
  const auto attribute = [device_index](cudaDeviceAttr which) {
    int value = 0;
    FX_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_index), "cudaDeviceGetAttribute");
    return value;
  };
  return {
      .arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
      .num_sms = attribute(cudaDevAttrMultiProcessorCount),
      .smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
  };
}

}  // namespace

const DeviceInfo& device_info_of_cuda_device(int device_index) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceInfo, kMaxDevices> cache;
  static std::array<std::once_flag, kMaxDevices> filled;
  FX_CHECK(device_index >= 0 && device_index < kMaxDevices, "device index must lie in [0, ", kMaxDevices, "), got ",
           device_index);
  // An emulated GPU changes its number of SMs from call to call.
  if (flash_ext_emulator_register != nullptr) return cache[device_index] = query(device_index);
  std::call_once(filled[device_index], [device_index] { cache[device_index] = query(device_index); });
  return cache[device_index];
}

}  // namespace flash_ext
