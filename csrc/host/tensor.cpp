#include "host/tensor.h"

#include <algorithm>

#include "host/check.h"
#include "host/emulator.h"

// Defined by libtorch_cuda; absent from a CPU-only torch, where no call reaches it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

// torch >= 2.13: the message of the exception that the last failed call of the C interface swallowed.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace flash_ext {

TensorLayout layout_of(const Tensor& tensor) {
  TensorLayout layout;
  const int packed = tensor.dim() == 3;
  for (int dim = 0; dim < 4; ++dim) {
    layout.sizes[dim] = dim < packed ? 1 : tensor.size(dim - packed);
    layout.strides[dim] = dim < packed ? 0 : tensor.stride(dim - packed);
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
    case TorchType::Float8_e4m3fn: return ScalarType::kFloat8E4m3;
    default: fail("attention: q.dtype must be bfloat16, float16, float32 or float64");
  }
}

RowStrides row_strides_of(const Tensor& tensor) {
  const int dim = static_cast<int>(tensor.dim()) - 3;
  return {.batch = dim > 0 ? tensor.stride(dim - 1) : 0, .row = tensor.stride(dim), .head = tensor.stride(dim + 1)};
}

namespace {

using TorchType = torch::headeronly::ScalarType;

// An optional tensor of a known shape and dtype on q's device, its last dimension contiguous.
void check_tensor(const std::optional<Tensor>& tensor, const Tensor& q, const char* name, TorchType dtype,
                  const std::vector<int64_t>& shape) {
  if (!tensor) return;
  FX_CHECK(tensor->get_device_index() == q.get_device_index() && tensor->is_cuda() == q.is_cuda(), "attention: ", name,
           " must be on q's device");
  FX_CHECK(tensor->scalar_type() == dtype, "attention: ", name, " must be ", dtype == TorchType::Int ? "int32" : "float32");
  bool same = tensor->dim() == static_cast<int64_t>(shape.size());
  for (size_t dim = 0; same && dim < shape.size(); ++dim) same = tensor->size(dim) == shape[dim];
  FX_CHECK(same && (shape.back() <= 1 || tensor->stride(tensor->dim() - 1) == 1), "attention: ", name,
           " has a wrong shape or a last dimension that is not contiguous");
}

const int* int_pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int*>(tensor->data_ptr()) : nullptr;
}
const float* float_pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

}  // namespace

