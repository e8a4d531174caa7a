#include "host/plan_kvcache.h"

#include <algorithm>
#include <bit>

#include "common/splits.cuh"

namespace flash_ext {
namespace {

constexpr int64_t kMaxItems = int64_t{1} << 30;  // items and tiles are 32-bit numbers in the kernels

int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pages whose rows divide a tile of keys, or are a multiple of it, go by TMA, rows of eight at least (a swizzle period) and
// at most 32 pages a tile; padding on the left would shift tiles against pages.
bool takes_tma(const CacheProblem& problem, int block_n) {
  if (!problem.paged) return true;
  const int64_t rows = problem.k_cache.sizes[1];
  return !problem.leftpad && (rows % block_n == 0 || (rows % 8 == 0 && block_n % rows == 0 && block_n / rows <= 32));
}

// Heads of a KV head that share a tile of 64 rows: all of them, where that saves tiles.
int shared_heads(const CacheProblem& problem, int block_m) {
  const int64_t group = problem.num_heads() / problem.num_heads_kv();
  if (group <= 1 || problem.q.strides[2] == 0) return 1;  // expanded heads: the copy engine gets one of them
  const int64_t heads = std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(group)), block_m);
  const int64_t rows = problem.seqlen_q();
  return ceil(group, heads) * ceil(rows, block_m / heads) < group * ceil(rows, block_m) ? static_cast<int>(heads) : 1;
}

}  // namespace

const Variant* plan_kvcache_step(Op op, ScalarType dtype, int64_t head_dim_v, const DeviceInfo& device) {
  // sm_90a code runs on 9.0 alone; the sm80 group's PTX on everything from 8.0 up.
  const int group = device.arch == 90 ? 90 : device.arch >= 80 ? 80 : 0;
  const Variant* smallest = nullptr;
  for (const Variant& row : variants()) {
    const bool covers = row.op == op && row.arch == group && row.dtype == dtype &&
                        (row.head_dim_v == 0 || row.head_dim_v >= head_dim_v);
    if (covers && (smallest == nullptr || row.head_dim_v < smallest->head_dim_v)) smallest = &row;
  }
  return smallest;
}

std::string CachePlan::reasons_as_text() const {
  std::string text;
  for (const std::string& reason : reasons) text += (text.empty() ? "" : ", ") + reason;
  return text;
}

CachePlan plan_kvcache(const CacheProblem& problem, const DeviceInfo& device) {
  CachePlan plan;
  const int64_t head_dim = problem.q.sizes[3], head_dim_v = problem.v_cache.sizes[3];
  const auto against = [&](bool condition, std::string reason) {
    if (condition) plan.reasons.push_back(std::move(reason));
  };
  against(device.arch != 90, device.arch == 0 ? "the tensors are not on a CUDA device"
                                              : "kernels that read a KV cache need compute capability 9.0");
  against(problem.dtype != ScalarType::kFloat16 && problem.dtype != ScalarType::kBFloat16,
          std::string("no compiled kernel takes ") + dtype_name(problem.dtype));
  against(head_dim % 8 != 0 || head_dim_v % 8 != 0, "head dims must be multiples of 8, got " + std::to_string(head_dim) +
                                                        " and " + std::to_string(head_dim_v));
  against(problem.rotary_dim % 16 != 0, "rotary_dim must be a multiple of 16, got " + std::to_string(problem.rotary_dim));
  if (problem.dtype == ScalarType::kFloat16 || problem.dtype == ScalarType::kBFloat16) {
    for (const auto& [name, cache] : {std::pair{"k_cache", &problem.k_cache}, std::pair{"v_cache", &problem.v_cache}}) {
      const char* reason = why_copied(*cache, problem.dtype);  // a cache is never copied
      against(reason != nullptr, std::string(name) + ": " + (reason == nullptr ? "" : reason));
    }
  }
  if (!plan.reasons.empty()) return plan;

  // One row of queries sees every key to its left: the causal row serves it without a window on that side.
  const bool bounded = problem.window_left >= 0 && problem.window_left < problem.capacity - 1;
  const bool causal = !bounded && (problem.window_right == 0 || problem.seqlen_q() <= 1);
  const bool general = !causal || problem.modified_score;
  for (const Variant& row : variants()) {
    if (row.op != Op::k_fwd_cache && row.op != Op::k_fwd_cache_gather) continue;
    if (row.dtype != problem.dtype || row.head_dim < std::max(head_dim, head_dim_v)) continue;
    if ((row.mask == Mask::k_local) != general) continue;
    if ((row.op == Op::k_fwd_cache) != takes_tma(problem, row.block_n)) continue;
    if (plan.variant == nullptr || row.head_dim < plan.variant->head_dim) plan.variant = &row;
  }
  const bool has_steps = plan_kvcache_step(Op::k_append_kv, problem.dtype, head_dim_v, device) != nullptr &&
                         plan_kvcache_step(Op::k_combine, problem.dtype, head_dim_v, device) != nullptr;
  against(plan.variant == nullptr || !has_steps, "this build has no kernel for such a cache with head_dim " +
                                                     std::to_string(std::max(head_dim, head_dim_v)));
  if (plan.variant != nullptr) {
    plan.heads_per_tile = shared_heads(problem, plan.variant->block_m);
    plan.num_m_blocks = std::max<int64_t>(1, ceil(problem.seqlen_q(), plan.variant->block_m / plan.heads_per_tile));
    plan.items_per_part =
        plan.num_m_blocks * problem.num_heads_kv() * ceil(problem.num_heads() / problem.num_heads_kv(), plan.heads_per_tile);
    const int64_t items = problem.batch() * plan.items_per_part;
    const int64_t tiles = ceil(problem.capacity, plan.variant->block_n);
    against(items >= kMaxItems || problem.capacity >= kMaxItems, "batch * heads * seqlen is beyond the kernels' 32-bit numbers");
    if (!plan.reasons.empty()) {
      plan.variant = nullptr;
      return plan;
    }
    // With four rounds of items and more, parts would gain less than their combination costs.
    const bool splits = problem.num_splits > 1 || (problem.num_splits == 0 && items < 4 * device.num_sms);
    plan.grid = device.num_sms;
    if (splits && tiles > 1) {
      const SplitProblem split{.batch = static_cast<int>(problem.batch()),
                               .items_per_part = static_cast<int>(plan.items_per_part),
                               .num_ctas = static_cast<int>(plan.grid),
                               .num_splits = static_cast<int>(problem.num_splits),
                               .block_n = plan.variant->block_n,
                               .seqlen_q = static_cast<int>(problem.seqlen_q()),
                               .window_left = static_cast<int>(problem.window_left)};
      plan.max_parts = max_total_parts(split, static_cast<int>(problem.capacity));
    } else {
      plan.grid = std::max<int64_t>(1, std::min<int64_t>(plan.grid, items));
    }
    plan.prepares = problem.appends || plan.max_parts > 0;
  }
  if (!plan.reasons.empty()) plan.variant = nullptr;
  return plan;
}

}  // namespace flash_ext
