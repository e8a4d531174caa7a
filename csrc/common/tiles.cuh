// Tiles policy: which tiles of keys a tile of queries visits (forward) and the reverse (backward), and which of them need
// the mask. Skipped tiles are not in the list. Tiles that need the mask stand at the ends, so that a kernel runs three
// loops, masked, unmasked, masked, whatever the mask.
#pragma once

#include "common/block_list.cuh"
#include "common/masks.cuh"
#include "common/math.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

// Tiles of keys, visited from right to left.
struct KeyTiles {
  int end;         // one beyond the rightmost tile
  int num_tiles;
  int num_masked;  // the first tiles visited need the mask,
  int full_end;    // those before this one in the order of visits need none, the others need it again

  // The i-th tile visited.
  FX_HOST_DEVICE constexpr int n_block(int i) const { return end - 1 - i; }
};

// Tiles of queries [begin, end); those in [full_begin, full_end) need no mask.
struct QueryTiles {
  int begin;
  int end;
  int full_begin;
  int full_end;
};

// The tiles of a mask that shows intervals.
template <class Mask>
struct RangeTiles {
  static constexpr bool kListed = false;
  // Whether a tile of queries can have more than one masked tile of keys at the right, and any at the left.
  static constexpr bool kManyMasked = Mask::kEndMoves;
  static constexpr bool kMaskedLeft = Mask::kBeginMoves;

  // For query positions [first_row, last_row], both in the sequence.
  template <int kBlockN>
  FX_HOST_DEVICE static constexpr KeyTiles key_tiles(const Mask& mask, const Sequence& sequence, int first_row,
                                                     int last_row) {
    const int first_key = mask.visible_begin(first_row, sequence), keys_end = mask.visible_end(last_row, sequence);
    if (first_key >= keys_end) return {0, 0, 0, 0};
    const int begin = first_key / kBlockN, end = ceil_div(keys_end, kBlockN);
    const int num_tiles = end - begin;
    const int num_masked = clamp(end - mask.visible_end(first_row, sequence) / kBlockN, 0, num_tiles);
    const int left_masked = ceil_div(mask.visible_begin(last_row, sequence), kBlockN) - begin;
    return {end, num_tiles, num_masked, clamp(num_tiles - left_masked, num_masked, num_tiles)};
  }

  // For the tile n_block of keys, which begins within the sequence.
  template <int kBlockM, int kBlockN>
  FX_HOST_DEVICE static constexpr QueryTiles query_tiles(const Mask& mask, const Sequence& sequence, int n_block) {
    const int first_key = n_block * kBlockN;
    const bool whole = sequence.k.num_rows - first_key >= kBlockN;
    const int last_key = whole ? first_key + kBlockN - 1 : sequence.k.num_rows - 1;
    const int first_row = mask.rows_begin(first_key, sequence), rows_end = mask.rows_end(last_key, sequence);
    if (first_row >= rows_end) return {0, 0, 0, 0};
    const int begin = first_row / kBlockM, end = ceil_div(rows_end, kBlockM);
    // Full: every row of the tile sees the first and the last key; rows beyond the sequence do not count.
    const int full_rows_end = mask.rows_end(first_key, sequence);
    const int full_begin = whole ? min_of(end, ceil_div(mask.rows_begin(last_key, sequence), kBlockM)) : end;
    const int full_end = full_rows_end == sequence.q.num_rows ? end : full_rows_end / kBlockM;
    return {begin, end, full_begin, max_of(full_begin, full_end)};
  }
};

template <class Mask>
struct TilesOf {
  using Type = RangeTiles<Mask>;
};
template <>
struct TilesOf<BlockMask> {
  using Type = ListTiles;
};

}  // namespace flash_ext
