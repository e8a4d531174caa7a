// Under the emulator every tensor that an op receives or allocates is registered with its role; any other address is out
// of bounds there, and a write to an input is an error. On a GPU the weak symbols are absent and nothing happens.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>

extern "C" {
__attribute__((weak)) void flash_ext_emulator_register(const void* data, size_t bytes, int role, const char* name);
__attribute__((weak)) void flash_ext_emulator_clear();
}

namespace flash_ext {

enum class MemoryRole : int { kIn = 0, kOut = 1, kInOut = 2, kWorkspace = 3 };

// The tensors of one op call, registered while it lives.
class OpMemory {
 public:
  OpMemory() = default;
  OpMemory(const OpMemory&) = delete;
  OpMemory& operator=(const OpMemory&) = delete;
  ~OpMemory() {
    if (flash_ext_emulator_clear != nullptr) flash_ext_emulator_clear();
  }

  void add(const torch::stable::Tensor& tensor, MemoryRole role, const char* name) const {
    if (flash_ext_emulator_register == nullptr || tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    flash_ext_emulator_register(tensor.data_ptr(), static_cast<size_t>(last + 1) * tensor.element_size(),
                                static_cast<int>(role), name);
  }
};

}  // namespace flash_ext
