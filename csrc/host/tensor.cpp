#include "host/tensor.h"

#include <algorithm>

#include "host/check.h"

// Defined by libtorch_cuda; absent from a CPU-only torch, where no call reaches it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

// torch >= 2.13: the message of the exception that the last failed call of the C interface swallowed.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace flash_ext {

TensorLayout layout_of(const Tensor& tensor) {
  TensorLayout layout;
  for (int dim = 0; dim < 4; ++dim) {
    layout.sizes[dim] = tensor.size(dim);
    layout.strides[dim] = tensor.stride(dim);
  }
  layout.base_aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  return layout;
}

ScalarType scalar_type_of(const Tensor& tensor) {
  using TorchType = torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case TorchType::Half: return ScalarType::kFloat16;
    case TorchType::BFloat16: return ScalarType::kBFloat16;
    case TorchType::Float: return ScalarType::kFloat32;
    case TorchType::Double: return ScalarType::kFloat64;
    default: fail("attention: q.dtype must be bfloat16, float16, float32 or float64");
  }
}

RowStrides row_strides_of(const Tensor& tensor) {
  return {.batch = tensor.stride(0), .row = tensor.stride(1), .head = tensor.stride(2)};
}

FwdProblem fwd_problem_from_tensors(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal,
                                    int64_t window_left, int64_t window_right, double softcap,
                                    const std::optional<std::string>& backend) {
  for (const Tensor* tensor : {&q, &k, &v}) {
    FX_CHECK(tensor->dim() == 4, "attention: q, k and v must have 4 dimensions, got ", tensor->dim());
    FX_CHECK(tensor->get_device_index() == q.get_device_index() && tensor->is_cuda() == q.is_cuda(),
             "attention: q, k and v must be on one device");
    FX_CHECK(tensor->scalar_type() == q.scalar_type(), "attention: q, k and v must have one dtype");
    FX_CHECK(tensor->stride(3) == 1 || tensor->size(3) <= 1, "attention: the last dimension must be contiguous");
  }
  FwdProblem problem{.dtype = scalar_type_of(q),
                     .q = layout_of(q),
                     .k = layout_of(k),
                     .v = layout_of(v),
                     .causal = causal,
                     .window_left = window_left,
                     .window_right = causal ? 0 : window_right,
                     .softmax_scale = softmax_scale,
                     .softcap = softcap,
                     .backend = backend.value_or("")};
  const auto check_equal = [](int64_t a, int64_t b, const char* what) {
    FX_CHECK(a == b, "attention: ", what, ", got ", a, " and ", b);
  };
  check_equal(problem.k.sizes[0], problem.q.sizes[0], "k.batch must equal q.batch");
  check_equal(problem.v.sizes[0], problem.q.sizes[0], "v.batch must equal q.batch");
  check_equal(problem.v.sizes[1], problem.k.sizes[1], "v.seqlen must equal k.seqlen");
  check_equal(problem.v.sizes[2], problem.k.sizes[2], "v.num_heads must equal k.num_heads");
  check_equal(problem.k.sizes[3], problem.q.sizes[3], "k.head_dim must equal q.head_dim");
  FX_CHECK(problem.num_heads_kv() > 0 ? problem.num_heads() % problem.num_heads_kv() == 0 : problem.num_heads() == 0,
           "attention: q.num_heads must be a multiple of k.num_heads, got ", problem.num_heads(), " and ",
           problem.num_heads_kv());
  return problem;
}

Tensor with_aligned_rows(const Tensor& tensor) {
  if (why_copied(layout_of(tensor), scalar_type_of(tensor)) == nullptr) return tensor;
  // contiguous() would return the same misaligned memory for a contiguous tensor with an odd offset: copy explicitly.
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor new_float32(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes),
                                  torch::headeronly::ScalarType::Float);
}

void call_op(const char* name, StableIValue* stack) {
  if (torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) return;
  fail(name, ": ",
       torch_exception_get_what_without_backtrace != nullptr ? torch_exception_get_what_without_backtrace()
                                                             : "failed; torch has printed why");
}

LaunchScope::LaunchScope(const Tensor& tensor) {
  if (!tensor.is_cuda()) return;  // emulated: CPU tensors, the default stream
  guard_.emplace(tensor.get_device_index());
  void* stream = nullptr;
  FX_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "flash_ext: this torch was built without CUDA");
  FX_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
           "flash_ext: torch has no current CUDA stream for device ", tensor.get_device_index());
  stream_ = static_cast<cudaStream_t>(stream);
}

const DeviceInfo& device_info_of(const Tensor& tensor) {
  return device_info_of_cuda_device(tensor.is_cuda() ? tensor.get_device_index() : 0);
}

}  // namespace flash_ext
