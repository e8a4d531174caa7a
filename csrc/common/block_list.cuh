// Block masks: explicit lists of the blocks that a tile visits, and the bits of the blocks that are partial. Built by
// flash_ext/block_mask.py, described in docs/block_masks.md. Every tile that uses them divides kMaskBlock.
#pragma once

#include <cstdint>

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/masks.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

constexpr int kMaskBlock = 128;  // scores of a block, in both directions
constexpr int kMaskWords = 4;    // of 32 bits in a row of a block: bit 2 c + e of word w is column 8 c + 2 w + e
constexpr int kMaskBitsWords = 2 * kMaskBlock * kMaskWords;  // of a block: a row for each query, then a row for each key

enum class BlockKind : uint8_t { kEmpty, kPartial, kFull };

struct alignas(8) BlockEntry {
  int block;  // along the other sequence
  int slot;   // of its bits, -1: full
};

// One direction of a BlockMask: for each line (batch, head, own block), the blocks along the other sequence.
struct BlockListParams {
  const int* offsets;      // (lines + 1) int32: line i owns entries [offsets[i], offsets[i + 1])
  const int* num_partial;  // (lines) int32: that many of its entries come first and are partial, the others are full
  const BlockEntry* entries;  // (entries)
  const uint32_t* bits;    // (partial blocks, 2, kMaskBlock, kMaskWords)
  const int* turns;        // (entries), of columns: how many blocks of keys come before this one at its block of queries; or null
  const int* order;        // (own blocks): from the longest line to the shortest; null where there are no lists
  int num_own_blocks;      // what the order is clamped to
  int64_t batch_stride;    // lines from one sequence to the next; 0: one mask for all
  int head_stride;         // lines from one query head to the next; 0: one mask for all
  int num_entries;         // of all lines: what offsets are clamped to
  int num_bits;            // partial blocks
  int num_blocks;          // along the other sequence: what entries are clamped to
};

// A mask that lists tell. As an interval it shows everything: the edges of the keys are bits too.
struct BlockMask : FullMask {
  using FullMask::FullMask;
};

// Tiles policy of BlockMask, in the place of RangeTiles (tiles.cuh).
struct ListTiles {
  static constexpr bool kListed = true, kManyMasked = true, kMaskedLeft = false;
};

// One tile of a list.
struct ListedTile {
  int index;  // along the other sequence, in tiles
  int slot;   // of its block's bits, below 0: full
  int entry;
};

// A line as places [begin, end) of tiles of kTile scores along the other sequence, kTilesPerBlock for each entry, in the order of
// the list: partial ones first. What stands in device memory is not trusted: no index leaves its tensor.
template <int kTile>
struct ListedLine {
  static_assert(kMaskBlock % kTile == 0 && kTile >= 16, "whole tiles of a block, and whole bytes of its bits");
  static constexpr int kTilesPerBlock = kMaskBlock / kTile;

  uint32_t begin, end;

  // Of batch entry `batch` and query head `head`.
  FX_HOST_DEVICE constexpr static int64_t index(const BlockListParams& params, int batch, int head, int own_block) {
    return batch * params.batch_stride + int64_t(head) * params.head_stride + own_block;
  }
  FX_HOST_DEVICE constexpr static ListedLine of(const BlockListParams& params, int batch, int head, int own_block) {
    const int64_t line = index(params, batch, head, own_block);
    const int first = clamp(params.offsets[line], 0, params.num_entries);
    const int last = clamp(params.offsets[line + 1], first, params.num_entries);
    return {uint32_t(first) * kTilesPerBlock, uint32_t(last) * kTilesPerBlock};
  }
  FX_HOST_DEVICE constexpr static ListedTile tile(const BlockListParams& params, uint32_t place) {
    const BlockEntry entry = params.entries[place / kTilesPerBlock];
    return {clamp(entry.block, 0, params.num_blocks - 1) * kTilesPerBlock + int(place % kTilesPerBlock),
            min_of(entry.slot, params.num_bits - 1), int(place / kTilesPerBlock)};
  }
};

