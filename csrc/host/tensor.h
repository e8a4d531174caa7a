// Tensors -> plain problems, and the few things an op body asks of LibTorch. The stable ABI alone (torch >= 2.10).
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/params.h"
#include "host/device.h"
#include "host/problem.h"

namespace flash_ext {

using torch::stable::Tensor;

// What the ops get beside q, k and v, in the order of the schemas in flash_ext/ops.py, where shapes are told.
struct AttentionInputs {
  Tensor q, k, v;
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_q, leftpad_k;
  std::optional<Tensor> sinks, alibi_slopes, k_bias;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  std::vector<int64_t> split_boundaries;
  std::optional<Tensor> keys_of = {}, queries_of = {};  // of grouped sequences, see MaskParams
};

TensorLayout layout_of(const Tensor& tensor);  // packed (total, num_heads, head_dim): as a batch of 1
ScalarType scalar_type_of(const Tensor& tensor);
RowStrides row_strides_of(const Tensor& tensor);  // (batch, seqlen, num_heads, head_dim), or packed: batch 0

// Repeats only what memory safety needs; flash_ext/arguments.py has told the user everything else.
FwdProblem problem_from_inputs(const AttentionInputs& inputs, const std::optional<std::string>& backend);

// The params that forward and backward share. q, k and v: the tensors that the kernels read, see with_aligned_rows.
void fill_attention_params(AttentionParams* params, const AttentionInputs& inputs, const FwdProblem& problem, const Tensor& q,
                           const Tensor& k, const Tensor& v);

// Registers the tensors that params point to beside q, k and v.
void add_inputs(const class OpMemory& memory, const AttentionInputs& inputs);

// Appends the arguments of the reference ops from cu_seqlens_q to split_boundaries.
void push_inputs(std::vector<StableIValue>* stack, const AttentionInputs& inputs);

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
