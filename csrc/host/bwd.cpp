// Op bodies of the backward.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "host/check.h"
#include "host/emulator.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q,
                                                       Tensor k, Tensor v, Tensor out, Tensor lse, FX_INPUT_PARAMETERS,
                                                       bool deterministic, int64_t wanted,
                                                       std::optional<std::string> backend) {
  const AttentionInputs inputs{q, k, v, FX_INPUT_NAMES};
  const FwdProblem problem = problem_from_inputs(inputs, std::nullopt);
  const FwdPlan plan = plan_bwd(problem, device_info_of(q));

  const std::string reason = backend == "reference" ? "" : plan.rejections_as_text();
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(dout), from(dlse), from(q), from(k), from(v), from(out), from(lse)};
  push_inputs(&stack, inputs);
  for (const StableIValue value : {from(deterministic), from(wanted), from(reason)}) stack.push_back(value);
  call_op("flash_ext::reference_bwd", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

std::tuple<Tensor, Tensor> bwd_preprocess(Tensor out, Tensor dout, Tensor lse, std::optional<Tensor> dlse) {
  FX_CHECK(out.dim() == 4 && dout.dim() == 4, "bwd_preprocess: out and dout must have 4 dimensions, got ", out.dim(),
           " and ", dout.dim());
  for (int dim = 0; dim < 4; ++dim) {
    FX_CHECK(out.size(dim) == dout.size(dim), "bwd_preprocess: dout.shape must equal out.shape, got ", dout.size(dim),
             " and ", out.size(dim), " in dimension ", dim);
  }
  FX_CHECK(out.scalar_type() == dout.scalar_type(), "bwd_preprocess: out and dout must have one dtype");
  const int64_t batch = out.size(0), seqlen_q = out.size(1), num_heads = out.size(2), head_dim_v = out.size(3);
  FX_CHECK(head_dim_v % 8 == 0, "bwd_preprocess: head_dim_v must be a multiple of 8, got ", head_dim_v);
  FX_CHECK(out.stride(3) == 1 && dout.stride(3) == 1, "bwd_preprocess: the last dimension must be contiguous");
  const auto check_statistics = [&](const Tensor& statistics, const char* name) {
    FX_CHECK(statistics.dim() == 3 && statistics.size(0) == batch && statistics.size(1) == num_heads &&
                 statistics.size(2) == seqlen_q && statistics.scalar_type() == torch::headeronly::ScalarType::Float,
             "bwd_preprocess: ", name, " must be float32 of shape (", batch, ", ", num_heads, ", ", seqlen_q, ")");
  };
  check_statistics(lse, "lse");
  FX_CHECK(lse.is_contiguous(), "bwd_preprocess: lse must be contiguous");
  if (dlse) check_statistics(*dlse, "dlse");

  const Variant* variant = plan_bwd_preprocess(scalar_type_of(out), head_dim_v, device_info_of(out));
  FX_CHECK(variant != nullptr, "bwd_preprocess: this build has no kernel for ", dtype_name(scalar_type_of(out)),
           " and head_dim_v ", head_dim_v, " on this GPU");

  const int64_t seqlen_q_rounded = (seqlen_q + kStatsRowAlignment - 1) / kStatsRowAlignment * kStatsRowAlignment;
  Tensor delta = new_float32(out, {batch, num_heads, seqlen_q_rounded});
  Tensor lse_log2 = new_float32(out, {batch, num_heads, seqlen_q_rounded});
  if (delta.numel() == 0) return {delta, lse_log2};
  FX_CHECK(delta.numel() / variant->block_m <= std::numeric_limits<int32_t>::max(),
           "bwd_preprocess: batch * num_heads * seqlen_q is too large for one grid, got ", delta.numel(), " rows");

  const Tensor out_rows = with_aligned_rows(out);
  const Tensor dout_rows = with_aligned_rows(dout);
  OpMemory memory;
  memory.add(out_rows, MemoryRole::kIn, "out");
  memory.add(dout_rows, MemoryRole::kIn, "dout");
  memory.add(lse, MemoryRole::kIn, "lse");
  if (dlse) memory.add(*dlse, MemoryRole::kIn, "dlse");
  memory.add(delta, MemoryRole::kOut, "delta");
  memory.add(lse_log2, MemoryRole::kOut, "lse_log2");

  const BwdPreprocessParams params{
      .out = out_rows.data_ptr(),
      .dout = dout_rows.data_ptr(),
      .lse = static_cast<const float*>(lse.data_ptr()),
      .dlse = dlse ? static_cast<const float*>(dlse->data_ptr()) : nullptr,
      .delta = static_cast<float*>(delta.data_ptr()),
      .lse_log2 = static_cast<float*>(lse_log2.data_ptr()),
      .out_strides = row_strides_of(out_rows),
      .dout_strides = row_strides_of(dout_rows),
      .dlse_strides = dlse ? RowStrides{.batch = dlse->stride(0), .row = dlse->stride(2), .head = dlse->stride(1)}
                           : RowStrides{},
      .batch = static_cast<int>(batch),
      .num_heads = static_cast<int>(num_heads),
      .seqlen_q = static_cast<int>(seqlen_q),
      .seqlen_q_rounded = static_cast<int>(seqlen_q_rounded),
      .head_dim_v = static_cast<int>(head_dim_v)};
  const LaunchScope scope(out);
  FX_CUDA_CHECK(find_bwd_preprocess(variant->name)(params, scope.stream()), variant->name);
  return {delta, lse_log2};
}

}  // namespace flash_ext
