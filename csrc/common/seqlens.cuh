// Which rows of a tensor a sequence owns, and how the query and key positions of one sequence relate. Numbers alone decide
// between dense batches and packed sequences, once for each tile, so that every kernel takes both.
#pragma once

#include "common/math.cuh"

namespace flash_ext {

// How sequences lie in a tensor's rows. All pointers null: (batch, seqlen, ...) tensors whose entries have full length.
// What stands in device memory is not trusted: rows outside the tensor are never named.
struct SeqlenParams {
  const int* cu_seqlens;  // (batch + 1) int32: sequence b owns rows [cu_seqlens[b], cu_seqlens[b + 1]); null: batch entry b
  const int* seqused;     // (batch) int32: how many of its rows count, from the first it owns; null: all
  const int* leftpad;     // (batch) int32: how many of its first rows do not count; null: none
  int num_rows;           // of a batch entry, or of the packed tensor
};

// Rows [first_row, first_row + num_rows) of the tensor's seqlen dimension, in its batch entry `batch`.
struct RowRange {
  int first_row;
  int num_rows;
  int batch;
};

FX_HOST_DEVICE constexpr int clamp(int x, int low, int high) { return max_of(low, min_of(x, high)); }

FX_HOST_DEVICE constexpr RowRange rows_of_sequence(const SeqlenParams& params, int index) {
  int first = 0, last = params.num_rows;
  if (params.cu_seqlens != nullptr) {
    first = clamp(params.cu_seqlens[index], 0, params.num_rows);
    last = clamp(params.cu_seqlens[index + 1], first, params.num_rows);
  }
  const int owned = last - first;
  const int used = params.seqused != nullptr ? clamp(params.seqused[index], 0, owned) : owned;
  const int skipped = params.leftpad != nullptr ? clamp(params.leftpad[index], 0, owned) : 0;
  return {first + skipped, max_of(0, used - skipped), params.cu_seqlens != nullptr ? 0 : index};
}

// One sequence, or one part of its keys. Positions count from the ranges' first rows.
struct Sequence {
  RowRange q;
  RowRange k;
  int diagonal;  // query position i stands at key position i + diagonal: num_rows of k - of q, aligned to the bottom right
};

FX_HOST_DEVICE constexpr Sequence sequence_of(const SeqlenParams& seqlens_q, const SeqlenParams& seqlens_k, int index) {
  const RowRange q = rows_of_sequence(seqlens_q, index), k = rows_of_sequence(seqlens_k, index);
  return {q, k, k.num_rows - q.num_rows};
}

// The sequence with only the keys of positions [begin, end), which keep their places relative to the queries.
FX_HOST_DEVICE constexpr Sequence with_keys_between(const Sequence& sequence, int begin, int end) {
  const int first = clamp(begin, 0, sequence.k.num_rows), last = clamp(end, first, sequence.k.num_rows);
  return {sequence.q, {sequence.k.first_row + first, last - first, sequence.k.batch}, sequence.diagonal - first};
}

// Packed sequences on one line of slots of `block` rows, found without knowing their lengths on the host: sequence b
// begins at slot cu_seqlens[b] / block + b, which leaves room for its ceil(length / block) blocks before the next one.
// Slots beyond a sequence's last block stay empty. Row statistics and accumulators use the same line, so that each
// sequence begins at a multiple of the block.
FX_HOST_DEVICE constexpr int num_slots(int total_rows, int batch, int block) { return total_rows / block + batch; }

FX_HOST_DEVICE constexpr int first_slot(const SeqlenParams& params, int index, int block) {
  return clamp(params.cu_seqlens[index], 0, params.num_rows) / block + index;
}

struct SequenceBlock {
  int index;  // of the sequence
  int block;  // within it; may lie beyond its last row
};

// By bisection: log2(batch) dependent loads.
FX_HOST_DEVICE constexpr SequenceBlock block_at_slot(const SeqlenParams& params, int batch, int block, int slot) {
  int low = 0, high = batch;  // first_slot(low) <= slot < first_slot(high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (first_slot(params, middle, block) <= slot ? low : high) = middle;
  }
  return {low, slot - first_slot(params, low, block)};
}

#ifdef __CUDACC__
// The same by a whole warp, which must have converged: 32 probes at a time, one round of loads for up to 33 sequences. From
// garbage each warp that asks draws the same conclusion, so that roles of a CTA never disagree.
__device__ __forceinline__ SequenceBlock warp_block_at_slot(const SeqlenParams& params, int batch, int block, int slot,
                                                            int lane) {
  int low = 0, high = batch;
  while (high - low > 1) {
    const int stride = ceil_div(high - low - 1, 32);
    const int probe = low + (lane + 1) * stride;
    const bool at_or_after = probe < high && first_slot(params, probe, block) <= slot;
    const int count = __popc(__ballot_sync(0xffffffffu, at_or_after));
    low += count * stride;
    high = min_of(high, low + stride);
  }
  return {low, slot - first_slot(params, low, block)};
}
#endif

}  // namespace flash_ext
