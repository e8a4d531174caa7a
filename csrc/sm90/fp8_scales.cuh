// Scales of the Hopper FP8 forward, and the items whose keys begin with a block of them. docs/fp8.md.
#pragma once

#include <type_traits>

#include "common/fp8_params.h"
#include "common/math.cuh"
#include "common/seqlens.cuh"
#include "common/work.cuh"
#include "sm90/items.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90::fp8 {

constexpr int kRowsPerScale = 64;
static_assert(kRowsPerScale == kRowsPerWarpgroup, "a warpgroup's queries share a scale");

// One scale for a head's keys and values, or one for every 64 of them.
struct HeadScales {
  static constexpr bool kPerBlock = false;
};
struct BlockScales {
  static constexpr bool kPerBlock = true;
};

// How many rows of its sequence lie before the item's queries, and before its keys: padding, and other parts of the keys.
__device__ __forceinline__ int rows_before(const SeqlenParams& seqlens, int sequence, int first_row) {
  return seqlens.cu_seqlens == nullptr ? first_row : first_row - clamp(seqlens.cu_seqlens[sequence], 0, seqlens.num_rows);
}

// Work policy, of rows with every mask and every score: tiles of keys begin with a block of scales even where padding or a part
// of the keys does not. Keys between the two are visited and hidden.
struct AlignedWork : ScheduledWork {
  template <int kBlockM>
  __device__ __forceinline__ static QueryTile query_tile(const FwdFp8Params& params, int index, int lane) {
    QueryTile queries = ScheduledWork::query_tile<kBlockM>(params, index, lane);
    const int hidden = hidden_keys(params, queries);
    RowRange& keys = queries.sequence.k;
    if (keys.num_rows > 0) {
      keys.first_row -= hidden;
      keys.num_rows += hidden;
      queries.sequence.diagonal += hidden;
    }
    return queries;
  }
  // How many keys of the first block are none of the item's: the same before and after the alignment.
  __device__ __forceinline__ static int hidden_keys(const FwdFp8Params& params, const QueryTile& queries) {
    if (params.k_descale.block_step == 0 && params.v_descale.block_step == 0) return 0;
    if (params.num_splits > 1) return params.split_boundaries[queries.part] % kRowsPerScale;
    return params.seqlens_k.leftpad != nullptr ? max_of(0, params.seqlens_k.leftpad[queries.index]) % kRowsPerScale : 0;
  }
};

// The scales of one head of a sequence. Work: the items' keys, which AlignedWork alone lets begin behind padding.
template <class Scales, class Work = ScheduledWork>
struct SequenceScale {
  static constexpr bool kBlocks = Scales::kPerBlock;  // there may be one for each 64 rows
  const float* first;  // null: 1
  int last;            // block of 64 rows that exists
  int step;

  // Of a head of q; blocks count from the sequence's first row, padding included.
  __device__ __forceinline__ SequenceScale(const Descale& descale, const SeqlenParams& seqlens, const QueryTile& queries,
                                           int head, int padding)
      : SequenceScale(descale, seqlens, queries.index, head, padding + queries.sequence.q.num_rows, 0) {}
  // Of the tile's head of k or v, whose rows begin with a block where there is more than one.
  __device__ __forceinline__ SequenceScale(const Descale& descale, const FwdParams& params, const QueryTile& queries)
      : SequenceScale(descale, params.seqlens_k, queries.index, queries.head_kv, queries.sequence.k.num_rows,
                      first_block(params, queries)) {}

  __device__ __forceinline__ float at(int block) const {
    return first == nullptr ? 1.f : __ldg(first + (kBlocks ? min_of(block, last) * step : 0));
  }

 private:
  __device__ __forceinline__ static int first_block(const FwdParams& params, const QueryTile& queries) {
    if (params.num_splits > 1) return params.split_boundaries[queries.part] / kRowsPerScale;
    if (!std::is_same_v<Work, AlignedWork> || params.seqlens_k.leftpad == nullptr) return 0;
    return rows_before(params.seqlens_k, queries.index, queries.sequence.k.first_row) / kRowsPerScale;
  }
  __device__ __forceinline__ SequenceScale(const Descale& descale, const SeqlenParams& seqlens, int sequence, int head,
                                           int num_rows, int first_block)
      : first(descale.data), last(max_of(0, num_rows - 1) / kRowsPerScale), step(kBlocks ? descale.block_step : 0) {
    if (first == nullptr) return;
    // Blocks of packed sequences stand on their line of slots.
    const bool on_slots = step != 0 && seqlens.cu_seqlens != nullptr;
    first += (on_slots ? first_slot(seqlens, sequence, kRowsPerScale) : sequence * descale.batch_stride) +
             head / descale.heads_per_scale * descale.head_stride + first_block * step;
  }
};

}  // namespace flash_ext::sm90::fp8
