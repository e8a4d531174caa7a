// Op body of the forward: problem -> plan -> launch, or the reference with the reasons why.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "host/check.h"
#include "host/emulator.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

std::tuple<Tensor, Tensor> reference_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const FwdProblem& problem,
                                         const std::string& reason) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{
      from(q),           from(k), from(v), from(problem.softmax_scale), from(problem.causal), from(problem.window_left),
      from(problem.window_right), from(problem.softcap), from(reason)};
  call_op("flash_ext::reference_fwd", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal, int64_t window_left,
                               int64_t window_right, double softcap, bool /*deterministic*/,
                               std::optional<std::string> backend) {
  const FwdProblem problem =
      fwd_problem_from_tensors(q, k, v, softmax_scale, causal, window_left, window_right, softcap, backend);
  const FwdPlan plan = plan_fwd(problem, device_info_of(q));
  FX_CHECK(!plan.backend.empty(), "attention: backend '", problem.backend, "' cannot run this call; ",
           plan.rejections_as_text());
  if (plan.variant == nullptr) {
    // Asked for by name, the reference is no fallback and gives no warning.
    return reference_fwd(q, k, v, problem, problem.backend.empty() ? plan.rejections_as_text() : "");
  }

  const Tensor q_rows = with_aligned_rows(q), k_rows = with_aligned_rows(k), v_rows = with_aligned_rows(v);
  const int64_t out_sizes[] = {problem.batch(), problem.seqlen_q(), problem.num_heads(), problem.head_dim_v()};
  Tensor out = torch::stable::new_empty(q, out_sizes);
  Tensor lse = new_float32(q, {problem.batch(), problem.num_heads(), problem.seqlen_q()});
  if (out.numel() == 0) return {out, lse};

  OpMemory memory;
  memory.add(q_rows, MemoryRole::kIn, "q");
  memory.add(k_rows, MemoryRole::kIn, "k");
  memory.add(v_rows, MemoryRole::kIn, "v");
  memory.add(out, MemoryRole::kOut, "out");
  memory.add(lse, MemoryRole::kOut, "lse");

  FwdParams params{};
  params.q = q_rows.data_ptr();
  params.k = k_rows.data_ptr();
  params.v = v_rows.data_ptr();
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  params.q_strides = row_strides_of(q_rows);
  params.k_strides = row_strides_of(k_rows);
  params.v_strides = row_strides_of(v_rows);
  params.out_strides = row_strides_of(out);
  params.batch = static_cast<int>(problem.batch());
  params.num_heads = static_cast<int>(problem.num_heads());
  params.num_heads_kv = static_cast<int>(problem.num_heads_kv());
  params.seqlens_q.num_rows = static_cast<int>(problem.seqlen_q());
  params.seqlens_k.num_rows = static_cast<int>(problem.seqlen_k());
  params.lse_strides = {.batch = lse.stride(0), .row = lse.stride(2), .head = lse.stride(1)};
  params.num_splits = 1;
  params.heads_per_tile = 1;
  params.head_dim = static_cast<int>(problem.head_dim());
  params.head_dim_v = static_cast<int>(problem.head_dim_v());
  params.score.softmax_scale = static_cast<float>(softmax_scale);
  params.num_ctas = static_cast<int>(plan.grid[0]);
  const LaunchScope scope(q);
  FX_CUDA_CHECK(find_fwd(plan.variant->name)(params, scope.stream()), plan.variant->name);
  return {out, lse};
}

}  // namespace flash_ext