// The tile, of kTile own scores, that comes `rank`-th: whole blocks after each other. Tiles beyond the sequence are among them.
template <int kTile>
FX_HOST_DEVICE constexpr int ordered_tile(const BlockListParams& params, int rank) {
  constexpr int kTilesPerBlock = kMaskBlock / kTile;
  return clamp(params.order[rank / kTilesPerBlock], 0, params.num_own_blocks - 1) * kTilesPerBlock + rank % kTilesPerBlock;
}
// How many ranks there are, with tiles of so many scores.
constexpr int num_ordered_tiles(int seqlen, int tile) { return ceil_div(seqlen, kMaskBlock) * (kMaskBlock / tile); }

// In a deterministic sum of dQ, how many tiles of kBlockN keys add to a tile of queries before tile n_block of keys.
template <int kBlockN>
FX_HOST_DEVICE constexpr int listed_turn(const BlockListParams& params, const ListedTile& tile, int n_block) {
  constexpr int kTilesPerBlock = kMaskBlock / kBlockN;
  return params.turns[tile.entry] * kTilesPerBlock + n_block % kTilesPerBlock;
}

#ifdef __CUDACC__
// What a thread of a matrix instruction does not see of its rows `row` and row + 8 of a tile, see HiddenBits. row: of the
// block; direction: 0 for rows of queries, 1 for rows of keys.
template <int kTile>
__device__ __forceinline__ void load_hidden(const BlockListParams& params, const ListedTile& tile, int direction, int row, int lane,
                                            uint32_t (&hidden)[2]) {
  hidden[0] = hidden[1] = 0;
  if (tile.slot < 0) return;
  const uint32_t* words = params.bits + (int64_t(tile.slot) * kMaskBitsWords + (direction * kMaskBlock + row) * kMaskWords + lane % 4);
  const int shift = tile.index % (kMaskBlock / kTile) * (kTile / 4);
  // Complements that neither compiler can see through: it would test the bits one by one.
  const uint32_t ones = ~uint32_t(tile.slot >> 31);
  hidden[0] = words[0] >> shift ^ ones;
  hidden[1] = words[8 * kMaskWords] >> shift ^ ones;
}
#endif

// The tiles of one line as the forward walks them.
template <int kTile>
struct ListedTiles {
  using Line = ListedLine<kTile>;

  const BlockEntry* entries;  // of the line
  int num_tiles;
  int num_masked;  // the first tiles need their bits, the others none
  int num_blocks;  // along the other sequence

  FX_HOST_DEVICE constexpr static ListedTiles of_line(const BlockListParams& params, int batch, int head, int own_block) {
    const Line line = Line::of(params, batch, head, own_block);
    const int num_tiles = int(line.end - line.begin);
    const int partial = clamp(params.num_partial[Line::index(params, batch, head, own_block)], 0, num_tiles / Line::kTilesPerBlock);
    return {params.entries + line.begin / Line::kTilesPerBlock, num_tiles, partial * Line::kTilesPerBlock, params.num_blocks};
  }

  FX_HOST_DEVICE constexpr BlockEntry entry(int i) const { return entries[i / Line::kTilesPerBlock]; }

  // The i-th tile visited.
  FX_HOST_DEVICE constexpr int n_block(int i) const {
    return clamp(entry(i).block, 0, num_blocks - 1) * Line::kTilesPerBlock + i % Line::kTilesPerBlock;
  }

#ifdef __CUDACC__
  __device__ __forceinline__ void load_hidden(const BlockListParams& params, int i, int direction, int row, int lane, uint32_t (&hidden)[2]) const {
    const ListedTile tile{i % Line::kTilesPerBlock, min_of(entry(i).slot, params.num_bits - 1), 0};
    flash_ext::load_hidden<kTile>(params, tile, direction, row, lane, hidden);
  }
#endif
};

}  // namespace flash_ext
