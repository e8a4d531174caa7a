// The structs that cross from host to device. Plain numbers and pointers; every pointer states its shape and dtype.
// Strides are in elements; the innermost dimension is contiguous unless a comment says otherwise.
#pragma once

#include <cstdint>

#include "common/block_list.cuh"
#include "common/masks.cuh"
#include "common/scheduler.cuh"
#include "common/scores.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

struct RowStrides {
  int64_t batch;
  int64_t row;
  int64_t head;
};

// The 128 bytes of a CUtensorMap, so that device code and tests need no driver header.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// A (batch, rows, heads, columns) tensor as TMA sees it, see host/tma.h. Expanded heads or batches (stride 0) have extent 1
// in the map and step 0: coordinates are index * step.
struct TmaTensor {
  TensorMap map;
  int head_step;
  int batch_step;
  int ragged_rows;  // rows of a copy that ends where a sequence ends, as if nothing came behind it; 0: where the tensor ends
};

constexpr int kMaxSplits = 64;
constexpr int kMaxHeadsPerTile = 64;  // divides the rows of every tile

// What forward and backward share.
struct AttentionParams {
  const void* q;  // (batch, seqlen_q, num_heads, head_dim) bf16 or fp16, packed (total_q, ...); base and strides 16-byte multiples
  const void* k;  // (batch, seqlen_k, num_heads_kv, head_dim) or packed, the same dtype
  const void* v;  // (batch, seqlen_k, num_heads_kv, head_dim_v) or packed, the same dtype
  RowStrides q_strides, k_strides, v_strides;  // batch: 0 when packed
  int batch;         // number of sequences
  int num_heads;
  int num_heads_kv;  // divides num_heads
  int head_dim;      // multiples of 8, at most what the variant covers
  int head_dim_v;    // the same
  SeqlenParams seqlens_q, seqlens_k;
  MaskParams mask;
  ScoreParams score;
  const float* sinks;  // (num_heads), natural-log units, or null
};

struct FwdParams : AttentionParams {
  void* out;         // (batch, seqlen_q, num_heads, head_dim_v) or packed, q's dtype; num_splits of them
  float* lse;        // (batch, num_heads, seqlen_q) or packed (num_heads, total_q), natural log; num_splits of them
  float* max_logit;  // (num_heads), holds -inf before the launch; or null
  RowStrides out_strides;
  RowStrides lse_strides;  // row: 1
  int64_t out_split_stride, lse_split_stride;
  int num_splits;                           // parts of the keys with results of their own; 1: the whole
  int split_boundaries[kMaxSplits + 1];     // part p: key positions [p, p + 1) of these; unused where num_splits is 1
  int heads_per_tile;                       // query heads of one KV head that share a tile's rows: a power of two, 1 to kMaxHeadsPerTile
  int num_ctas;                             // grid of a persistent kernel
  BlockListParams blocks;                   // of keys, for each block of queries; of kernels whose mask is lists
  // The kernel's launcher fills these in.
  TmaTensor q_tma, k_tma, v_tma;
  Schedule schedule;
};

// Rows that no sequence shows get a value: those of results that the kernels, going sequence by sequence, never write.
struct FillUnusedParams {
  struct Target {
    uint32_t* data;      // (batch, rows, heads, words) or packed (rows, heads, words), words of 32 bits contiguous
    RowStrides strides;  // in words; batch: 0 when packed
    int heads;
    int words;
    uint32_t value;
  };
  SeqlenParams seqlens;  // of the rows
  int batch;             // number of sequences
  int num_targets;
  Target targets[3];
};

// Row statistics of the backward and the float32 sum of dQ are padded, so that whole tiles of them move in bulk. A row is a
// position among a sequence's visible queries; packed sequences lie on a line of slots of this many rows (seqlens.cuh).
constexpr int kStatsRowAlignment = 128;

struct BwdParams : AttentionParams {
  const void* dout;       // (batch, seqlen_q, num_heads, head_dim_v) or packed, q's dtype; base and strides 16-byte multiples
  const float* lse_log2;  // (batch, num_heads, stats_rows) or packed (num_heads, stats_rows), from bwd_preprocess
  const float* delta;     // the same
  float* dq_blocks;       // (batch * num_heads, stats_rows / 64, columns / 64, 4096), summed up; null: dQ is not wanted. dq_blocks.cuh
  int* dq_turns;          // (batch * num_heads, stats_rows / 64, columns / 64), zero; null: dQ is summed in any order
  void* dk;               // (batch, seqlen_k, num_heads_kv, head_dim) or packed, q's dtype; null: not wanted
  void* dv;               // (batch, seqlen_k, num_heads_kv, head_dim_v) or packed, q's dtype; null: not wanted
  float* dk_bias;         // (batch, num_heads_kv, seqlen_k) or packed (num_heads_kv, total_k); null: not wanted
  RowStrides dout_strides, dk_strides, dv_strides, dk_bias_strides;  // of dk_bias: row 1
  int key_begin, key_end;  // key positions of each sequence that this launch is about
  int stats_rows;          // of a head, a multiple of kStatsRowAlignment
  int num_ctas;            // grid of a persistent kernel
  BlockListParams blocks;  // of queries, for each block of keys; of kernels whose mask is lists
  // The kernel's launcher fills these in.
  TmaTensor q_tma, k_tma, v_tma, dout_tma;
  Schedule schedule;
};

struct BwdPreprocessParams {
  const void* out;     // (batch, seqlen_q, num_heads, head_dim_v) or packed, bf16 or fp16, 16-byte aligned rows
  const void* dout;    // the same
  const float* lse;    // (batch, num_heads, seqlen_q) or packed (num_heads, total_q), natural log
  const float* dlse;   // the same, or null: no gradient flows into lse
  float* delta;        // (batch, num_heads, stats_rows) or packed (num_heads, stats_rows)
  float* lse_log2;     // the same
  RowStrides out_strides, dout_strides, lse_strides, dlse_strides;  // batch: 0 when packed
  SeqlenParams seqlens_q;
  int batch;           // number of sequences
  int num_heads;
  int stats_rows;      // of a head, a multiple of kStatsRowAlignment
  int head_dim_v;      // a multiple of 8
};

struct BwdPostprocessParams {
  const float* dq_blocks;  // as in BwdParams
  void* dq;                // (batch, seqlen_q, num_heads, head_dim) or packed, bf16 or fp16
  RowStrides dq_strides;   // batch: 0 when packed
  SeqlenParams seqlens_q;
  float softmax_scale;     // the factor of the sums
  int batch;
  int num_heads;
  int head_dim;            // a multiple of 8
  int column_blocks;       // of dq_blocks; those beyond head_dim are not read
  int stats_rows;          // of a head
};

struct BwdSinksParams {
  const float* lse_log2;  // as in BwdParams
  const float* delta;
  const float* sinks;     // (num_heads), natural-log units
  float* dsinks;          // (num_heads)
  int num_entries;        // batch; 1 when packed
  int num_heads;
  int stats_rows;         // of a head
};

struct MaskBlocksParams {
  const uint8_t* mask;  // (num_masks, seqlen_q, seqlen_k) contiguous, a byte for each score, 0: hidden
  uint8_t* kinds;       // (num_masks, blocks of queries, blocks of keys), a BlockKind each
  uint32_t* bits;       // (num_masks, blocks of queries, blocks of keys, 2, kMaskBlock, kMaskWords); written for partial blocks
  int64_t num_masks;
  int seqlen_q;
  int seqlen_k;
};

}  // namespace flash_ext
