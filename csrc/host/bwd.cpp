// Op bodies of the backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dq_blocks.cuh"
#include "host/check.h"
#include "host/emulator.h"
#include "host/launch_bwd.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

Gradients reference_bwd(const std::optional<Tensor>& dout, const std::optional<Tensor>& dlse, const AttentionInputs& inputs,
                        const Tensor& out, const Tensor& lse, bool deterministic, int64_t wanted, const std::string& reason) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(dout),     from(dlse), from(inputs.q), from(inputs.k),
                                  from(inputs.v), from(out),  from(lse)};
  push_inputs(&stack, inputs);
  for (const StableIValue value : {from(deterministic), from(wanted), from(reason)}) stack.push_back(value);
  call_op("flash_ext::reference_bwd", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

// Zero before the launches, on their stream.
void clear(const Tensor& tensor, cudaStream_t stream) {
  if (tensor.numel() == 0) return;
  FX_CUDA_CHECK(cudaMemsetAsync(tensor.data_ptr(), 0, static_cast<size_t>(tensor.numel()) * tensor.element_size(), stream),
                "cudaMemsetAsync");
}

// As with_aligned_rows, for gradients: autograd hands in expanded ones, columns too.
Tensor with_readable_rows(const Tensor& tensor) {
  if (tensor.stride(tensor.dim() - 1) == 1) return with_aligned_rows(tensor);
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Of lse and its like: (batch, num_heads, seqlen_q) or (num_heads, total_q).
RowStrides statistics_strides(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  return {.batch = dims == 3 ? tensor.stride(0) : 0, .row = tensor.stride(dims - 1), .head = tensor.stride(dims - 2)};
}

// Row statistics of one part of the keys. out, dout and lse belong to that part.
void launch_preprocess(const Tensor& out, const Tensor& dout, const Tensor& lse, const std::optional<Tensor>& dlse,
                       const Tensor& delta, const Tensor& lse_log2, const SeqlenParams& seqlens_q, int batch,
                       cudaStream_t stream) {
  if (delta.numel() == 0) return;
  const int64_t num_heads = out.size(out.dim() - 2), head_dim_v = out.size(out.dim() - 1);
  const Variant* variant = plan_bwd_preprocess(scalar_type_of(out), head_dim_v, device_info_of(out));
  FX_CHECK(variant != nullptr, "bwd_preprocess: this build has no kernel for ", dtype_name(scalar_type_of(out)),
           " and head_dim_v ", head_dim_v, " on this GPU");
  FX_CHECK(delta.numel() / variant->block_m <= std::numeric_limits<int32_t>::max(),
           "bwd_preprocess: batch * num_heads * seqlen_q is too large for one grid, got ", delta.numel(), " rows");
  BwdPreprocessParams params{};
  params.out = out.data_ptr();
  params.dout = dout.data_ptr();
  params.lse = floats(lse);
  params.dlse = dlse ? floats(*dlse) : nullptr;
  params.delta = floats(delta);
  params.lse_log2 = floats(lse_log2);
  params.out_strides = row_strides_of(out);
  params.dout_strides = row_strides_of(dout);
  params.lse_strides = statistics_strides(lse);
  params.dlse_strides = dlse ? statistics_strides(*dlse) : RowStrides{};
  params.seqlens_q = seqlens_q;
  params.batch = batch;
  params.num_heads = static_cast<int>(num_heads);
  params.stats_rows = static_cast<int>(delta.size(delta.dim() - 1));
  params.head_dim_v = static_cast<int>(head_dim_v);
  FX_CUDA_CHECK(find_bwd_preprocess(variant->name)(params, stream), variant->name);
}

// Rows of gradients that no sequence shows become zero.
void fill_unused_rows(const SeqlenParams& seqlens, int batch, std::initializer_list<std::pair<const Tensor*, int>> gradients,
                      const DeviceInfo& device, cudaStream_t stream) {
  if (seqlens.cu_seqlens == nullptr && seqlens.seqused == nullptr && seqlens.leftpad == nullptr) return;
  const Variant* variant = plan_fill_unused(device);
  FX_CHECK(variant != nullptr, "attention: this build has no fill_unused kernel for this GPU");
  FillUnusedParams fill{};
  fill.seqlens = seqlens;
  fill.batch = batch;
  for (const auto& [tensor, elements_per_word] : gradients) {
    if (tensor->numel() == 0) continue;
    FillUnusedParams::Target& target = fill.targets[fill.num_targets++];
    target.data = static_cast<uint32_t*>(tensor->data_ptr());
    if (elements_per_word == 1) {  // a number a row
      target.strides = statistics_strides(*tensor);
      target.heads = static_cast<int>(tensor->size(tensor->dim() - 2));
      target.words = 1;
    } else {
      const RowStrides strides = row_strides_of(*tensor);
      target.strides = {strides.batch / 2, strides.row / 2, strides.head / 2};
      target.heads = static_cast<int>(tensor->size(tensor->dim() - 2));
      target.words = static_cast<int>(tensor->size(tensor->dim() - 1)) / 2;
    }
  }
  if (fill.num_targets > 0) FX_CUDA_CHECK(find_fill_unused(variant->name)(fill, stream), variant->name);
}

}  // namespace

Gradients launch_bwd(const std::optional<Tensor>& dout, const std::optional<Tensor>& dlse, const AttentionInputs& inputs,
                     const Tensor& out, const Tensor& lse, const FwdProblem& problem, const FwdPlan& plan,
                     const DeviceInfo& device, const BlockListParams& blocks, OpMemory& memory) {
  const Tensor &q = inputs.q, &k = inputs.k, &v = inputs.v;
  const std::optional<Tensor>&sinks = inputs.sinks, &k_bias = inputs.k_bias;
  const bool deterministic = problem.deterministic;
  const int64_t wanted = problem.wanted;
  const bool wants_dq = wanted & kWantDq, wants_dsinks = sinks && wanted & kWantDsinks;
  const bool wants_dk_bias = k_bias && wanted & kWantDkBias;
  const auto gradient_of = [&](const Tensor& tensor, bool is_wanted) {
    const int64_t none[] = {0};
    return is_wanted ? torch::stable::new_empty(tensor, tensor.sizes()) : torch::stable::new_empty(tensor, none);
  };
  Tensor dq = gradient_of(q, wants_dq), dk = gradient_of(k, wanted & kWantDk), dv = gradient_of(v, wanted & kWantDv);
  Tensor dsinks = gradient_of(sinks ? *sinks : lse, wants_dsinks), dk_bias = gradient_of(k_bias ? *k_bias : lse, wants_dk_bias);
  const bool wants_main = dq.numel() + dk.numel() + dv.numel() + dk_bias.numel() > 0;
  if (!wants_main && !wants_dsinks) return {dq, dk, dv, dsinks, dk_bias};

  const LaunchScope scope(q);
  const cudaStream_t stream = scope.stream();
  const Tensor q_rows = with_aligned_rows(q), k_rows = with_aligned_rows(k), v_rows = with_aligned_rows(v);
  const int64_t entries = problem.packed() ? 1 : problem.batch();
  const int64_t stats_rows = bwd_stats_rows(problem);
  const Tensor delta = new_float32(q, {entries, problem.num_heads(), stats_rows});
  const Tensor lse_log2 = new_float32(q, {entries, problem.num_heads(), stats_rows});
  const int64_t column_blocks = num_slabs(plan.variant->head_dim);
  const int64_t num_dq_blocks = dq.numel() > 0 ? entries * problem.num_heads() * (stats_rows / kDqBlockRows) * column_blocks : 0;
  const Tensor dq_blocks = new_float32(q, {num_dq_blocks, kDqBlockFloats});
  const Tensor dq_turns = new_float32(q, {deterministic ? num_dq_blocks : 0});  // of ints
  FX_CHECK(num_dq_blocks <= std::numeric_limits<int32_t>::max(),
           "attention: batch * num_heads * seqlen_q is too large for one grid of the backward");

  // Of each part of the keys.
  struct Part {
    Tensor out, dout, lse;
    std::optional<Tensor> dlse;
  };
  std::vector<Part> parts;
  memory.add(q_rows, MemoryRole::kIn, "q");
  memory.add(k_rows, MemoryRole::kIn, "k");
  memory.add(v_rows, MemoryRole::kIn, "v");
  add_inputs(memory, inputs);
  memory.add(delta, MemoryRole::kWorkspace, "delta");
  memory.add(lse_log2, MemoryRole::kWorkspace, "lse_log2");
  memory.add(dq_blocks, MemoryRole::kWorkspace, "dq_blocks");
  memory.add(dq_turns, MemoryRole::kWorkspace, "dq_turns");
  memory.add(dq, MemoryRole::kOut, "dq");
  memory.add(dk, MemoryRole::kOut, "dk");
  memory.add(dv, MemoryRole::kOut, "dv");
  memory.add(dsinks, MemoryRole::kOut, "dsinks");
  memory.add(dk_bias, MemoryRole::kOut, "dk_bias");
  for (int64_t i = 0; i < std::max<int64_t>(1, problem.num_parts); ++i) {
    const auto of_part = [&](const Tensor& tensor) {
      return problem.num_parts > 0 ? torch::stable::select(tensor, 0, i) : tensor;
    };
    Part part{with_aligned_rows(of_part(out)), of_part(out), of_part(lse), std::nullopt};
    part.dout = dout ? with_readable_rows(of_part(*dout)) : torch::stable::new_empty(part.out, part.out.sizes());
    if (dlse) part.dlse = of_part(*dlse);
    memory.add(part.out, MemoryRole::kIn, "out");
    memory.add(part.dout, dout ? MemoryRole::kIn : MemoryRole::kWorkspace, "dout");
    memory.add(part.lse, MemoryRole::kIn, "lse");
    if (part.dlse) memory.add(*part.dlse, MemoryRole::kIn, "dlse");
    if (!dout) clear(part.dout, stream);
    parts.push_back(part);
  }
  clear(dq_blocks, stream);
  if (problem.num_parts > 0) {  // keys that no part has
    clear(dk, stream);
    clear(dv, stream);
    clear(dk_bias, stream);
  }

  BwdParams params{};
  fill_attention_params(&params, inputs, problem, q_rows, k_rows, v_rows);
  params.lse_log2 = floats(lse_log2);
  params.delta = floats(delta);
  params.dq_blocks = dq_blocks.numel() > 0 ? floats(dq_blocks) : nullptr;
  params.dq_turns = dq_turns.numel() > 0 ? static_cast<int*>(dq_turns.data_ptr()) : nullptr;
  if (dk.numel() > 0) params.dk = dk.data_ptr(), params.dk_strides = row_strides_of(dk);
  if (dv.numel() > 0) params.dv = dv.data_ptr(), params.dv_strides = row_strides_of(dv);
  if (dk_bias.numel() > 0) params.dk_bias = floats(dk_bias), params.dk_bias_strides = statistics_strides(dk_bias);
  params.key_end = params.seqlens_k.num_rows;
  params.stats_rows = static_cast<int>(stats_rows);
  params.num_ctas = static_cast<int>(plan.grid[0]);
  params.blocks = blocks;

  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    params.dout = part.dout.data_ptr();
    params.dout_strides = row_strides_of(part.dout);
    if (problem.num_parts > 0) {
      params.key_begin = static_cast<int>(inputs.split_boundaries[i]);
      params.key_end = static_cast<int>(inputs.split_boundaries[i + 1]);
    }
    clear(dq_turns, stream);
    launch_preprocess(part.out, part.dout, part.lse, part.dlse, delta, lse_log2, params.seqlens_q, params.batch, stream);
    if (wants_main) FX_CUDA_CHECK(find_bwd(plan.variant->name)(params, stream), plan.variant->name);
  }
  fill_unused_rows(params.seqlens_q, params.batch, {{&dq, 2}}, device, stream);
  fill_unused_rows(params.seqlens_k, params.batch, {{&dk, 2}, {&dv, 2}, {&dk_bias, 1}}, device, stream);
  if (dq.numel() > 0) {
    BwdPostprocessParams rows{};
    rows.dq_blocks = params.dq_blocks;
    rows.dq = dq.data_ptr();
    rows.dq_strides = row_strides_of(dq);
    rows.seqlens_q = params.seqlens_q;
    rows.softmax_scale = params.score.softmax_scale;
    rows.batch = params.batch;
    rows.num_heads = params.num_heads;
    rows.head_dim = params.head_dim;
    rows.column_blocks = static_cast<int>(column_blocks);
    rows.stats_rows = params.stats_rows;
    const Variant* variant = plan_bwd_postprocess(problem.dtype, plan.variant->arch);
    FX_CHECK(variant != nullptr, "attention: this build has no bwd_postprocess kernel for ", dtype_name(problem.dtype));
    FX_CUDA_CHECK(find_bwd_postprocess(variant->name)(rows, stream), variant->name);
  }
  if (wants_dsinks && dsinks.numel() > 0) {
    BwdSinksParams statistics{};
    statistics.lse_log2 = params.lse_log2;
    statistics.delta = params.delta;
    statistics.sinks = params.sinks;
    statistics.dsinks = floats(dsinks);
    statistics.num_entries = static_cast<int>(entries);
    statistics.num_heads = params.num_heads;
    statistics.stats_rows = params.stats_rows;
    const Variant* variant = plan_bwd_sinks(plan.variant->arch);
    FX_CHECK(variant != nullptr, "attention: this build has no bwd_sinks kernel");
    FX_CUDA_CHECK(find_bwd_sinks(variant->name)(statistics, stream), variant->name);
  }
  return {dq, dk, dv, dsinks, dk_bias};
}

