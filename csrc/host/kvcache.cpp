// Op body of kvcache: append_kv -> forward over the cache -> combine, or the reference with the reasons why.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "host/check.h"
#include "host/emulator.h"
#include "host/kvcache.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan_kvcache.h"

namespace flash_ext {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

CacheProblem problem_of(const CacheTensors& cache, const Tensor& q, const std::optional<Tensor>& k,
                        const std::optional<Tensor>& rotary_cos, bool causal, int64_t window_left, int64_t window_right,
                        bool modified_score, double softmax_scale, int64_t num_splits, const std::string& backend) {
  CacheProblem problem{.dtype = scalar_type_of(q),
                       .q = layout_of(q),
                       .k_cache = layout_of(cache.k_cache),
                       .v_cache = layout_of(cache.v_cache),
                       .paged = cache.page_table.has_value(),
                       .leftpad = cache.leftpad_k.has_value(),
                       .appends = k.has_value(),
                       .shared_values = shares_rows(cache.k_cache, cache.v_cache),
                       .capacity = cache.k_cache.size(1) * (cache.page_table ? cache.page_table->size(1) : 1),
                       .rotary_dim = rotary_cos ? 2 * rotary_cos->size(1) : 0,
                       .window_left = window_left,
                       .window_right = causal ? 0 : window_right,
                       .modified_score = modified_score,
                       .softmax_scale = softmax_scale,
                       .num_splits = num_splits,
                       .backend = backend};
  return problem;
}

cudaError_t launch(const Variant& variant, const FwdFp8CacheParams& params, cudaStream_t stream) {
  switch (variant.op) {
    case Op::k_fwd_fp8_cache: return find_fwd_fp8_cache(variant.name)(params, stream);
    case Op::k_fwd_fp8_cache_gather: return find_fwd_fp8_cache_gather(variant.name)(params, stream);
    case Op::k_fwd_cache_gather: return find_fwd_cache_gather(variant.name)(params, stream);
    case Op::k_fwd_mla: return find_fwd_mla(variant.name)(params, stream);
    case Op::k_fwd_mla_gather: return find_fwd_mla_gather(variant.name)(params, stream);
    default: return find_fwd_cache(variant.name)(params, stream);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> attend_to_cache(FX_CACHE_PARAMETERS, const CacheFp8* fp8, bool validate,
                                           const std::optional<std::string>& backend) {
  normalise_indices(&cache_seqlens, &cache_batch_idx, &leftpad_k, &page_table);
  const CacheTensors cache{k_cache, v_cache, cache_seqlens, cache_batch_idx, leftpad_k, page_table};
  check_cache(cache, q);
  const DeviceInfo& device = device_info_of(q);
  const std::string asked = backend.value_or("");
  CacheProblem problem = problem_of(cache, q, k, rotary_cos, causal, window_left, window_right,
                                    softcap > 0 || alibi_slopes.has_value(), softmax_scale, num_splits, asked);
  using TorchType = torch::headeronly::ScalarType;
  const TorchType out_dtype = fp8 != nullptr ? fp8->out_dtype : q.scalar_type();
  if (fp8 != nullptr) {
    problem.out_dtype = out_dtype == TorchType::Half ? ScalarType::kFloat16 : ScalarType::kBFloat16;
    problem.block_scales = has_block_scales(*fp8);
  }
  const CachePlan plan = plan_kvcache(problem, device);
  if (plan.variant == nullptr || (!asked.empty() && asked != plan.backend)) {
    FX_CHECK(asked.empty() || asked == "reference", "attention_with_kvcache: backend '", asked, "' cannot run this call; ",
             plan.reasons_as_text());
    // Asked for by name, the reference is no fallback and gives no warning.
    const std::string reason = asked.empty() ? plan.reasons_as_text() : "";
    std::vector<StableIValue> stack{
        from(q),           from(k_cache),    from(v_cache),    from(k),
        from(v),           from(cache_seqlens), from(cache_batch_idx), from(leftpad_k),
        from(page_table),  from(rotary_cos), from(rotary_sin), from(rotary_interleaved),
        from(sinks),       from(alibi_slopes), from(softmax_scale), from(causal),
        from(window_left), from(window_right), from(softcap)};
    if (fp8 != nullptr) {
      for (const StableIValue value : {from(fp8->q_descale), from(fp8->k_descale), from(fp8->v_descale), from(out_dtype)}) {
        stack.push_back(value);
      }
    }
    stack.push_back(from(validate));
    stack.push_back(from(reason));
    call_op(fp8 != nullptr ? "flash_ext::reference_kvcache_fp8" : "flash_ext::reference_kvcache", stack.data());
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const bool positions_move = causal || window_left >= 0 || window_right >= 0;
  if (validate) {
    std::vector<StableIValue> stack{from(q),         from(k_cache),    from(k),          from(cache_seqlens), from(cache_batch_idx),
                                    from(leftpad_k), from(page_table), from(rotary_cos), from(positions_move)};
    call_op("flash_ext::check_kvcache", stack.data());
  }

  const int64_t batch = q.size(0), seqlen_q = q.size(1), num_heads = q.size(2), head_dim_v = v_cache.size(3);
  const int64_t out_sizes[] = {batch, seqlen_q, num_heads, head_dim_v};
  Tensor out = torch::stable::new_empty(q, out_sizes, out_dtype), lse = new_float32(q, {batch, num_heads, seqlen_q});
  Tensor q_rows = with_aligned_rows(q), lengths = cache_seqlens, part_begin = cache_seqlens;
  if (batch == 0) return {out, lse};
  if (plan.prepares) {
    std::vector<int64_t> split;
    if (plan.max_parts > 0) {
      split = {plan.items_per_part, plan.grid, num_splits, plan.variant->block_n, problem.window_left};
    }
    auto [rotated, after, parts] =
        append_kv(q_rows, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, leftpad_k, page_table, rotary_cos, rotary_sin,
                  rotary_interleaved, positions_move, split);
    if (rotary_cos) q_rows = rotated;
    lengths = after, part_begin = parts;
  }
  if (out.numel() == 0) return {out, lse};

  const bool parts = plan.max_parts > 0;
  Tensor out_partial = new_float32(q, {plan.max_parts, num_heads, seqlen_q, head_dim_v});
  Tensor lse_partial = new_float32(q, {plan.max_parts, num_heads, seqlen_q});
  {
    OpMemory memory;
    memory.add(q_rows, MemoryRole::kIn, "q");
    memory.add(k_cache, MemoryRole::kIn, "k_cache");
    if (!problem.shared_values) memory.add(v_cache, MemoryRole::kIn, "v_cache");
    memory.add(lengths, MemoryRole::kIn, "lengths");
    if (parts) memory.add(part_begin, MemoryRole::kIn, "part_begin");
    if (cache_batch_idx) memory.add(*cache_batch_idx, MemoryRole::kIn, "cache_batch_idx");
    if (leftpad_k) memory.add(*leftpad_k, MemoryRole::kIn, "leftpad_k");
    if (page_table) memory.add(*page_table, MemoryRole::kIn, "page_table");
    if (sinks) memory.add(*sinks, MemoryRole::kIn, "sinks");
    if (alibi_slopes) memory.add(*alibi_slopes, MemoryRole::kIn, "alibi_slopes");
    memory.add(parts ? out_partial : out, MemoryRole::kOut, "out");
    memory.add(parts ? lse_partial : lse, MemoryRole::kOut, "lse");

    FwdFp8CacheParams params{};
    params.q = q_rows.data_ptr(), params.k = k_cache.data_ptr(), params.v = v_cache.data_ptr();
    params.q_strides = row_strides_of(q_rows);
    params.k_strides = row_strides_of(k_cache), params.v_strides = row_strides_of(v_cache);
    params.batch = static_cast<int>(batch);
    params.num_heads = static_cast<int>(num_heads);
    params.num_heads_kv = static_cast<int>(k_cache.size(2));
    params.head_dim = static_cast<int>(q.size(3));
    params.head_dim_v = static_cast<int>(head_dim_v);
    params.places = places_of(cache);
    params.seqlens_q.num_rows = static_cast<int>(seqlen_q);
    params.seqlens_k = {.cu_seqlens = nullptr,
                        .seqused = static_cast<const int*>(lengths.data_ptr()),
                        .leftpad = leftpad_k ? static_cast<const int*>(leftpad_k->data_ptr()) : nullptr,
                        .num_rows = params.places.num_blocks > 0 ? params.places.capacity : 0};
    const auto window = [](int64_t side) { return static_cast<int>(min_of<int64_t>(side, kMaxWindow)); };
    params.mask = {.window_left = window(problem.window_left), .window_right = window(problem.window_right)};
    params.score.softmax_scale = static_cast<float>(softmax_scale);
    params.score.softcap = static_cast<float>(softcap);
    if (alibi_slopes) {
      params.score.alibi_slopes = static_cast<const float*>(alibi_slopes->data_ptr());
      params.score.alibi_batch_stride = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
    }
    params.score = with_factors(params.score);
    params.sinks = sinks && !parts ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
    params.out = out.data_ptr(), params.lse = static_cast<float*>(lse.data_ptr());
    params.out_strides = row_strides_of(out);
    params.lse_strides = {.batch = num_heads * seqlen_q, .row = 1, .head = seqlen_q};
    params.num_splits = 1;
    params.heads_per_tile = plan.heads_per_tile;
    params.num_ctas = static_cast<int>(plan.grid);
    params.num_m_blocks = static_cast<int>(plan.num_m_blocks);
    params.items_per_part = static_cast<int>(plan.items_per_part);
    params.dependent = plan.prepares && plan.variant->arch == 90;
    if (parts) {
      params.part_begin = static_cast<const int*>(part_begin.data_ptr());
      params.out_partial = static_cast<float*>(out_partial.data_ptr());
      params.lse_partial = static_cast<float*>(lse_partial.data_ptr());
    }
    if (fp8 != nullptr) fill_scales(&params, *fp8, cache, q, &memory);
    const LaunchScope scope(q);
    FX_CUDA_CHECK(launch(*plan.variant, params, scope.stream()), plan.variant->name);
  }
  if (parts) combine(out_partial, lse_partial, part_begin, sinks, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> kvcache(FX_CACHE_PARAMETERS, bool validate, std::optional<std::string> backend) {
  return attend_to_cache(FX_CACHE_NAMES, nullptr, validate, backend);
}

}  // namespace flash_ext
