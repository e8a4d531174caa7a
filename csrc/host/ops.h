// The op bodies. Schemas, shapes and errors: flash_ext/ops.py, kvcache.py, quantize.py, fp8.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace flash_ext {

using torch::stable::Tensor;

// The arguments of every attention op from cu_seqlens_q to split_boundaries, and the names in the same order.
#define FX_INPUT_PARAMETERS                                                                                                \
  std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seqused_q,                 \
      std::optional<Tensor> seqused_k, std::optional<Tensor> leftpad_q, std::optional<Tensor> leftpad_k,                   \
      std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes, std::optional<Tensor> k_bias, double softmax_scale, \
      bool causal, int64_t window_left, int64_t window_right, double softcap, std::vector<int64_t> split_boundaries
#define FX_INPUT_NAMES                                                                                            \
  cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_q, leftpad_k, sinks, alibi_slopes, k_bias, softmax_scale, \
      causal, window_left, window_right, softcap, split_boundaries

// out, lse, max_logit
std::tuple<Tensor, Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, FX_INPUT_PARAMETERS, bool return_max_logit,
                                       bool deterministic, std::optional<std::string> backend);

// dq, dk, dv, dsinks, dk_bias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q,
                                                       Tensor k, Tensor v, Tensor out, Tensor lse, FX_INPUT_PARAMETERS,
                                                       bool deterministic, int64_t wanted, std::optional<std::string> backend);

// out, lse, max_logit; flash_ext/fp8.py
std::tuple<Tensor, Tensor, Tensor> fwd_fp8(Tensor q, Tensor k, Tensor v, FX_INPUT_PARAMETERS, std::optional<Tensor> q_descale,
                                           std::optional<Tensor> k_descale, std::optional<Tensor> v_descale,
                                           torch::headeronly::ScalarType out_dtype, int64_t flush_every, bool return_max_logit,
                                           std::optional<std::string> backend);

std::tuple<Tensor, Tensor> quantize_fp8(Tensor x, std::string scale, bool hadamard, std::optional<Tensor> cu_seqlens);

std::tuple<Tensor, Tensor> bwd_preprocess(Tensor out, Tensor dout, Tensor lse, std::optional<Tensor> dlse);

std::tuple<Tensor, Tensor> mask_blocks(Tensor mask);

// The arguments of the ops with a BlockMask from row_offsets to softcap, and the names in the same order.
#define FX_BLOCK_MASK_PARAMETERS                                                                                           \
  Tensor row_offsets, Tensor row_partial, Tensor row_entries, Tensor column_offsets, Tensor column_partial,               \
      Tensor column_entries, Tensor bits, Tensor turns, Tensor row_order, Tensor column_order, std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,                \
      std::optional<Tensor> k_bias, double softmax_scale, double softcap
#define FX_BLOCK_MASK_NAMES                                                                                               \
  row_offsets, row_partial, row_entries, column_offsets, column_partial, column_entries, bits, turns, row_order, column_order, sinks, alibi_slopes, k_bias, \
      softmax_scale, softcap

// out, lse, max_logit
std::tuple<Tensor, Tensor, Tensor> fwd_block_mask(Tensor q, Tensor k, Tensor v, FX_BLOCK_MASK_PARAMETERS,
                                                  bool return_max_logit, bool deterministic,
                                                  std::optional<std::string> backend);

#define FX_GROUPED_PARAMETERS                                                                                              \
  Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor groups_q, Tensor groups_k, Tensor keys_of, Tensor queries_of,           \
      std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes, std::optional<Tensor> k_bias, double softmax_scale, \
      bool causal, double softcap

std::tuple<Tensor, Tensor, Tensor> fwd_jagged(Tensor q, Tensor k, Tensor v, FX_GROUPED_PARAMETERS, bool return_max_logit,
                                              bool deterministic, std::optional<std::string> backend);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd_jagged(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q,
                                                              Tensor k, Tensor v, Tensor out, Tensor lse, FX_GROUPED_PARAMETERS,
                                                              bool deterministic, int64_t wanted,
                                                              std::optional<std::string> backend);

// dq, dk, dv, dsinks, dk_bias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd_block_mask(std::optional<Tensor> dout, std::optional<Tensor> dlse,
                                                                  Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                                  FX_BLOCK_MASK_PARAMETERS, bool deterministic,
                                                                  int64_t wanted, std::optional<std::string> backend);

// The arguments of attention over a KV cache from q to num_splits, and the names in the same order.
#define FX_CACHE_PARAMETERS                                                                                               \
  Tensor q, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k, std::optional<Tensor> v, Tensor cache_seqlens,       \
      std::optional<Tensor> cache_batch_idx, std::optional<Tensor> leftpad_k, std::optional<Tensor> page_table,           \
      std::optional<Tensor> rotary_cos, std::optional<Tensor> rotary_sin, bool rotary_interleaved,                        \
      std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes, double softmax_scale, bool causal,                 \
      int64_t window_left, int64_t window_right, double softcap, int64_t num_splits
#define FX_CACHE_NAMES                                                                                             \
  q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, leftpad_k, page_table, rotary_cos, rotary_sin,        \
      rotary_interleaved, sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap, num_splits

// out, lse
std::tuple<Tensor, Tensor> kvcache(FX_CACHE_PARAMETERS, bool validate, std::optional<std::string> backend);

// The same of e4m3 tensors; flash_ext/kvcache_fp8.py
std::tuple<Tensor, Tensor> kvcache_fp8(FX_CACHE_PARAMETERS, std::optional<Tensor> q_descale, std::optional<Tensor> k_descale,
                                       std::optional<Tensor> v_descale, torch::headeronly::ScalarType out_dtype, bool validate,
                                       std::optional<std::string> backend);

std::tuple<Tensor, Tensor, Tensor> append_kv(Tensor q, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k,
                                             std::optional<Tensor> v, Tensor cache_seqlens,
                                             std::optional<Tensor> cache_batch_idx, std::optional<Tensor> leftpad_k,
                                             std::optional<Tensor> page_table, std::optional<Tensor> rotary_cos,
                                             std::optional<Tensor> rotary_sin, bool rotary_interleaved, bool positions_move,
                                             std::vector<int64_t> split);

void combine(Tensor out_partial, Tensor lse_partial, Tensor part_begin, std::optional<Tensor> sinks, Tensor out, Tensor lse);

}  // namespace flash_ext
