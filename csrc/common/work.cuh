// What a work item of the forward is: a tile of queries, and the keys they attend to. One function of the call's numbers,
// the item and the tile's rows, so that every role and every architecture agrees.
//
// A tile's rows are query positions of heads that share a KV head: row r is position r >> log2_heads of head
// r & (2^log2_heads - 1). With one head a tile these are rows of that head; otherwise ("packed GQA") a few positions of
// many heads fill a tile that would be mostly empty.
#pragma once

#include "common/math.cuh"
#include "common/params.h"
#include "common/scheduler.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

struct QueryTile {
  Sequence sequence;   // with the keys of the item's part alone
  int index;           // of the sequence in the batch
  int part;            // of the keys, with results of its own
  int first_position;  // of row 0
  int head_kv;
  int first_in_group;  // head of row 0 among those of head_kv
  int group;           // query heads of a KV head
  int log2_heads;

  FX_HOST_DEVICE constexpr int position(int row) const { return first_position + (row >> log2_heads); }
  FX_HOST_DEVICE constexpr int head_in_group(int row) const { return first_in_group + (row & ((1 << log2_heads) - 1)); }
  FX_HOST_DEVICE constexpr int head(int row) const { return head_kv * group + head_in_group(row); }
  // A head that exists, also for rows that stand for none.
  FX_HOST_DEVICE constexpr int existing_head(int row) const {
    return head_kv * group + min_of(head_in_group(row), group - 1);
  }
  // Whether the row stands for a query; others are computed along and dropped.
  FX_HOST_DEVICE constexpr bool holds(int row) const {
    return position(row) < sequence.q.num_rows && head_in_group(row) < group;
  }
  // Of a tile of this many rows, in the sequence.
  FX_HOST_DEVICE constexpr int last_position(int rows) const {
    return min_of(first_position + (rows >> log2_heads), sequence.q.num_rows) - 1;
  }
  // False for an item without work: no query of the sequence is in it.
  FX_HOST_DEVICE constexpr bool exists() const {
    return first_position >= 0 && first_position < sequence.q.num_rows;
  }
};

FX_HOST_DEVICE constexpr int log2_of(int power_of_two) {
  int exponent = 0;
  while (1 << exponent < power_of_two) ++exponent;
  return exponent;
}

// block: the item's place, m_block of entry item.batch in a dense batch, or what stands at the slot item.m_block.
FX_HOST_DEVICE constexpr QueryTile query_tile(const FwdParams& params, const WorkItem& item, const SequenceBlock& block,
                                              int block_m) {
  const int group = params.num_heads / params.num_heads_kv;
  const int tiles_per_group = ceil_div(group, params.heads_per_tile);
  const int log2_heads = log2_of(params.heads_per_tile);
  const int head_kv = item.head / tiles_per_group;
  Sequence sequence = sequence_of(params.seqlens_q, params.seqlens_k, block.index);
  int part = 0;
  if (params.num_splits > 1) {
    part = item.batch % params.num_splits;
    sequence = with_keys_between(sequence, params.split_boundaries[part], params.split_boundaries[part + 1]);
  }
  return {sequence, block.index, part, block.block * (block_m >> log2_heads), head_kv,
          (item.head - head_kv * tiles_per_group) << log2_heads, group, log2_heads};
}

// Where an item of a dense batch stands; parts of the keys are entries of the schedule's batch.
FX_HOST_DEVICE constexpr SequenceBlock dense_block(const FwdParams& params, const WorkItem& item) {
  return {params.num_splits > 1 ? item.batch / params.num_splits : item.batch, item.m_block};
}

// The schedule of a call with tiles of block_m rows. Every count is at least 1.
constexpr Schedule make_fwd_schedule(const FwdParams& params, int block_m) {
  const int positions = block_m / params.heads_per_tile;
  const bool packed = params.seqlens_q.cu_seqlens != nullptr;
  int num_m_blocks = packed ? num_slots(params.seqlens_q.num_rows, params.batch, positions)
                            : ceil_div(params.seqlens_q.num_rows, positions);
  if (params.blocks.order != nullptr) num_m_blocks = num_ordered_tiles(params.seqlens_q.num_rows, block_m);
  const int tiles_per_group = ceil_div(params.num_heads / params.num_heads_kv, params.heads_per_tile);
  // Packed sequences are taken to be alike: their lengths are not known here.
  const int64_t keys = packed ? ceil_div(params.seqlens_k.num_rows, params.batch) : params.seqlens_k.num_rows;
  return make_schedule(num_m_blocks, packed ? 1 : params.batch * params.num_splits, params.num_heads_kv * tiles_per_group,
                       params.num_heads_kv, keys / params.num_splits * (params.head_dim + params.head_dim_v) * 2);
}

// The item at a place of the schedule of a call with lists, see num_ordered_tiles.
template <int kBlockM>
FX_HOST_DEVICE constexpr WorkItem listed_item(const FwdParams& params, int index) {
  WorkItem item = params.schedule.item(index);
  item.m_block = ordered_tile<kBlockM>(params.blocks, params.schedule.num_m_blocks - 1 - item.m_block);
  return item;
}

#ifdef __CUDACC__
// By a whole warp, which must have converged.
template <int kBlockM>
__device__ __forceinline__ QueryTile warp_query_tile(const FwdParams& params, const WorkItem& item, int lane) {
  const SequenceBlock block = params.seqlens_q.cu_seqlens == nullptr
                                  ? dense_block(params, item)
                                  : warp_block_at_slot(params.seqlens_q, params.batch,
                                                       kBlockM >> log2_of(params.heads_per_tile), item.m_block, lane);
  return query_tile(params, item, block, kBlockM);
}
#endif

}  // namespace flash_ext
