// Op body of the forward: problem -> plan -> launch, or the reference with the reasons why.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <tuple>
#include <vector>

#include "host/check.h"
#include "host/emulator.h"
#include "host/fwd.h"
#include "host/launch_fwd.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

FwdResults reference_fwd(const AttentionInputs& inputs, bool return_max_logit, const std::string& reason) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(inputs.q), from(inputs.k), from(inputs.v)};
  push_inputs(&stack, inputs);
  stack.push_back(from(return_max_logit));
  stack.push_back(from(reason));
  call_op("flash_ext::reference_fwd", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

}  // namespace

// (parts,) batch, seqlen_q, heads, head_dim_v, or packed
Tensor new_out(const FwdProblem& problem, const Tensor& q, torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> sizes;
  if (problem.num_parts > 0) sizes.push_back(problem.num_parts);
  if (!problem.packed()) sizes.push_back(problem.batch());
  sizes.insert(sizes.end(), {problem.seqlen_q(), problem.num_heads(), problem.head_dim_v()});
  return torch::stable::new_empty(q, sizes, dtype);
}

// (parts,) batch, heads, seqlen_q, or packed
Tensor new_lse(const FwdProblem& problem, const Tensor& q) {
  std::vector<int64_t> sizes;
  if (problem.num_parts > 0) sizes.push_back(problem.num_parts);
  if (!problem.packed()) sizes.push_back(problem.batch());
  sizes.insert(sizes.end(), {problem.num_heads(), problem.seqlen_q()});
  return torch::stable::new_empty(q, sizes, torch::headeronly::ScalarType::Float);
}

void fill_results(FwdParams* params, const FwdProblem& problem, const Tensor& out, const Tensor& lse, const Tensor& max_logit) {
  params->out = out.data_ptr();
  params->lse = static_cast<float*>(lse.data_ptr());
  params->max_logit = max_logit.numel() > 0 ? static_cast<float*>(max_logit.data_ptr()) : nullptr;
  params->out_strides = row_strides_of(out);
  params->lse_strides = {.batch = problem.packed() ? 0 : lse.stride(lse.dim() - 3), .row = 1, .head = problem.seqlen_q()};
  params->out_split_stride = problem.num_parts > 0 ? out.stride(0) : 0;
  params->lse_split_stride = problem.num_parts > 0 ? lse.stride(0) : 0;
}

// Rows of q that no sequence shows: out 0, lse -inf.
void fill_unused_rows(const FwdParams& params, const DeviceInfo& device, cudaStream_t stream) {
  const SeqlenParams& seqlens = params.seqlens_q;
  if (seqlens.cu_seqlens == nullptr && seqlens.seqused == nullptr && seqlens.leftpad == nullptr) return;
  const Variant* variant = plan_fill_unused(device);
  FX_CHECK(variant != nullptr, "attention: this build has no fill_unused kernel for this GPU");
  FillUnusedParams fill{};
  fill.seqlens = seqlens;
  fill.batch = params.batch;
  fill.num_targets = 2;
  const RowStrides& strides = params.out_strides;  // of pairs of elements
  fill.targets[0] = {static_cast<uint32_t*>(params.out), {strides.batch / 2, strides.row / 2, strides.head / 2},
                     params.num_heads, params.head_dim_v / 2, 0};
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  fill.targets[1] = {reinterpret_cast<uint32_t*>(params.lse), params.lse_strides, params.num_heads, 1,
                     std::bit_cast<uint32_t>(kMinusInfinity)};
  FX_CUDA_CHECK(find_fill_unused(variant->name)(fill, stream), variant->name);
}

FwdResults launch_fwd(const AttentionInputs& inputs, const FwdProblem& problem, const FwdPlan& plan, const DeviceInfo& device,
                      bool return_max_logit, const BlockListParams& blocks, OpMemory& memory) {
  const Tensor& q = inputs.q;
  const Tensor q_rows = with_aligned_rows(q), k_rows = with_aligned_rows(inputs.k), v_rows = with_aligned_rows(inputs.v);
  Tensor out = new_out(problem, q, q.scalar_type()), lse = new_lse(problem, q);
  Tensor max_logit = new_float32(q, {return_max_logit ? problem.num_heads() : 0});
  const LaunchScope scope(q);
  if (return_max_logit) torch::stable::fill_(max_logit, -std::numeric_limits<double>::infinity());
  if (out.numel() == 0) return {out, lse, max_logit};

  memory.add(q_rows, MemoryRole::kIn, "q");
  memory.add(k_rows, MemoryRole::kIn, "k");
  memory.add(v_rows, MemoryRole::kIn, "v");
  add_inputs(memory, inputs);
  memory.add(out, MemoryRole::kOut, "out");
  memory.add(lse, MemoryRole::kOut, "lse");
  memory.add(max_logit, MemoryRole::kInOut, "max_logit");

  FwdParams params{};
  fill_attention_params(&params, inputs, problem, q_rows, k_rows, v_rows);
  fill_results(&params, problem, out, lse, max_logit);
  params.num_splits = plan.num_splits;
  std::copy(inputs.split_boundaries.begin(), inputs.split_boundaries.end(), params.split_boundaries);
  params.heads_per_tile = plan.heads_per_tile;
  params.num_ctas = static_cast<int>(plan.grid[0]);
  params.blocks = blocks;
  fill_unused_rows(params, device, scope.stream());
  FX_CUDA_CHECK(find_fwd(plan.variant->name)(params, scope.stream()), plan.variant->name);
  return {out, lse, max_logit};
}

FwdResults fwd(Tensor q, Tensor k, Tensor v, FX_INPUT_PARAMETERS, bool return_max_logit, bool /*deterministic*/,
            std::optional<std::string> backend) {
  const AttentionInputs inputs{q, k, v, FX_INPUT_NAMES};
  const FwdProblem problem = problem_from_inputs(inputs, backend);
  const DeviceInfo& device = device_info_of(q);
  const FwdPlan plan = plan_fwd(problem, device);
  FX_CHECK(!plan.backend.empty(), "attention: backend '", problem.backend, "' cannot run this call; ",
           plan.rejections_as_text());
  if (plan.variant == nullptr) {
    // Asked for by name, the reference is no fallback and gives no warning.
    return reference_fwd(inputs, return_max_logit, problem.backend.empty() ? plan.rejections_as_text() : "");
  }

  OpMemory memory;
  return launch_fwd(inputs, problem, plan, device, return_max_logit, BlockListParams{}, memory);
}

}  // namespace flash_ext
