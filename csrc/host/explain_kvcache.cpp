#include "host/explain_kvcache.h"

#include <algorithm>

namespace flash_ext {

CacheCallReport report_of(const CacheProblem& problem, const CachePlan& plan, const DeviceInfo& device,
                          const TensorLayout* new_k, const TensorLayout* new_v) {
  CacheCallReport report;
  const int64_t head_dim_v = problem.v_cache.sizes[3], rows = problem.num_heads() * problem.seqlen_q();
  const auto step = [&](Op op) {
    const ScalarType dtype = op == Op::k_combine ? problem.out_dtype : problem.dtype;
    if (const Variant* row = plan_kvcache_step(op, dtype, head_dim_v, device)) report.kernels.push_back(row->name);
  };
  if (plan.prepares) step(Op::k_append_kv);
  report.kernels.push_back(plan.variant->name);
  if (plan.max_parts > 0) step(Op::k_combine);
  const Op op = plan.variant->op;
  const bool tma = op == Op::k_fwd_cache || op == Op::k_fwd_mla || op == Op::k_fwd_fp8_cache;
  report.keys_by = tma && plan.variant->arch == 90 ? "tma" : "gather";

  constexpr int64_t kInt = sizeof(int), kFloat = sizeof(float);
  const auto bytes_of = [&](const TensorLayout& layout) {
    return layout.sizes[0] * layout.sizes[1] * layout.sizes[2] * layout.sizes[3] * element_size(problem.dtype);
  };
  const auto copied_bytes = [&](const char* name, const TensorLayout* layout) -> int64_t {
    const char* reason = layout == nullptr ? nullptr : why_copied(*layout, problem.dtype);
    if (reason == nullptr) return 0;
    report.copies.push_back(std::string(name) + ": " + reason);
    return bytes_of(*layout);
  };
  const int64_t copy_of_q = copied_bytes("q", &problem.q);
  const int64_t copies_of_rows = copied_bytes("k", new_k) + copied_bytes("v", new_v);
  const int64_t rotated = problem.rotary_dim > 0 ? bytes_of(problem.q) : 0;
  const int64_t lengths = plan.prepares ? problem.batch() * kInt : 0;
  const int64_t part_begin = plan.max_parts > 0 ? (problem.batch() + 1) * kInt : 0;
  const int64_t partials = plan.max_parts * rows * (head_dim_v + 1) * kFloat;
  // Copies of new rows are gone when partial results are allocated, that of q where there is a rotated one.
  const int64_t while_appending = copy_of_q + copies_of_rows + rotated;
  const int64_t while_attending = (rotated > 0 ? rotated : copy_of_q) + partials;
  report.workspace_bytes = lengths + part_begin + std::max(while_appending, while_attending);
  return report;
}

}  // namespace flash_ext
