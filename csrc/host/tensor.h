// Tensors -> plain problems, and the few things an op body asks of LibTorch. The stable ABI alone (torch >= 2.10).
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/params.h"
#include "host/device.h"
#include "host/problem.h"

namespace flash_ext {

using torch::stable::Tensor;

TensorLayout layout_of(const Tensor& tensor);
ScalarType scalar_type_of(const Tensor& tensor);
RowStrides row_strides_of(const Tensor& tensor);  // (batch, seqlen, num_heads, head_dim)

// Repeats only what memory safety needs; flash_ext/arguments.py has told the user everything else.
FwdProblem fwd_problem_from_tensors(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal,
                                    int64_t window_left, int64_t window_right, double softcap,
                                    const std::optional<std::string>& backend);

// The tensor itself, or a contiguous copy when why_copied() has a reason.
Tensor with_aligned_rows(const Tensor& tensor);

Tensor new_float32(const Tensor& like, std::initializer_list<int64_t> sizes);

// Calls an op of flash_ext through the dispatcher: arguments in, results out. Throws with the op's own message where torch
// can tell it (2.13 and later).
void call_op(const char* name, StableIValue* stack);

// Makes the tensor's device current while it lives; holds the stream to launch on.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor);
  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

const DeviceInfo& device_info_of(const Tensor& tensor);

}  // namespace flash_ext