FwdProblem problem_from_inputs(const AttentionInputs& inputs, const std::optional<std::string>& backend) {
  const Tensor &q = inputs.q, &k = inputs.k, &v = inputs.v;
  const bool packed = inputs.cu_seqlens_q.has_value();
  FX_CHECK(inputs.cu_seqlens_k.has_value() == packed, "attention: cu_seqlens_q and cu_seqlens_k come together");
  const int dims = packed ? 3 : 4;
  for (const Tensor* tensor : {&q, &k, &v}) {
    FX_CHECK(tensor->dim() == dims, "attention: q, k and v must have ", dims, " dimensions, got ", tensor->dim());
    FX_CHECK(tensor->get_device_index() == q.get_device_index() && tensor->is_cuda() == q.is_cuda(),
             "attention: q, k and v must be on one device");
    FX_CHECK(tensor->scalar_type() == q.scalar_type(), "attention: q, k and v must have one dtype");
    FX_CHECK(tensor->stride(dims - 1) == 1 || tensor->size(dims - 1) <= 1, "attention: the last dimension must be contiguous");
  }
  FwdProblem problem{.dtype = scalar_type_of(q),
                     .q = layout_of(q),
                     .k = layout_of(k),
                     .v = layout_of(v),
                     .num_sequences = packed ? inputs.cu_seqlens_q->numel() - 1 : -1,
                     .num_parts = std::max<int64_t>(0, int64_t(inputs.split_boundaries.size()) - 1),
                     .causal = inputs.causal,
                     .window_left = inputs.window_left,
                     .window_right = inputs.causal ? 0 : inputs.window_right,
                     .softmax_scale = inputs.softmax_scale,
                     .softcap = inputs.softcap,
                     .sinks = inputs.sinks.has_value(),
                     .alibi = inputs.alibi_slopes.has_value(),
                     .k_bias = inputs.k_bias.has_value(),
                     .leftpad = inputs.leftpad_q.has_value() || inputs.leftpad_k.has_value(),
                     .backend = backend.value_or("")};
  const auto check_equal = [](int64_t a, int64_t b, const char* what) {
    FX_CHECK(a == b, "attention: ", what, ", got ", a, " and ", b);
  };
  check_equal(problem.k.sizes[0], problem.q.sizes[0], "k.batch must equal q.batch");
  check_equal(problem.v.sizes[0], problem.q.sizes[0], "v.batch must equal q.batch");
  check_equal(problem.v.sizes[1], problem.k.sizes[1], "v.seqlen must equal k.seqlen");
  check_equal(problem.v.sizes[2], problem.k.sizes[2], "v.num_heads must equal k.num_heads");
  check_equal(problem.k.sizes[3], problem.q.sizes[3], "k.head_dim must equal q.head_dim");
  const int64_t heads = problem.num_heads(), heads_kv = problem.num_heads_kv(), batch = problem.batch();
  FX_CHECK(heads_kv > 0 ? heads % heads_kv == 0 : heads == 0,
           "attention: q.num_heads must be a multiple of k.num_heads, got ", heads, " and ", heads_kv);

  FX_CHECK(batch >= 0, "attention: cu_seqlens_q must have at least one element");
  for (const auto& [tensor, name] : {std::pair(&inputs.cu_seqlens_q, "cu_seqlens_q"), {&inputs.cu_seqlens_k, "cu_seqlens_k"}}) {
    check_tensor(*tensor, q, name, TorchType::Int, {batch + 1});
  }
  for (const auto& [tensor, name] : {std::pair(&inputs.seqused_q, "seqused_q"), {&inputs.seqused_k, "seqused_k"},
                                     {&inputs.leftpad_q, "leftpad_q"}, {&inputs.leftpad_k, "leftpad_k"}}) {
    check_tensor(*tensor, q, name, TorchType::Int, {batch});
  }
  check_tensor(inputs.sinks, q, "sinks", TorchType::Float, {heads});
  const bool slopes_of_batch = inputs.alibi_slopes && inputs.alibi_slopes->dim() == 2;
  check_tensor(inputs.alibi_slopes, q, "alibi_slopes", TorchType::Float,
               slopes_of_batch ? std::vector{batch, heads} : std::vector{heads});
  check_tensor(inputs.k_bias, q, "k_bias", TorchType::Float,
               packed ? std::vector{heads_kv, problem.seqlen_k()} : std::vector{batch, heads_kv, problem.seqlen_k()});
  const std::vector<int64_t>& boundaries = inputs.split_boundaries;
  FX_CHECK(boundaries.empty() || (boundaries.size() >= 2 && boundaries.size() <= kMaxSplits + 1 && !packed),
           "attention: split_boundaries are 2 to ", kMaxSplits + 1, " numbers of a call that is not packed");
  for (size_t i = 0; i < boundaries.size(); ++i) {
    FX_CHECK(boundaries[i] >= (i > 0 ? boundaries[i - 1] : 0) && boundaries[i] <= problem.seqlen_k(),
             "attention: split_boundaries must ascend from 0 to k.seqlen");
  }
  return problem;
}

