// From dense masks to what BlockMask keeps of them, in one pass: the kind of every block, and the bits of partial ones.
//
// A CTA takes one block of kMaskBlock x kMaskBlock bytes. A warp reads a row at a time, 4 bytes a lane, and turns it into
// the row's words by ballots; the words of all rows wait in shared memory until the whole block's kind is known. Rows of
// keys come from them by ballots again. Bound by reading the mask.
#pragma once

#include <cuda_runtime.h>

#include "common/block_list.cuh"
#include "common/params.h"

namespace flash_ext {

struct MaskBlocksConfig {
  static constexpr int kNumThreads = 256;
  static constexpr int kMinBlocksPerSm = 6;
  static constexpr int kBlockM = kMaskBlock, kBlockN = kMaskBlock;
  static_assert(kMaskBlock == 128 && kNumThreads == 2 * kMaskBlock, "a row has 32 lanes of 4 bytes, 4 words and 2 directions");
};

// The four bytes of a lane, a bit for each byte that is not 0: columns 4 * lane to 4 * lane + 3 of the block's row.
__device__ __forceinline__ uint32_t load_four(const uint8_t* row, int columns_left, int lane, bool aligned) {
  const int column = 4 * lane;
  uint32_t bytes = 0;
  if (aligned && column + 4 <= columns_left) {
    bytes = __ldcs(reinterpret_cast<const unsigned*>(row + column));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < columns_left) bytes |= uint32_t(row[column + i]) << (8 * i);
    }
  }
  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) seen |= ((bytes >> (8 * i) & 0xff) != 0 ? 1u : 0u) << i;
  return seen;
}

// Word w of a row (block_list.cuh) from the four bits of every lane: lane 2 c + (w / 2) holds its columns 8 c + 2 w and + 1.
__device__ __forceinline__ void row_words(uint32_t seen, uint32_t (&words)[kMaskWords]) {
  constexpr uint32_t kEven = 0x55555555u;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t first = __ballot_sync(0xffffffffu, seen >> (2 * pair) & 1);
    const uint32_t second = __ballot_sync(0xffffffffu, seen >> (2 * pair + 1) & 1);
    words[pair] = (first & kEven) | (second & kEven) << 1;
    words[2 + pair] = (first >> 1 & kEven) | (second & ~kEven);
  }
}

template <class Config>
__device__ __forceinline__ void mask_blocks(const MaskBlocksParams& params) {
  __shared__ uint32_t rows[kMaskBlock][kMaskWords];
  __shared__ int count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kWarps = Config::kNumThreads / 32;
  const int columns_of_blocks = ceil_div(params.seqlen_k, kMaskBlock), rows_of_blocks = ceil_div(params.seqlen_q, kMaskBlock);
  const int block = blockIdx.x;
  const int n_block = block % columns_of_blocks, row_of_all = block / columns_of_blocks;
  const int m_block = row_of_all % rows_of_blocks;
  const int64_t matrix = row_of_all / rows_of_blocks;

  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const int first_row = m_block * kMaskBlock, first_key = n_block * kMaskBlock;
  const int rows_left = min_of(kMaskBlock, params.seqlen_q - first_row);
  const uint8_t* mask = params.mask + (matrix * params.seqlen_q + first_row) * params.seqlen_k + first_key;
  const bool aligned = params.seqlen_k % 4 == 0 && reinterpret_cast<uintptr_t>(params.mask) % 4 == 0;
  int seen_by_warp = 0;
#pragma unroll 4
  for (int i = 0; i < kMaskBlock / kWarps; ++i) {
    const int row = warp + i * kWarps;
    uint32_t seen = 0;
    if (row < rows_left) seen = load_four(mask + int64_t(row) * params.seqlen_k, params.seqlen_k - first_key, lane, aligned);
    uint32_t words[kMaskWords];
    row_words(seen, words);
#pragma unroll
    for (int w = 0; w < kMaskWords; ++w) {
      seen_by_warp += __popc(words[w]);
      if (lane == w) rows[row][w] = words[w];
    }
  }
  if (lane == 0) atomicAdd(&count, seen_by_warp);
  __syncthreads();

  const BlockKind kind = count == 0 ? BlockKind::kEmpty : count == rows_left * kMaskBlock ? BlockKind::kFull : BlockKind::kPartial;
  if (threadIdx.x == 0) params.kinds[block] = static_cast<uint8_t>(kind);
  if (kind != BlockKind::kPartial) return;

  uint32_t* of_queries = params.bits + int64_t(block) * kMaskBitsWords;
  uint32_t* of_keys = of_queries + kMaskBlock * kMaskWords;
#pragma unroll
  for (int j = 0; j < kMaskBlock * kMaskWords / Config::kNumThreads; ++j) {
    const int i = j * Config::kNumThreads + threadIdx.x;
    of_queries[i] = rows[i / kMaskWords][i % kMaskWords];
  }
  // Two warps a word of the rows of keys: its bit 2 c + e is query 8 c + 2 w + e, so the lane with that number holds the
  // query's words, and a ballot over one of their bits is a key's word.
  const int w = warp % kMaskWords, half = warp / kMaskWords;
  const int query = 8 * (lane / 2) + 2 * w + lane % 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int source = 2 * half + j;
    const uint32_t word = rows[query][source];
    uint32_t mine = 0;
#pragma unroll
    for (int bit = 0; bit < 32; ++bit) {
      const uint32_t of_key = __ballot_sync(0xffffffffu, word >> bit & 1);
      if (lane == bit) mine = of_key;
    }
    const int key = 8 * (lane / 2) + 2 * source + lane % 2;
    of_keys[key * kMaskWords + w] = mine;
  }
}

// kernel: the entry, an instance of mask_blocks<Config>. The caller has checked that the grid fits 2^31 - 1.
template <class Config, class Kernel>
cudaError_t launch_mask_blocks(Kernel* kernel, const MaskBlocksParams& params, cudaStream_t stream) {
  const int64_t num_blocks =
      params.num_masks * ceil_div(params.seqlen_q, kMaskBlock) * ceil_div(params.seqlen_k, kMaskBlock);
  void* arguments[] = {const_cast<MaskBlocksParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(Config::kNumThreads), arguments, 0, stream);
}

}  // namespace flash_ext
