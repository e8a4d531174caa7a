// The structs of the cache's kernels that cross from host to device.
#pragma once

#include "common/kv.cuh"
#include "common/params.h"
#include "common/splits.cuh"

namespace flash_ext {

// Strides are in elements, multiples of 8; the innermost dimension is contiguous; bases are 16-byte aligned.
struct AppendKvParams {
  const void* q;  // (batch, seqlen_q, num_heads, head_dim) bf16 or fp16; used where it is rotated
  void* q_out;    // the same shape, contiguous; null: q is not rotated
  const void* k;  // (batch, seqlen_new, num_heads_kv, head_dim); null: nothing is appended
  const void* v;  // (batch, seqlen_new, num_heads_kv, head_dim_v); null: v_cache is the first columns of k_cache
  void* k_cache;  // (blocks, rows, num_heads_kv, head_dim)
  void* v_cache;  // (blocks, rows, num_heads_kv, head_dim_v)
  RowStrides q_strides, k_strides, v_strides, k_cache_strides, v_cache_strides;
  const int* cache_seqlens;  // (batch) int32, before the new rows
  const int* leftpad;        // (batch) int32, or null
  const void* rotary_cos;    // (num_positions, rotary_dim / 2) contiguous, or null: no rotation
  const void* rotary_sin;    // the same
  int rotary_is_float;       // tables are float32, else of q's dtype
  int rotary_interleaved;
  int rotary_dim;            // a multiple of 16
  int num_positions;
  int q_positions_move;      // row i of q stands at cache_seqlens + i, else every row at cache_seqlens
  KvPlaces places;
  int batch, seqlen_q, seqlen_new, num_heads, num_heads_kv, head_dim, head_dim_v;
  int k_first_column;  // of k's rows, the columns before it are v's: the caches share them
  int* lengths;     // (batch) int32, out: rows of each sequence after the call
  int* part_begin;  // (batch + 1) int32, out: the first part of each sequence's keys, numbered over the batch; or null
  SplitProblem split;
  // The launcher fills these in: the pieces of 16 bytes of k, v and q, and the CTAs that move them.
  int num_pieces[3];
  int first_cta[4];
  Divisor by_pieces[3], by_heads[3], by_rows[3];
};

// The forward over a cache. Of FwdParams: k, v and their strides are the caches' (blocks, rows, num_heads_kv, head_dim);
// seqlens_k counts rows of a sequence, not of a block; num_splits is 1, the schedule is unused.
struct FwdCacheParams : FwdParams {
  KvPlaces places;
  const int* part_begin;  // (batch + 1) int32, see AppendKvParams; null: every sequence is one part
  float* out_partial;     // (parts, num_heads, seqlen_q, head_dim_v) contiguous, where part_begin is given
  float* lse_partial;     // (parts, num_heads, seqlen_q)
  int num_m_blocks;       // tiles of queries of one head, or of heads that share a tile
  int items_per_part;     // num_m_blocks for every such head
  int dependent;          // launched behind append_kv as dependent_launch.cuh says; 9.0 alone
  Divisor by_items, by_m_blocks;
};

struct CombineParams {
  const float* out_partial;  // (parts, num_heads, seqlen_q, head_dim_v) contiguous, 16-byte aligned
  const float* lse_partial;  // (parts, num_heads, seqlen_q), natural log; -inf: nothing seen, its out_partial is not read
  const int* part_begin;     // (batch + 1) int32: sequence b owns parts [part_begin[b], part_begin[b + 1])
  const float* sinks;        // (num_heads), or null
  void* out;                 // (batch, seqlen_q, num_heads, head_dim_v) bf16 or fp16, rows 16-byte aligned
  float* lse;                // (batch, num_heads, seqlen_q) contiguous
  RowStrides out_strides;
  int batch, num_heads, seqlen_q, head_dim_v;
  int max_parts;  // of out_partial: no index goes beyond
  int dependent;  // launched behind the forward as dependent_launch.cuh says; rows of 9.0 alone
  Divisor by_rows, by_seqlen_q;  // the launcher fills these in: rows of a sequence, rows of a head
};

}  // namespace flash_ext
