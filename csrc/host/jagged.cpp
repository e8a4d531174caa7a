// Op bodies of packed calls whose short sequences are grouped: kernels with tables where there are any, else the packed call
// that it is, with tiles of its own for each sequence.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host/check.h"
#include "host/emulator.h"
#include "host/launch_bwd.h"
#include "host/launch_fwd.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

// Memory safety: shapes and dtypes. The values are clamped on the device.
void check_tables(const Tensor& groups_q, const Tensor& groups_k, const Tensor& keys_of, const Tensor& queries_of, const Tensor& q,
                  const Tensor& k) {
  for (const Tensor* tensor : {&groups_q, &groups_k, &keys_of, &queries_of}) {
    FX_CHECK(tensor->scalar_type() == torch::headeronly::ScalarType::Int && tensor->is_contiguous(),
             "attention_jagged: the tensors of groups must be contiguous and int32");
  }
  const auto is_table = [](const Tensor& table, const Tensor& rows) {
    return table.dim() == 2 && table.size(0) == rows.size(0) && table.size(1) == 2;
  };
  FX_CHECK(is_table(keys_of, q) && is_table(queries_of, k) && groups_q.dim() == 1 && groups_k.dim() == 1 &&
               groups_q.numel() == groups_k.numel(),
           "attention_jagged: groups were made for another call");
}

// The groups in the place of sequences; causal is part of the tables.
AttentionInputs grouped_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& groups_q, const Tensor& groups_k,
                               const Tensor& keys_of, const Tensor& queries_of, const std::optional<Tensor>& sinks,
                               const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& k_bias,
                               double softmax_scale, double softcap) {
  check_tables(groups_q, groups_k, keys_of, queries_of, q, k);
  return {.q = q, .k = k, .v = v, .cu_seqlens_q = groups_q, .cu_seqlens_k = groups_k, .seqused_q = {}, .seqused_k = {},
          .leftpad_q = {}, .leftpad_k = {}, .sinks = sinks, .alibi_slopes = alibi_slopes, .k_bias = k_bias,
          .softmax_scale = softmax_scale, .causal = false, .window_left = -1, .window_right = -1, .softcap = softcap,
          .split_boundaries = {}, .keys_of = keys_of, .queries_of = queries_of};
}

}  // namespace

FwdResults fwd_jagged(Tensor q, Tensor k, Tensor v, FX_GROUPED_PARAMETERS, bool return_max_logit, bool deterministic,
                      std::optional<std::string> backend) {
  const AttentionInputs inputs = grouped_inputs(q, k, v, groups_q, groups_k, keys_of, queries_of, sinks, alibi_slopes, k_bias,
                                                softmax_scale, softcap);
  FwdProblem problem = problem_from_inputs(inputs, backend);
  problem.grouped = true;
  const DeviceInfo& device = device_info_of(q);
  const FwdPlan plan = plan_fwd(problem, device);
  if (plan.variant == nullptr) {
    return fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, {}, {}, {}, {}, sinks, alibi_slopes, k_bias, softmax_scale, causal, -1, -1,
               softcap, {}, return_max_logit, deterministic, backend);
  }
  OpMemory memory;
  return launch_fwd(inputs, problem, plan, device, return_max_logit, BlockListParams{}, memory);
}

Gradients bwd_jagged(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                     FX_GROUPED_PARAMETERS, bool deterministic, int64_t wanted, std::optional<std::string> backend) {
  const AttentionInputs inputs = grouped_inputs(q, k, v, groups_q, groups_k, keys_of, queries_of, sinks, alibi_slopes, k_bias,
                                                softmax_scale, softcap);
  FwdProblem problem = problem_from_inputs(inputs, backend);
  problem.grouped = true;
  problem.deterministic = deterministic;
  problem.wanted = wanted;
  const DeviceInfo& device = device_info_of(q);
  const FwdPlan plan = plan_bwd(problem, device);
  if (plan.variant == nullptr) {
    return bwd(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, {}, {}, {}, {}, sinks, alibi_slopes, k_bias,
               softmax_scale, causal, -1, -1, softcap, {}, deterministic, wanted, backend);
  }
  OpMemory memory;
  return launch_bwd(dout, dlse, inputs, out, lse, problem, plan, device, BlockListParams{}, memory);
}

}  // namespace flash_ext
