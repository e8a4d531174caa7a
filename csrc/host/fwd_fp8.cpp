// Op body of the FP8 forward: problem -> plan -> launch, or the reference with the reasons why.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "common/fp8_params.h"
#include "common/quantize_params.h"
#include "host/check.h"
#include "host/emulator.h"
#include "host/fwd.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;
using TorchType = torch::headeronly::ScalarType;

struct Fp8Arguments {
  const std::optional<Tensor>&q_descale, &k_descale, &v_descale;
  TorchType out_dtype;
  int64_t flush_every;
  bool return_max_logit;
};

Results reference_fwd_fp8(const AttentionInputs& inputs, const Fp8Arguments& fp8, const std::string& reason) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(inputs.q), from(inputs.k), from(inputs.v)};
  push_inputs(&stack, inputs);
  for (const StableIValue value : {from(fp8.q_descale), from(fp8.k_descale), from(fp8.v_descale), from(fp8.out_dtype),
                                   from(fp8.flush_every), from(fp8.return_max_logit), from(reason)}) {
    stack.push_back(value);
  }
  call_op("flash_ext::reference_fwd_fp8", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

bool has_blocks(const std::optional<Tensor>& descale) { return descale && descale->dim() == 3; }

// One scale, (sequences, heads) or, three dimensions, blocks of 64 rows: flash_ext/quantize.py.
Descale descale_of(const std::optional<Tensor>& given, const FwdProblem& problem, bool of_queries, const Tensor& q,
                   const char* name) {
  if (!given) return {nullptr, 0, 0, 1, 0};
  const Tensor& descale = *given;
  FX_CHECK(descale.scalar_type() == TorchType::Float && descale.is_cuda() == q.is_cuda() &&
               descale.get_device_index() == q.get_device_index(),
           "attention: ", name, " must be float32 on q's device");
  Descale result{static_cast<const float*>(descale.data_ptr()), 0, 0, 1, 0};
  if (descale.dim() < 2) {
    FX_CHECK(descale.numel() == 1, "attention: ", name, " must have one element, two dimensions or three");
    return result;
  }
  const int64_t heads = of_queries ? problem.num_heads() : problem.num_heads_kv();
  const int64_t rows = of_queries ? problem.seqlen_q() : problem.seqlen_k();
  const bool blocks = descale.dim() == 3, groups = of_queries && !blocks && descale.size(1) == problem.num_heads_kv();
  const int64_t slots =
      problem.packed() ? rows / kScaleRows + problem.batch() : (rows + kScaleRows - 1) / kScaleRows;
  bool fits = descale.dim() <= 3 && descale.size(0) == (blocks && problem.packed() ? 1 : problem.batch()) &&
              (descale.size(1) == heads || groups);
  if (blocks) fits = fits && descale.size(2) == slots && (slots <= 1 || descale.stride(2) == 1);
  FX_CHECK(fits, "attention: ", name, " has a wrong shape or a last dimension that is not contiguous");
  result.batch_stride = descale.stride(0);
  result.head_stride = descale.stride(1);
  result.heads_per_scale = groups ? static_cast<int>(heads / std::max<int64_t>(1, problem.num_heads_kv())) : 1;
  result.block_step = blocks ? 1 : 0;
  return result;
}

}  // namespace

Results fwd_fp8(Tensor q, Tensor k, Tensor v, FX_INPUT_PARAMETERS, std::optional<Tensor> q_descale,
                std::optional<Tensor> k_descale, std::optional<Tensor> v_descale, TorchType out_dtype, int64_t flush_every,
                bool return_max_logit, std::optional<std::string> backend) {
  const AttentionInputs inputs{q, k, v, FX_INPUT_NAMES};
  const Fp8Arguments fp8{q_descale, k_descale, v_descale, out_dtype, flush_every, return_max_logit};
  FX_CHECK(q.scalar_type() == TorchType::Float8_e4m3fn, "attention: q, k and v of an FP8 call must be float8_e4m3fn");
  FX_CHECK(out_dtype == TorchType::BFloat16 || out_dtype == TorchType::Half, "attention: out_dtype must be bfloat16 or float16");
  const FwdProblem problem = problem_from_inputs(inputs, backend);
  const DeviceInfo& device = device_info_of(q);
  const bool blocks = has_blocks(k_descale) || has_blocks(v_descale) || (has_blocks(q_descale) && problem.leftpad);
  const bool shared_q_scale =
      !q_descale || q_descale->dim() < 2 || (q_descale->dim() == 2 && q_descale->size(1) == problem.num_heads_kv());
  const bool whole_blocks = std::all_of(split_boundaries.begin(), split_boundaries.end(), [&](int64_t boundary) {
    return boundary % kScaleRows == 0 || boundary == problem.seqlen_k();
  });
  const FwdPlan plan = plan_fwd_fp8(problem, {.block_scales = blocks,
                                              .flushes = flush_every != 0,
                                              .whole_blocks = whole_blocks,
                                              .shared_q_scale = shared_q_scale},
                                    device);
  FX_CHECK(!plan.backend.empty(), "attention: backend '", problem.backend, "' cannot run this FP8 call; ",
           plan.rejections_as_text());
  if (plan.variant == nullptr) {
    // Asked for by name, the reference is no fallback and gives no warning.
    return reference_fwd_fp8(inputs, fp8, problem.backend.empty() ? plan.rejections_as_text() : "");
  }

  const Tensor q_rows = with_aligned_rows(q), k_rows = with_aligned_rows(k), v_rows = with_aligned_rows(v);
  Tensor out = new_out(problem, q, out_dtype), lse = new_lse(problem, q);
  Tensor max_logit = new_float32(q, {return_max_logit ? problem.num_heads() : 0});
  const LaunchScope scope(q);
  if (return_max_logit) torch::stable::fill_(max_logit, -std::numeric_limits<double>::infinity());
  if (out.numel() == 0) return {out, lse, max_logit};

  FwdFp8Params params{};
  fill_attention_params(&params, inputs, problem, q_rows, k_rows, v_rows);
  fill_results(&params, problem, out, lse, max_logit);
  params.q_descale = descale_of(q_descale, problem, true, q, "q_descale");
  params.k_descale = descale_of(k_descale, problem, false, q, "k_descale");
  params.v_descale = descale_of(v_descale, problem, false, q, "v_descale");
  params.out_is_fp16 = out_dtype == TorchType::Half;
  params.num_splits = plan.num_splits;
  std::copy(split_boundaries.begin(), split_boundaries.end(), params.split_boundaries);
  params.heads_per_tile = plan.heads_per_tile;
  params.num_ctas = static_cast<int>(plan.grid[0]);

  OpMemory memory;
  memory.add(q_rows, MemoryRole::kIn, "q");
  memory.add(k_rows, MemoryRole::kIn, "k");
  memory.add(v_rows, MemoryRole::kIn, "v");
  add_inputs(memory, inputs);
  for (const auto& [scale, name] : {std::pair(&q_descale, "q_descale"), {&k_descale, "k_descale"}, {&v_descale, "v_descale"}}) {
    if (*scale) memory.add(**scale, MemoryRole::kIn, name);
  }
  memory.add(out, MemoryRole::kOut, "out");
  memory.add(lse, MemoryRole::kOut, "lse");
  memory.add(max_logit, MemoryRole::kInOut, "max_logit");
  fill_unused_rows(params, device, scope.stream());
  FX_CUDA_CHECK(find_fwd_fp8(plan.variant->name)(params, scope.stream()), plan.variant->name);
  return {out, lse, max_logit};
}

}  // namespace flash_ext
