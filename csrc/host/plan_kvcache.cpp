#include "host/plan_kvcache.h"

#include <algorithm>
#include <bit>

#include "common/splits.cuh"
#include "sm80/limits.h"

namespace flash_ext {
namespace {

constexpr int64_t kMaxItems = int64_t{1} << 30;  // items and tiles are 32-bit numbers in the kernels

int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kGroups[] = {90, 80};  // of rows, in the order of preference
const char* name_of(int group) { return group == 90 ? "sm90" : "sm80"; }
// sm_90a code runs on 9.0 alone; the sm80 group's PTX on everything from 8.0 up.
bool device_runs(const DeviceInfo& device, int group) { return group == 90 ? device.arch == 90 : device.arch >= group; }

// Above head_dim 256, only caches of latent vectors have rows: the values are the first columns of the keys.
bool is_latent(const CacheProblem& problem) { return std::max(problem.q.sizes[3], problem.v_cache.sizes[3]) > 256; }

// Rows of the sm80 group gather from pages of any size. On Hopper, pages whose rows divide a tile of keys, or are a multiple
// of it, go by TMA, rows of eight at least (a swizzle period) and at most 32 pages a tile; padding on the left would shift
// tiles against pages.
Op op_for(const CacheProblem& problem, const Variant& row) {
  const bool latent = is_latent(problem), fp8 = problem.dtype == ScalarType::kFloat8E4m3;
  const Op tma = latent ? Op::k_fwd_mla : fp8 ? Op::k_fwd_fp8_cache : Op::k_fwd_cache;
  if (row.arch != 90 || !problem.paged) return tma;
  const int64_t rows = problem.k_cache.sizes[1], keys = row.block_n;
  const bool by_tma = !problem.leftpad && (rows % keys == 0 || (rows % 8 == 0 && keys % rows == 0 && keys / rows <= 32));
  if (by_tma) return tma;
  return latent ? Op::k_fwd_mla_gather : fp8 ? Op::k_fwd_fp8_cache_gather : Op::k_fwd_cache_gather;
}

// Whether the call may run on rows of this group.
bool allows(const CacheProblem& problem, const DeviceInfo& device, int group) {
  const bool wanted = problem.backend.empty() || problem.backend == "reference" || problem.backend == name_of(group);
  return wanted && device_runs(device, group);
}

bool is_forward(Op op) {
  return op == Op::k_fwd_cache || op == Op::k_fwd_cache_gather || op == Op::k_fwd_mla || op == Op::k_fwd_mla_gather ||
         op == Op::k_fwd_fp8_cache || op == Op::k_fwd_fp8_cache_gather;
}

// The row of a group with the fewest columns that covers the call, or null.
const Variant* find_row(const CacheProblem& problem, int group) {
  // One row of queries sees every key to its left: the causal row serves it without a window on that side.
  const bool bounded = problem.window_left >= 0 && problem.window_left < problem.capacity - 1;
  const bool causal = !bounded && (problem.window_right == 0 || problem.seqlen_q() <= 1);
  // The sm80 rows of plain scores fold the scale into the exponent, which needs it above zero.
  const bool folds = group == 90 || static_cast<float>(problem.softmax_scale) > 0;
  const bool general = !causal || problem.modified_score || !folds || is_latent(problem);
  const Variant* smallest = nullptr;
  for (const Variant& row : variants()) {
    if (!is_forward(row.op) || row.arch != group) continue;
    if (row.dtype != problem.dtype || row.head_dim < problem.q.sizes[3] || row.head_dim_v < problem.v_cache.sizes[3]) continue;
    if ((row.mask == Mask::k_local) != general || row.op != op_for(problem, row)) continue;
    if (smallest == nullptr || row.head_dim < smallest->head_dim) smallest = &row;
  }
  return smallest;
}

// Persistent CTAs that are resident at once.
int64_t resident_ctas(const Variant& row, const DeviceInfo& device) {
  if (row.arch == 90) return device.num_sms;
  const bool large = device.smem_bytes >= sm80::bytes_of(sm80::SharedLimit::k163);
  return int64_t{device.num_sms} *
         sm80::cache_ctas_per_sm(large ? sm80::SharedLimit::k163 : sm80::SharedLimit::k99, row.head_dim);
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
  if (dtype == ScalarType::kFloat8E4m3) dtype = ScalarType::kBFloat16;  // moved as pairs
  const Variant* smallest = nullptr;
  for (int group : kGroups) {
    if (smallest != nullptr || !device_runs(device, group)) continue;
    for (const Variant& row : variants()) {
      const bool covers = row.op == op && row.arch == group && row.dtype == dtype &&
                          (row.head_dim_v == 0 || row.head_dim_v >= head_dim_v);
      if (covers && (smallest == nullptr || row.head_dim_v < smallest->head_dim_v)) smallest = &row;
    }
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
  const bool runs = std::ranges::any_of(kGroups, [&](int group) { return allows(problem, device, group); });
  const bool fp8 = problem.dtype == ScalarType::kFloat8E4m3;
  against(!runs || (fp8 && device.arch != 90),
          device.arch == 0 ? "the tensors are not on a CUDA device"
                           : std::string(fp8 ? "FP8 kernels that read a KV cache" : "kernels that read a KV cache") +
                                 " need compute capability " + (fp8 || problem.backend == "sm90" ? "9.0" : "8.0 or later") +
                                 ", this GPU has " + std::to_string(device.arch / 10) + "." + std::to_string(device.arch % 10));
  const bool kernel_dtype = fp8 || problem.dtype == ScalarType::kFloat16 || problem.dtype == ScalarType::kBFloat16;
  against(!kernel_dtype, std::string("no compiled kernel takes ") + dtype_name(problem.dtype));
  const int step = fp8 ? 16 : 8;
  against(head_dim % step != 0 || head_dim_v % step != 0,
          "head dims must be multiples of " + std::to_string(step) + ", got " + std::to_string(head_dim) + " and " +
              std::to_string(head_dim_v));
  against(problem.block_scales && problem.leftpad, "no kernel has scales of 64 rows of a cache with leftpad_k");
  against(problem.rotary_dim % 16 != 0, "rotary_dim must be a multiple of 16, got " + std::to_string(problem.rotary_dim));
  if (kernel_dtype) {
    for (const auto& [name, cache] : {std::pair{"k_cache", &problem.k_cache}, std::pair{"v_cache", &problem.v_cache}}) {
      const char* reason = why_copied(*cache, problem.dtype);  // a cache is never copied
      against(reason != nullptr, std::string(name) + ": " + (reason == nullptr ? "" : reason));
    }
  }
  if (is_latent(problem)) {
    against(runs && !allows(problem, device, 90), "head dims above 256 need compute capability 9.0");
    against(!problem.shared_values,
            "head dims above 256 need a v_cache that is k_cache[..., :head_dim_v], not memory of its own");
    against(problem.modified_score, "no kernel takes softcap or alibi_slopes with head dims above 256");
  }
  if (!plan.reasons.empty()) return plan;

  for (int group : kGroups) {
    if (plan.variant == nullptr && allows(problem, device, group)) plan.variant = find_row(problem, group);
  }
  const bool has_steps = plan_kvcache_step(Op::k_append_kv, problem.dtype, head_dim_v, device) != nullptr &&
                         plan_kvcache_step(Op::k_combine, problem.out_dtype, head_dim_v, device) != nullptr;
  against(plan.variant == nullptr || !has_steps, "this build has no kernel for such a cache with head dims " +
                                                     std::to_string(head_dim) + " and " + std::to_string(head_dim_v));
  if (plan.variant != nullptr) {
    plan.backend = name_of(plan.variant->arch);
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
    plan.grid = resident_ctas(*plan.variant, device);
    const SplitProblem split{.batch = static_cast<int>(problem.batch()),
                             .items_per_part = static_cast<int>(plan.items_per_part),
                             .num_ctas = static_cast<int>(plan.grid),
                             .num_splits = static_cast<int>(problem.num_splits),
                             .block_n = plan.variant->block_n,
                             .seqlen_q = static_cast<int>(problem.seqlen_q()),
                             .window_left = static_cast<int>(problem.window_left)};
    // Beyond so many rounds of items, parts would gain less than their combination costs, even where lengths differ.
    const int64_t rounds = max_rounds(split) == kManyRounds ? kManyRounds : 4;
    const bool splits = problem.num_splits > 1 || (problem.num_splits == 0 && items < rounds * plan.grid);
    if (splits && tiles > 1) {
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
