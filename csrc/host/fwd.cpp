// Op body of the forward: problem -> plan -> launch, or the reference with the reasons why.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "host/check.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {

std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal, int64_t window_left,
                               int64_t window_right, double softcap, bool /*deterministic*/,
                               std::optional<std::string> backend) {
  const FwdProblem problem =
      fwd_problem_from_tensors(q, k, v, softmax_scale, causal, window_left, window_right, softcap, backend);
  const FwdPlan plan = plan_fwd(problem, device_info_of(q));
  FX_CHECK(!plan.backend.empty(), "attention: backend '", problem.backend, "' cannot run this call; ",
           plan.rejections_as_text());

  // Asked for by name, the reference is no fallback and gives no warning.
  const std::string reason = problem.backend.empty() ? plan.rejections_as_text() : "";
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(q),           from(k),           from(v),
                                  from(softmax_scale), from(causal),    from(window_left),
                                  from(window_right), from(softcap),    from(reason)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("flash_ext::reference_fwd", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace flash_ext
