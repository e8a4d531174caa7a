// Plans of the FP8 ops: Hopper alone has kernels for them.
#include <algorithm>
#include <string_view>
#include <tuple>

#include "host/plan.h"

namespace flash_ext {
namespace {

// Rows are e4m3 pairs to the copy engine, 16 bytes at least.
constexpr int kHeadDimStep = 16;

// Why no FP8 kernel can run the problem, whatever its row; rows are looked for afterwards.
std::vector<std::string> reasons_against(const FwdProblem& problem, const Fp8Options& options, const DeviceInfo& device) {
  std::vector<std::string> reasons;
  if (device.arch == 0) return {"the tensors are not on a CUDA device"};
  if (device.arch != 90) {
    reasons.push_back("FP8 needs compute capability 9.0, this GPU has " + std::to_string(device.arch / 10) + "." +
                      std::to_string(device.arch % 10));
  }
  for (const auto& [name, dim] : {std::pair("head_dim", problem.head_dim()), std::pair("head_dim_v", problem.head_dim_v())}) {
    if (dim % kHeadDimStep != 0) {
      reasons.push_back(std::string("no FP8 kernel has ") + name + " " + std::to_string(dim) + ": it must be a multiple of 16");
    }
  }
  if (options.block_scales && problem.num_parts > 0 && !options.whole_blocks) {
    reasons.push_back("no FP8 kernel has block scales with split_boundaries that are not multiples of 64");
  }
  if (options.block_scales && problem.leftpad) reasons.push_back("no FP8 kernel has block scales with leftpad");
  return reasons;
}

}  // namespace

FwdPlan plan_fwd_fp8(const FwdProblem& problem, const Fp8Options& options, const DeviceInfo& device) {
  FwdPlan plan;
  std::vector<std::string> reasons = reasons_against(problem, options, device);
  if (reasons.empty() && !kernel_sizes_fit(problem)) {
    reasons.push_back("batch * num_heads * seqlen is beyond the kernels' 32-bit tile numbers");
  }
  // A row with more general policies can stand in: scales of blocks for those of heads, flushed sums for others.
  const auto cost = [](const Variant& row) {
    const std::string_view kind = row.kind;
    return std::tuple(row.head_dim + row.head_dim_v, static_cast<int>(row.score), static_cast<int>(row.mask),
                      kind.starts_with("block"), !kind.ends_with("_unflushed"));
  };
  if (reasons.empty()) {
    for (const Variant& row : variants()) {
      if (row.op != Op::k_fwd_fp8) continue;
      const std::string_view kind = row.kind;
      const bool covers = row.head_dim >= problem.head_dim() && row.head_dim_v >= problem.head_dim_v() &&
                          row.mask >= mask_of(problem) && row.score >= score_of(problem) &&
                          (!options.block_scales || kind.starts_with("block")) &&
                          (!options.flushes || !kind.ends_with("_unflushed"));
      if (covers && (plan.variant == nullptr || cost(row) < cost(*plan.variant))) plan.variant = &row;
    }
    if (plan.variant == nullptr) reasons.push_back("this build has no FP8 forward kernel for this call");
  }
  plan.rejected.push_back({"sm80", {"there are no FP8 kernels below compute capability 9.0"}});
  const bool wants_kernel = problem.backend.empty() || problem.backend == "sm90";
  if (plan.variant != nullptr && wants_kernel) {
    plan.backend = "sm90";
    fill_launch(&plan, problem, device, Op::k_fwd_fp8, /*packs_heads=*/options.shared_q_scale);
    plan.rejected.push_back({"reference", {"sm90 is preferred"}});
    return plan;
  }
  plan.variant = nullptr;
  if (reasons.empty()) reasons.push_back("backend '" + problem.backend + "' was asked for");
  plan.rejected.push_back({"sm90", std::move(reasons)});
  if (problem.backend.empty() || problem.backend == "reference") plan.backend = "reference";
  return plan;
}

const Variant* plan_quantize_fp8(ScalarType dtype, int64_t head_dim, const DeviceInfo& device) {
  if (device.arch != 90 || head_dim % 8 != 0) return nullptr;
  const Variant* smallest = nullptr;
  for (const Variant& row : variants()) {
    const bool covers = row.op == Op::k_quantize_fp8 && row.dtype == dtype && row.head_dim >= head_dim;
    if (covers && (smallest == nullptr || row.head_dim < smallest->head_dim)) smallest = &row;
  }
  return smallest;
}

}  // namespace flash_ext
