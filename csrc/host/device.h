// What the planner needs to know of a GPU.
#pragma once

#include <string>
#include <string_view>

namespace flash_ext {

struct DeviceInfo {
  int arch = 0;  // 10 * major + minor of the compute capability; 0 means that the tensors are not on a GPU
  int num_sms = 0;
  int smem_bytes = 0;  // shared memory that one CTA may opt in to
};

// 'sm80', 'sm86', 'sm89', 'sm90', 'sm100' or 'sm120', optionally ':SMS[:SMEM_BYTES]'; any other 'smXY:SMS:SMEM_BYTES';
// 'cpu' for none. Throws std::invalid_argument.
DeviceInfo device_info_from_name(std::string_view name);

// Cached; makes no synchronising call.
const DeviceInfo& device_info_of_cuda_device(int device_index);

}  // namespace flash_ext