void fill_attention_params(AttentionParams* params, const AttentionInputs& inputs, const FwdProblem& problem, const Tensor& q,
                           const Tensor& k, const Tensor& v) {
  params->q = q.data_ptr();
  params->k = k.data_ptr();
  params->v = v.data_ptr();
  params->q_strides = row_strides_of(q);
  params->k_strides = row_strides_of(k);
  params->v_strides = row_strides_of(v);
  params->batch = static_cast<int>(problem.batch());
  params->num_heads = static_cast<int>(problem.num_heads());
  params->num_heads_kv = static_cast<int>(problem.num_heads_kv());
  params->head_dim = static_cast<int>(problem.head_dim());
  params->head_dim_v = static_cast<int>(problem.head_dim_v());
  params->seqlens_q = {.cu_seqlens = int_pointer(inputs.cu_seqlens_q),
                       .seqused = int_pointer(inputs.seqused_q),
                       .leftpad = int_pointer(inputs.leftpad_q),
                       .num_rows = static_cast<int>(problem.seqlen_q())};
  params->seqlens_k = {.cu_seqlens = int_pointer(inputs.cu_seqlens_k),
                       .seqused = int_pointer(inputs.seqused_k),
                       .leftpad = int_pointer(inputs.leftpad_k),
                       .num_rows = static_cast<int>(problem.seqlen_k())};
  const auto window = [](int64_t side) { return static_cast<int>(std::min<int64_t>(side, kMaxWindow)); };
  params->mask = {.window_left = window(problem.window_left),
                  .window_right = window(problem.window_right),
                  .keys_of = reinterpret_cast<const Interval*>(int_pointer(inputs.keys_of)),
                  .queries_of = reinterpret_cast<const Interval*>(int_pointer(inputs.queries_of))};
  const std::optional<Tensor>&slopes = inputs.alibi_slopes, &bias = inputs.k_bias;
  params->score = with_factors({
                   .softmax_scale = static_cast<float>(problem.softmax_scale),
                   .softcap = static_cast<float>(problem.softcap),
                   .alibi_slopes = float_pointer(slopes),
                   .alibi_batch_stride = slopes && slopes->dim() == 2 ? slopes->stride(0) : 0,
                   .k_bias = float_pointer(bias),
                   .k_bias_batch_stride = bias && bias->dim() == 3 ? bias->stride(0) : 0,
                   .k_bias_head_stride = bias ? bias->stride(bias->dim() - 2) : 0});
  params->sinks = float_pointer(inputs.sinks);
}

void add_inputs(const OpMemory& memory, const AttentionInputs& inputs) {
  const std::pair<const std::optional<Tensor>&, const char*> all[] = {
      {inputs.cu_seqlens_q, "cu_seqlens_q"}, {inputs.cu_seqlens_k, "cu_seqlens_k"}, {inputs.seqused_q, "seqused_q"},
      {inputs.seqused_k, "seqused_k"},       {inputs.leftpad_q, "leftpad_q"},       {inputs.leftpad_k, "leftpad_k"},
      {inputs.sinks, "sinks"},               {inputs.alibi_slopes, "alibi_slopes"}, {inputs.k_bias, "k_bias"},
      {inputs.keys_of, "keys_of"},           {inputs.queries_of, "queries_of"}};
  for (const auto& [tensor, name] : all) {
    if (tensor) memory.add(*tensor, MemoryRole::kIn, name);
  }
}

void push_inputs(std::vector<StableIValue>* stack, const AttentionInputs& inputs) {
  using torch::stable::detail::from;
  for (const auto* tensor : {&inputs.cu_seqlens_q, &inputs.cu_seqlens_k, &inputs.seqused_q, &inputs.seqused_k,
                             &inputs.leftpad_q, &inputs.leftpad_k, &inputs.sinks, &inputs.alibi_slopes, &inputs.k_bias}) {
    stack->push_back(from(*tensor));
  }
  for (const StableIValue value : {from(inputs.softmax_scale), from(inputs.causal), from(inputs.window_left),
                                   from(inputs.window_right), from(inputs.softcap), from(inputs.split_boundaries)}) {
    stack->push_back(value);
  }
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
