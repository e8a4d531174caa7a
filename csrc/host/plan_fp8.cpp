// Plans of the FP8 ops: Hopper has kernels of its own, other GPUs from 8.9 on those of the sm89 group.
#include <algorithm>
#include <string_view>
#include <tuple>

#include "host/plan.h"

namespace flash_ext {
namespace {

// Rows are e4m3 pairs to the copy engine, 16 bytes at least.
constexpr int kHeadDimStep = 16;

struct Fp8Backend {
  const char* name;
  int arch;  // of its rows
};
// In the order of preference.
constexpr Fp8Backend kFp8Backends[] = {{"sm90", 90}, {"sm80", 89}};

bool device_runs(const DeviceInfo& device, const Fp8Backend& backend) {
  return backend.arch == 90 ? device.arch == 90 : device.arch >= backend.arch;
}

// Whether keys or queries do not begin where a block of scales does.
bool needs_alignment(const FwdProblem& problem, const Fp8Options& options) {
  return options.block_scales && (problem.leftpad || (problem.num_parts > 0 && !options.whole_blocks));
}

// The row of this backend that covers the problem with the least work. A row with more general policies can stand in: scales of
// blocks for those of heads, flushed sums for others.
const Variant* find_row(const Fp8Backend& backend, const FwdProblem& problem, const Fp8Options& options) {
  const auto cost = [](const Variant& row) {
    const std::string_view kind = row.kind;
    return std::tuple(row.head_dim + row.head_dim_v, static_cast<int>(row.score), static_cast<int>(row.mask),
                      kind.starts_with("block"), !kind.ends_with("_unflushed"));
  };
  const Variant* smallest = nullptr;
  for (const Variant& row : variants()) {
    if (row.op != Op::k_fwd_fp8 || row.arch != backend.arch) continue;
    const std::string_view kind = row.kind;
    // Hopper's most general rows alone align keys with blocks of scales.
    const bool aligns = row.mask == Mask::k_local && row.score == Score::k_modified;
    const bool covers = (aligns || !needs_alignment(problem, options)) && row.head_dim >= problem.head_dim() && row.head_dim_v >= problem.head_dim_v() &&
                        row.mask >= mask_of(problem) && row.score >= score_of(problem) &&
                        (!options.block_scales || kind.starts_with("block")) &&
                        (!options.flushes || !kind.ends_with("_unflushed"));
    if (covers && (smallest == nullptr || cost(row) < cost(*smallest))) smallest = &row;
  }
  return smallest;
}

// Why this backend cannot run the problem, whatever its row.
std::vector<std::string> reasons_against(const Fp8Backend& backend, const FwdProblem& problem, const Fp8Options& options,
                                         const DeviceInfo& device) {
  std::vector<std::string> reasons;
  if (device.arch == 0) return {"the tensors are not on a CUDA device"};
  if (!device_runs(device, backend)) {
    reasons.push_back(std::string("FP8 needs compute capability ") + (backend.arch == 90 ? "9.0" : "8.9 or later") +
                      ", this GPU has " + std::to_string(device.arch / 10) + "." + std::to_string(device.arch % 10));
  }
  for (const auto& [name, dim] : {std::pair("head_dim", problem.head_dim()), std::pair("head_dim_v", problem.head_dim_v())}) {
    if (dim % kHeadDimStep != 0) {
      reasons.push_back(std::string("no FP8 kernel has ") + name + " " + std::to_string(dim) + ": it must be a multiple of 16");
    }
  }
  if (backend.arch != 90 && needs_alignment(problem, options)) {
    reasons.push_back(problem.leftpad
                          ? "no FP8 kernel of this backend has block scales with leftpad"
                          : "no FP8 kernel of this backend has block scales with split_boundaries that are not multiples of 64");
  }
  if (reasons.empty() && !kernel_sizes_fit(problem)) {
    reasons.push_back("batch * num_heads * seqlen is beyond the kernels' 32-bit tile numbers");
  }
  return reasons;
}

}  // namespace

FwdPlan plan_fwd_fp8(const FwdProblem& problem, const Fp8Options& options, const DeviceInfo& device) {
  FwdPlan plan;
  for (const Fp8Backend& backend : kFp8Backends) {
    std::vector<std::string> reasons = reasons_against(backend, problem, options, device);
    const Variant* row = reasons.empty() ? find_row(backend, problem, options) : nullptr;
    if (reasons.empty() && row == nullptr) reasons.push_back(not_built("such an FP8 forward", backend.name));
    const bool wanted = problem.backend.empty() || problem.backend == backend.name;
    if (reasons.empty() && wanted && plan.backend.empty()) {
      plan.backend = backend.name;
      plan.variant = row;
      fill_launch(&plan, problem, device, Op::k_fwd_fp8, /*packs_heads=*/options.shared_q_scale);
      continue;
    }
    if (reasons.empty()) reasons.push_back(wanted ? plan.backend + " is preferred" : "backend '" + problem.backend + "' was asked for");
    plan.rejected.push_back({backend.name, std::move(reasons)});
  }
  if (!plan.backend.empty()) {
    plan.rejected.push_back({"reference", {plan.backend + " is preferred"}});
  } else if (problem.backend.empty() || problem.backend == "reference") {
    plan.backend = "reference";
  }
  return plan;
}

const Variant* plan_quantize_fp8(ScalarType dtype, int64_t head_dim, const DeviceInfo& device) {
  if (head_dim % 8 != 0) return nullptr;
  for (const Fp8Backend& backend : kFp8Backends) {
    if (!device_runs(device, backend)) continue;
    const Variant* smallest = nullptr;
    for (const Variant& row : variants()) {
      const bool covers =
          row.op == Op::k_quantize_fp8 && row.arch == backend.arch && row.dtype == dtype && row.head_dim >= head_dim;
      if (covers && (smallest == nullptr || row.head_dim < smallest->head_dim)) smallest = &row;
    }
    if (smallest != nullptr) return smallest;
  }
  return nullptr;
}

}  // namespace flash_ext
