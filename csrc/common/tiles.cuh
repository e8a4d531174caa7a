// Tiles policy: which tiles of keys a tile of queries visits, and which of them need the mask. Tiles that need it come
// first, so that a kernel runs two loops, masked then unmasked, whatever the mask. Skipped tiles are not in the list.
#pragma once

#include "common/math.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

// Tiles [0, num_tiles), visited from right to left.
struct TileRange {
  int num_tiles;
  int num_masked;

  // The i-th tile visited.
  FX_HOST_DEVICE constexpr int n_block(int i) const { return num_tiles - 1 - i; }
};

// The tiles of a mask that shows keys [0, end).

template <class Mask>
struct PrefixTiles {
  // Whether a tile of queries can have more than one masked tile of keys.
  static constexpr bool kManyMasked = Mask::kEndMoves;

  template <int kBlockM, int kBlockN>
  FX_HOST_DEVICE static constexpr TileRange tiles(const Sequence& sequence, int m_block) {
    const int first_row = m_block * kBlockM;
    const int last_row = min_of(kBlockM, sequence.seqlen_q - first_row) - 1 + first_row;
    const int some_row_ends = Mask::visible_end(last_row, sequence.seqlen_q, sequence.seqlen_k);
    const int every_row_ends = Mask::visible_end(first_row, sequence.seqlen_q, sequence.seqlen_k);
    // Rounded up without overflow.
    const int num_tiles = some_row_ends > 0 ? (some_row_ends - 1) / kBlockN + 1 : 0;
    return {num_tiles, num_tiles - every_row_ends / kBlockN};
  }
};

}  // namespace flash_ext
