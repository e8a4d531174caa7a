// PLAN: a pure function of the problem, the device and the compiled variants. The single place where an architecture is
// chosen; the ops and flash_ext.explain both ask here. Makes no CUDA call, reads no device memory, never synchronises.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "host/device.h"
#include "host/problem.h"

namespace flash_ext {

struct Rejection {
  std::string backend;
  std::vector<std::string> reasons;
};

struct FwdPlan {
  std::string backend;               // "sm90", "sm80" or "reference"; empty when the backend asked for cannot run
  const Variant* variant = nullptr;  // null for the reference
  std::array<int64_t, 3> grid{};     // zero for the reference
  int num_splits = 1;                // parts of the keys that different items work on
  int heads_per_tile = 1;            // query heads of one KV head that share a tile of queries
  int64_t workspace_bytes = 0;
  std::vector<std::string> copies;  // tensors copied because 16-byte accesses cannot read them where they lie
  std::vector<Rejection> rejected;  // every other candidate, in the order tried

  // "sm90: reason, reason; sm80: reason"
  std::string rejections_as_text() const;
};

FwdPlan plan_fwd(const FwdProblem& problem, const DeviceInfo& device);

// Pieces that plans share. The least general mask and score that a problem's options come to.
Mask mask_of(const FwdProblem& problem);
Score score_of(const FwdProblem& problem);
// Grid, copies and parts of a plan that has its variant. packs_heads: query heads of one KV head may share a tile.
void fill_launch(FwdPlan* plan, const FwdProblem& problem, const DeviceInfo& device, Op op, bool packs_heads);
// The reason where a group has no row: kernels is "forward", "backward" or the like.
std::string not_built(const char* kernels, const char* backend);
// Whether the kernels' 32-bit numbers hold the call's items and rows.
bool kernel_sizes_fit(const FwdProblem& problem);

// The same question for the backward.
FwdPlan plan_bwd(const FwdProblem& problem, const DeviceInfo& device);

// The rows of a head in the backward's statistics and sums, for the lengths that the host knows.
int64_t bwd_stats_rows(const FwdProblem& problem);

// The variants that put the sums of this group's backward into rows, and that compute the sinks' gradient; null when this build
// has none.
const Variant* plan_bwd_postprocess(ScalarType dtype, int arch);
const Variant* plan_bwd_sinks(int arch);

// The kernel that gives rows of no sequence their value, or null when this build or device has none.
const Variant* plan_fill_unused(const DeviceInfo& device);

// The variant of the backward's first step, or null when this build or device has none.
const Variant* plan_bwd_preprocess(ScalarType dtype, int64_t head_dim_v, const DeviceInfo& device);

// The row for this device, or null.
const Variant* plan_mask_blocks(const DeviceInfo& device);

// The steps around attention over a KV cache: the variant of an op whose rows differ in head_dim_v alone, or null.
const Variant* plan_kvcache_step(Op op, ScalarType dtype, int64_t head_dim_v, const DeviceInfo& device);

// What an FP8 forward needs beside the problem.
struct Fp8Options {
  bool block_scales = false;  // of k or v, a scale for every 64 rows
  bool flushes = true;
  bool whole_blocks = true;    // parts of the keys begin with one
  bool shared_q_scale = true;  // by the query heads of a KV head, and by all rows
};
FwdPlan plan_fwd_fp8(const FwdProblem& problem, const Fp8Options& options, const DeviceInfo& device);

// The variant that makes an e4m3 copy of a tensor, or null when this build or device has none.
const Variant* plan_quantize_fp8(ScalarType dtype, int64_t head_dim, const DeviceInfo& device);

}  // namespace flash_ext
