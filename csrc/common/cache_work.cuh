// Policies of the forward over a KV cache, of every architecture: what an item is, and where its results go.
#pragma once

#include "common/fragment.cuh"
#include "common/kvcache_params.h"
#include "common/math.cuh"
#include "common/outputs.cuh"
#include "common/seqlens.cuh"
#include "common/splits.cuh"
#include "common/tiles.cuh"
#include "common/work.cuh"

namespace flash_ext {

// Work policy: item = (part * heads that have a tile + head) * tiles of queries + tile. Neighbouring CTAs read the rows of
// neighbouring heads, which lie together.
struct CacheWork {
  __device__ __forceinline__ static int num_items(const FwdCacheParams& params) {
    return (params.part_begin != nullptr ? params.part_begin[params.batch] : params.batch) * params.items_per_part;
  }

  // The sequence that owns a part: by a whole warp, 32 sequences at a time.
  __device__ __forceinline__ static int sequence_of_part(const FwdCacheParams& params, int part, int lane) {
    if (params.part_begin == nullptr) return part;
    for (int first = 0;; first += 32) {
      const int b = min_of(first + lane, params.batch - 1);
      const int before = __popc(__ballot_sync(0xffffffffu, first + lane < params.batch && params.part_begin[b + 1] <= part));
      if (before < 32) return min_of(first + before, params.batch - 1);
    }
  }

  template <int kBlockM>
  __device__ __forceinline__ static QueryTile query_tile(const FwdCacheParams& params, int index, int lane) {
    const int part = params.by_items.divide(index), within = index - part * params.items_per_part;
    const int head = params.by_m_blocks.divide(within), m_block = within - head * params.num_m_blocks;
    const int sequence = sequence_of_part(params, part, lane);
    // Of what a sequence's numbers may be, only these occur here: a dense batch of queries, used rows and padding of keys.
    const RowRange q{0, params.seqlens_q.num_rows, sequence};
    const SeqlenParams &of_k = params.seqlens_k, used{nullptr, of_k.seqused, of_k.leftpad, of_k.num_rows};
    RowRange k = rows_of_sequence(used, sequence);
    if (params.places.batch_index != nullptr) {
      k.batch = clamp(params.places.batch_index[sequence], 0, params.places.num_blocks - 1);
    }
    const int group = params.num_heads / params.num_heads_kv;
    const int log2_heads = log2_of(params.heads_per_tile);
    const int tiles_per_group = ceil_div(group, params.heads_per_tile), head_kv = head / tiles_per_group;
    return {{q, k, k.num_rows - q.num_rows},
            sequence,
            part,
            m_block * (kBlockM >> log2_heads),
            head_kv,
            (head - head_kv * tiles_per_group) << log2_heads,
            group,
            log2_heads};
  }

  __device__ __forceinline__ static KeyTiles part_of(const FwdCacheParams& params, const QueryTile& queries,
                                                     const KeyTiles& tiles) {
    if (params.part_begin == nullptr) return tiles;
    const int first = params.part_begin[queries.index];
    return tiles_of_part(tiles, params.part_begin[queries.index + 1] - first, queries.part - first);
  }
};

// Output policy: float32 parts, or what DenseOutput writes.
template <class Element>
struct CacheOutput {
  const FwdCacheParams& params;
  const QueryTile& tile;
  int first_row;     // of the warp, in the tile
  int first_column;  // of the accumulators, in a row

  __device__ __forceinline__ CacheOutput(const FwdCacheParams& params, const QueryTile& tile, int first_row,
                                         int first_column = 0)
      : params(params), tile(tile), first_row(first_row), first_column(first_column) {}

  __device__ __forceinline__ int64_t partial_row(int row) const {
    return (int64_t(tile.part) * params.num_heads + tile.head(row)) * params.seqlens_q.num_rows + tile.position(row);
  }

  template <int kNumAcc>
  __device__ __forceinline__ void store_rows(const float (&acc_o)[kNumAcc], uint32_t staging, int lane) {
    if (params.out_partial == nullptr) {
      DenseOutput<Element> dense(params, tile, first_row);
      dense.out += first_column;
      dense.num_columns -= first_column;
      dense.store_rows(acc_o, staging, lane);
      return;
    }
    // The four threads of a row write 32 bytes together: whole sectors without staging.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + acc_row(lane, half);
      if (!tile.holds(row)) continue;
      float* out = params.out_partial + partial_row(row) * params.head_dim_v + first_column + acc_first_col(lane);
#pragma unroll
      for (int i = 2 * half; i < kNumAcc; i += 4) {
        if (first_column + acc_col_offset(i) < params.head_dim_v) {
          asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(out + acc_col_offset(i)), "f"(acc_o[i]), "f"(acc_o[i + 1])
                       : "memory");
        }
      }
    }
    __syncwarp();  // the tile may lie in shared memory, where the next one is about to be put
  }

  __device__ __forceinline__ void store_lse(const float (&values)[2], int lane) {
    if (params.out_partial == nullptr) {
      DenseOutput<Element>(params, tile, first_row).store_lse(values, lane);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + acc_row(lane, half);
      if (lane % 4 == 0 && tile.holds(row)) params.lse_partial[partial_row(row)] = values[half];
    }
  }
};

}  // namespace flash_ext
