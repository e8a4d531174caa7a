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

// The tiles of one line, of kTile scores along the other sequence, in the order of the list: partial ones first. What stands in
// device memory is not trusted: no index leaves its tensor.
template <int kTile>
struct ListedTiles {
  static_assert(kMaskBlock % kTile == 0 && kTile >= 16, "whole tiles of a block, and whole bytes of its bits");
  static constexpr int kTilesPerBlock = kMaskBlock / kTile;

  const BlockEntry* entries;  // of the line
  int num_tiles;
  int num_masked;  // the first tiles need their bits, the others none
  int num_blocks;  // along the other sequence

  // Of batch entry `batch` and query head `head`.
  FX_HOST_DEVICE constexpr static ListedTiles of_line(const BlockListParams& params, int batch, int head, int own_block) {
    const int64_t line = batch * params.batch_stride + int64_t(head) * params.head_stride + own_block;
    const int first = clamp(params.offsets[line], 0, params.num_entries);
    const int last = clamp(params.offsets[line + 1], first, params.num_entries);
    const int partial = clamp(params.num_partial[line], 0, last - first);
    return {params.entries + first, (last - first) * kTilesPerBlock, partial * kTilesPerBlock, params.num_blocks};
  }

  FX_HOST_DEVICE constexpr BlockEntry entry(int i) const { return entries[i / kTilesPerBlock]; }

  // The i-th tile visited.
  FX_HOST_DEVICE constexpr int n_block(int i) const {
    return clamp(entry(i).block, 0, num_blocks - 1) * kTilesPerBlock + i % kTilesPerBlock;
  }

#ifdef __CUDACC__
  // What a thread of a matrix instruction does not see of its rows `row` and row + 8 of the i-th tile, see HiddenBits. row: of
  // the block; direction: 0 for rows of queries, 1 for rows of keys.
  __device__ __forceinline__ void load_hidden(const BlockListParams& params, int i, int direction, int row, int lane, uint32_t (&hidden)[2]) const {
    const int slot = min_of(entry(i).slot, params.num_bits - 1);
    hidden[0] = hidden[1] = 0;
    if (slot < 0) return;
    const uint32_t* words = params.bits + (int64_t(slot) * kMaskBitsWords + (direction * kMaskBlock + row) * kMaskWords + lane % 4);
    const int shift = i % kTilesPerBlock * (kTile / 4);
    // Complements that the compiler cannot see through: it would test the bits one by one.
    asm("not.b32 %0, %1;" : "=r"(hidden[0]) : "r"(words[0] >> shift));
    asm("not.b32 %0, %1;" : "=r"(hidden[1]) : "r"(words[8 * kMaskWords] >> shift));
  }
#endif
};

}  // namespace flash_ext
