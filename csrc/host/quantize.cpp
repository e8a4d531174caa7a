// Op body of quantize_fp8: the kernel where there is one, else the definition in torch ops.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>
#include <vector>

#include "common/quantize_params.h"
#include "host/check.h"
#include "host/emulator.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

using TorchType = torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> reference_quantize_fp8(const Tensor& x, const std::string& scale, bool hadamard,
                                                  const std::optional<Tensor>& cu_seqlens) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(x), from(scale), from(hadamard), from(cu_seqlens)};
  call_op("flash_ext::reference_quantize_fp8", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

ScaleOf scale_of(const std::string& name) {
  if (name == "block") return ScaleOf::kBlock;
  if (name == "head") return ScaleOf::kHead;
  FX_CHECK(name == "tensor", "quantize_fp8: scale must be block, head or tensor, got ", name);
  return ScaleOf::kTensor;
}

// As a 4-dimensional tensor: a packed one is one batch entry.
Tensor with_batch(const Tensor& x) { return x.dim() == 3 ? torch::stable::unsqueeze(x, 0) : x; }

}  // namespace

std::tuple<Tensor, Tensor> quantize_fp8(Tensor x, std::string scale_name, bool hadamard, std::optional<Tensor> cu_seqlens) {
  const bool packed = x.dim() == 3;
  FX_CHECK(packed || x.dim() == 4, "quantize_fp8: x must have 3 or 4 dimensions, got ", x.dim());
  FX_CHECK(packed || !cu_seqlens, "quantize_fp8: cu_seqlens belongs to a packed x");
  const ScaleOf scale = scale_of(scale_name);
  FX_CHECK(!packed || cu_seqlens || scale == ScaleOf::kTensor, "quantize_fp8: cu_seqlens must be given for a packed x");
  const int64_t head_dim = x.size(x.dim() - 1);
  const Variant* variant = nullptr;
  if (x.scalar_type() == TorchType::BFloat16 || x.scalar_type() == TorchType::Half) {
    variant = plan_quantize_fp8(scalar_type_of(x), head_dim, device_info_of(x));
  }
  if (variant == nullptr || x.stride(x.dim() - 1) != 1) return reference_quantize_fp8(x, scale_name, hadamard, cu_seqlens);

  const Tensor rows = with_aligned_rows(with_batch(x));
  const int64_t batch = rows.size(0), seqlen = rows.size(1), num_heads = rows.size(2);
  const bool by_sequence = packed && scale != ScaleOf::kTensor;
  if (by_sequence) {
    FX_CHECK(cu_seqlens->scalar_type() == TorchType::Int && cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 &&
                 cu_seqlens->is_contiguous(),
             "quantize_fp8: cu_seqlens must be int32 of shape (batch + 1)");
    FX_CHECK(cu_seqlens->is_cuda() == x.is_cuda() && cu_seqlens->get_device_index() == x.get_device_index(),
             "quantize_fp8: cu_seqlens must be on x's device");
  }
  const int64_t num_sequences = by_sequence ? cu_seqlens->numel() - 1 : batch;
  const int64_t num_slots = by_sequence ? seqlen / kScaleRows + num_sequences : (seqlen + kScaleRows - 1) / kScaleRows;
  FX_CHECK(num_slots * num_heads * batch < INT_MAX && seqlen < INT_MAX, "quantize_fp8: x has too many rows");

  std::vector<int64_t> scales;
  if (scale == ScaleOf::kHead) scales = {num_sequences, num_heads};
  if (scale == ScaleOf::kBlock) scales = {batch, num_heads, num_slots};
  const auto new_scales = [&](TorchType dtype, bool zero) {
    Tensor tensor = torch::stable::new_empty(x, scales, dtype);
    return zero ? torch::stable::zero_(tensor) : torch::stable::fill_(tensor, double(kSmallestAmax / kE4m3Max));
  };
  Tensor descale = new_scales(TorchType::Float, false);
  // Rows that no sequence owns stay 0.
  Tensor out = by_sequence ? torch::stable::new_zeros(x, x.sizes(), TorchType::Float8_e4m3fn)
                           : torch::stable::new_empty(x, x.sizes(), TorchType::Float8_e4m3fn);
  if (x.numel() == 0 || num_sequences == 0) return {out, descale};
  Tensor amax = new_scales(TorchType::Int, true);

  OpMemory memory;
  memory.add(rows, MemoryRole::kIn, "x");
  if (by_sequence) memory.add(*cu_seqlens, MemoryRole::kIn, "cu_seqlens");
  memory.add(out, MemoryRole::kInOut, "x8");
  memory.add(descale, MemoryRole::kInOut, "descale");
  memory.add(amax, MemoryRole::kInOut, "amax");

  QuantizeFp8Params params{};
  params.x = rows.data_ptr();
  params.out = out.data_ptr();
  params.descale = static_cast<float*>(descale.data_ptr());
  params.amax = static_cast<int*>(amax.data_ptr());
  params.x_strides = row_strides_of(rows);
  params.seqlens.cu_seqlens = by_sequence ? static_cast<const int*>(cu_seqlens->data_ptr()) : nullptr;
  params.seqlens.num_rows = static_cast<int>(seqlen);
  params.batch = static_cast<int>(batch);
  params.num_sequences = static_cast<int>(num_sequences);
  params.num_heads = static_cast<int>(num_heads);
  params.head_dim = static_cast<int>(head_dim);
  params.num_slots = static_cast<int>(num_slots);
  params.scale = scale;
  params.rotates = hadamard;
  params.hadamard = make_hadamard(static_cast<int>(head_dim));
  const LaunchScope scope(x);
  FX_CUDA_CHECK(find_quantize_fp8(variant->name)(params, scope.stream()), variant->name);
  return {out, descale};
}

}  // namespace flash_ext