Gradients bwd(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
              FX_INPUT_PARAMETERS, bool deterministic, int64_t wanted, std::optional<std::string> backend) {
  const AttentionInputs inputs{q, k, v, FX_INPUT_NAMES};
  FwdProblem problem = problem_from_inputs(inputs, backend);
  problem.deterministic = deterministic;
  problem.wanted = wanted;
  if (const char* pairs = std::getenv("FLASH_EXT_BWD_PAIRS")) problem.pairs = pairs_from_name(pairs);
  const DeviceInfo& device = device_info_of(q);
  const FwdPlan plan = plan_bwd(problem, device);
  if (plan.variant == nullptr) {  // a backend that has a forward alone leaves the gradients to the reference too
    return reference_bwd(dout, dlse, inputs, out, lse, deterministic, wanted,
                         backend == "reference" ? "" : plan.rejections_as_text());
  }
  OpMemory memory;
  return launch_bwd(dout, dlse, inputs, out, lse, problem, plan, device, BlockListParams{}, memory);
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

  const int64_t stats_rows = (seqlen_q + kStatsRowAlignment - 1) / kStatsRowAlignment * kStatsRowAlignment;
  Tensor delta = new_float32(out, {batch, num_heads, stats_rows});
  Tensor lse_log2 = new_float32(out, {batch, num_heads, stats_rows});
  const Tensor out_rows = with_aligned_rows(out);
  const Tensor dout_rows = with_aligned_rows(dout);
  OpMemory memory;
  memory.add(out_rows, MemoryRole::kIn, "out");
  memory.add(dout_rows, MemoryRole::kIn, "dout");
  memory.add(lse, MemoryRole::kIn, "lse");
  if (dlse) memory.add(*dlse, MemoryRole::kIn, "dlse");
  memory.add(delta, MemoryRole::kOut, "delta");
  memory.add(lse_log2, MemoryRole::kOut, "lse_log2");
  SeqlenParams seqlens_q{};
  seqlens_q.num_rows = static_cast<int>(seqlen_q);
  const LaunchScope scope(out);
  launch_preprocess(out_rows, dout_rows, lse, dlse, delta, lse_log2, seqlens_q, static_cast<int>(batch), scope.stream());
  return {delta, lse_log2};
}

}  // namespace flash_ext
