// Block masks: explicit lists of the blocks that a tile visits, and the bits of the blocks that are partial. Built by
// flash_ext/block_mask.py, described in docs/block_masks.md. Every tile that uses them divides kMaskBlock.
#pragma once

#include <cstdint>

#include "common/math.cuh"

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
};

}  // namespace flash_ext
