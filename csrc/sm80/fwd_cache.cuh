// The forward over a KV cache for compute capability 8.0 and later without wgmma. Pipeline, memory and tiles: docs/sm80.md.
//
// Persistent CTAs take the items of common/cache_work.cuh: a part of a sequence's keys, a KV head and 64 rows of queries, 16 a
// warp. All warps copy, each a quarter of every tile of keys, row by row wherever the rows lie (kv.cuh); a decoding step has
// fewer rows than a tile, and warps whose rows stand for no query do nothing else.
#pragma once

#include "common/cache_work.cuh"
#include "common/kv.cuh"
#include "common/kvcache_params.h"
#include "common/masks.cuh"
#include "common/math.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "common/swizzle.cuh"
#include "common/tiles.cuh"
#include "sm80/limits.h"
#include "sm80/primitives.cuh"
#include "sm80/products.cuh"
#include "sm80/tile_copy.cuh"

namespace flash_ext::sm80 {

constexpr int kCacheWarps = 4;

// One tile for every device: it fits 99 KB, and up to head_dim 128 two CTAs fit an SM that has 164 KB.
template <int kHeadDim>
struct CacheTile;
template <>
struct CacheTile<64> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 2;
};
template <>
struct CacheTile<128> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStages = 2;
};
template <>
struct CacheTile<256> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStages = 1;
};

// A kernel for every head_dim and head_dim_v up to kHeadDim: copies fill the other columns with zeros.
template <class Element_, int kHeadDim_, class Mask_, class Score_>
struct CacheConfig : CacheTile<kHeadDim_> {
  using Tile = CacheTile<kHeadDim_>;
  using Element = Element_;
  using Mask = Mask_;
  using Score = Score_;
  using Tiles = RangeTiles<Mask>;
  using Output = CacheOutput<Element>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kNumThreads = kCacheWarps * 32;
  static constexpr int kMinBlocksPerSm = cache_ctas_per_sm(SharedLimit::k163, kHeadDim);
  static constexpr int kQueryTileBytes = Tile::kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kKeyTileBytes = Tile::kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;  // of V too

  static_assert(Tile::kBlockM == kCacheWarps * kRowsPerWarp, "a warp owns 16 rows");
  static_assert(Tile::kBlockN % (16 * kCacheWarps) == 0, "warps copy equal shares, P V steps through 16 keys at a time");
};

template <class Config>
struct CacheStorage {
  alignas(kSlabRowBytes) uint8_t q[Config::kQueryTileBytes];  // at the end each warp's output, in its own rows
  alignas(kSlabRowBytes) uint8_t k[Config::kStages][Config::kKeyTileBytes];
  alignas(kSlabRowBytes) uint8_t v[Config::kStages][Config::kKeyTileBytes];
  // The item: here, since the main loop has no registers for it.
  QueryTile queries;
  KeyTiles tiles;
};

// A warp's share of the copies of tiles of keys: lane i looks up row i of the share, shuffles hand the places round.
template <class Config>
struct CacheRows {
  using Element = typename Config::Element;
  static constexpr int kRowsOfWarp = Config::kBlockN / kCacheWarps;
  static constexpr int kPieces = Config::kHeadDim / 8;  // of 16 bytes, a row
  static constexpr int kRowsAtOnce = 32 / kPieces;
  static_assert(kRowsOfWarp <= 32, "a lane looks up one row");
  static_assert(32 % kPieces == 0 && kRowsOfWarp % kRowsAtOnce == 0, "a pass of a warp covers whole rows");

  // Of the lane's row of a tile. Rows beyond the sequence have none, and become zeros.
  struct Place {
    int block = -1, row = 0;

    __device__ __forceinline__ int64_t offset(const RowStrides& strides) const {
      return block < 0 ? -1 : block * strides.batch + row * strides.row;
    }
  };

  __device__ __forceinline__ static Place find(const FwdCacheParams& params, const QueryTile& queries, int n_block) {
    const RowRange& range = queries.sequence.k;
    const int row = n_block * Config::kBlockN + read_thread() / 32 * kRowsOfWarp + read_lane() % kRowsOfWarp;
    if (row >= range.num_rows) return {};
    const KvPlace place = place_of(params.places, queries.index, range.first_row + row);
    return {place.block, place.row};
  }

  // head: first element of the KV head in block 0, row 0.
  __device__ __forceinline__ static void copy(uint32_t tile, const Element* head, int64_t offset, int head_dim) {
    const int lane = read_lane(), first_row = read_thread() / 32 * kRowsOfWarp + lane / kPieces;
    const int column = lane % kPieces * 8;
#pragma unroll
    for (int pass = 0; pass < kRowsOfWarp / kRowsAtOnce; ++pass) {
      const int64_t from = __shfl_sync(0xffffffffu, offset, pass * kRowsAtOnce + lane / kPieces);
      const bool inside = from >= 0 && column < head_dim;
      copy_16_bytes(tile + tile_offset(Config::kBlockN, first_row + pass * kRowsAtOnce, column),
                    inside ? head + from + column : head, inside);
    }
  }
};

// The item in shared memory. Groups of copies are committed in the order Q and K(0), V(0), K(1), V(1) ...; a stage is filled again once a
// barrier has shown that every warp has read it.
template <class Config>
__device__ __forceinline__ void attend_item(const FwdCacheParams& params, CacheStorage<Config>& shared) {
  using Element = typename Config::Element;
  using Score = typename Config::Score;
  using Rows = CacheRows<Config>;
  constexpr int kStages = Config::kStages;
  constexpr int kNumAccS = Config::kBlockN / 2, kNumAccO = Config::kHeadDim / 2;
  const typename Config::Mask mask(params.mask);
  const QueryTile& queries = shared.queries;
  const KeyTiles& tiles = shared.tiles;
  const Sequence& sequence = queries.sequence;
  const int lane = read_lane(), warp_row = read_thread() / 32 * kRowsPerWarp;
  const bool has_rows = queries.holds(warp_row);  // of the warp, some: positions and heads ascend

  const Element* const keys = static_cast<const Element*>(params.k) + queries.head_kv * params.k_strides.head;
  const Element* const values = static_cast<const Element*>(params.v) + queries.head_kv * params.v_strides.head;
  typename Rows::Place next[kStages];  // of the rows of V whose keys are under way, by stage
  const auto load_k = [&](int i, int stage) {
    if (i < tiles.num_tiles) {
      next[stage] = Rows::find(params, queries, tiles.n_block(i));
      Rows::copy(shared_address(shared.k[stage]), keys, next[stage].offset(params.k_strides), params.head_dim);
    }
    commit_copies();
  };
  const auto load_v = [&](int i, int stage) {
    if (i < tiles.num_tiles) {
      Rows::copy(shared_address(shared.v[stage]), values, next[stage].offset(params.v_strides), params.head_dim_v);
    }
    commit_copies();
  };

  if (tiles.num_tiles > 0) {
    const uint8_t* first = rows_of(params.q, params.q_strides, sequence.q, queries.head_kv * queries.group);
    TileCopy<Config::kBlockM, Config::kHeadDim, Config::kNumThreads>::copy(
        shared_address(shared.q), params.head_dim, [&](int row) {
          return queries.holds(row) ? first + 2 * (queries.position(row) * params.q_strides.row +
                                                   queries.head_in_group(row) * params.q_strides.head)
                                    : nullptr;
        });
  }
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    load_k(i, i);
    load_v(i, i);
  }

  const float softmax_scale = Score::kModifies ? 1.f : fold_scale(params.score.softmax_scale).log2_scale;
  const int positions[2] = {queries.position(warp_row + acc_row(lane, 0)), queries.position(warp_row + acc_row(lane, 1))};
  const int heads[2] = {queries.existing_head(warp_row + acc_row(lane, 0)),
                        queries.existing_head(warp_row + acc_row(lane, 1))};
  const Score score(params.score, sequence.k, queries.index, queries.head_kv, heads);
  OnlineSoftmax softmax(softmax_scale);
  float acc_o[1][kNumAccO];
  clear(acc_o);

  // The weights of the i-th tile visited, packed for P V; results so far are rescaled for them.
  const auto weigh = [&](int i, uint32_t k_tile, uint32_t (&p_regs)[kNumAccS / 2]) {
    float acc_s[1][kNumAccS];
    clear(acc_s);
    const RowsA<Config::kBlockM> rows(shared_address(shared.q), warp_row, 0, lane);
    const RowsB<Config::kBlockN> columns(k_tile, 0, 0, lane);
    multiply<Element, Config::kHeadDim / 16, Config::kBlockN / 16>(
        acc_s, [&](auto& registers, int r, int step) { rows.load(registers, r, step); },
        [&](auto& registers, int step, int pair) { columns.load(registers, pair, step); });
    const int first_key = tiles.n_block(i) * Config::kBlockN + acc_first_col(lane);
    if constexpr (Score::kModifies) {
      const int from = sequence.diagonal - first_key;
      score.template modify<Config::kBlockN>(acc_s[0], score.template load_tile<Config::kBlockN>(sequence.k, 0, lane),
                                             {positions[0] + from, positions[1] + from}, lane);
    }
    bool masked = i < tiles.num_masked;
    if constexpr (Config::Tiles::kMaskedLeft) masked |= i >= tiles.full_end;
    if (masked) {
      typename HiddenBits<kNumAccS>::Word hidden[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int end = mask.visible_end(positions[half], sequence) - first_key;
        hidden[half] = Config::Tiles::kMaskedLeft
                           ? HiddenBits<kNumAccS>::outside(mask.visible_begin(positions[half], sequence) - first_key, end)
                           : HiddenBits<kNumAccS>::from(end);
      }
      hide_keys(acc_s[0], hidden);
    }
    float rescale[2];
    softmax.update(acc_s[0], softmax_scale, rescale);
#pragma unroll
    for (int n = 0; n < kNumAccS / 2; ++n) p_regs[n] = pack_pair<Element>(acc_s[0][2 * n], acc_s[0][2 * n + 1]);
#pragma unroll
    for (int n = 0; n < kNumAccO; ++n) acc_o[0][n] *= rescale[acc_half(n)];
  };

  const auto step = [&](int i, int stage) {
    uint32_t p_regs[kNumAccS / 2];
    if (has_rows) weigh(i, shared_address(shared.k[stage]), p_regs);
    wait_for_copies<2 * (kStages - 1)>();  // of V(i)
    __syncthreads();
    load_k(i + kStages, stage);
    if (has_rows) {
      const ColumnsB<Config::kBlockN> columns(shared_address(shared.v[stage]), 0, 0, lane);
      multiply<Element, Config::kBlockN / 16, Config::kHeadDim / 16>(
          acc_o,
          [&](auto& registers, int, int step) {
#pragma unroll
            for (int n = 0; n < 4; ++n) registers[n] = p_regs[4 * step + n];
          },
          [&](auto& registers, int step, int pair) { columns.load(registers, step, pair); });
    }
    wait_for_copies<2 * (kStages - 1)>();  // of K(i + 1)
    __syncthreads();
    load_v(i + kStages, stage);
  };

  wait_for_copies<2 * kStages - 1>();  // of Q and K(0)
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < tiles.num_tiles; i += kStages) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (i + stage < tiles.num_tiles) step(i + stage, stage);
    }
  }
  if (!has_rows) return;

  float normalise[2], lse[2], largest[2], sinks[2] = {-INFINITY, -INFINITY};
  if (params.sinks != nullptr) sinks[0] = params.sinks[heads[0]], sinks[1] = params.sinks[heads[1]];
  softmax.finish(sinks, normalise, lse, largest);
#pragma unroll
  for (int n = 0; n < kNumAccO; ++n) {
    // Rows without keys: the hidden values that met their zero weights may have been NaN.
    acc_o[0][n] = normalise[acc_half(n)] == 0.f ? 0.f : acc_o[0][n] * normalise[acc_half(n)];
  }
  typename Config::Output out(params, queries, warp_row);
  out.store_lse(lse, lane);
  // Staged in the warp's own rows of Q's first slab, which no other warp reads; it has read them before the last barrier.
  out.store_rows(acc_o[0], shared_address(shared.q) + warp_row * kSlabRowBytes, lane);
}

template <class Config>
__device__ __forceinline__ void flash_fwd_cache(const FwdCacheParams& params) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  CacheStorage<Config>& shared = *reinterpret_cast<CacheStorage<Config>*>(shared_bytes);
  const int num_items = CacheWork::num_items(params);
  const typename Config::Mask mask(params.mask);
  for (int index = read_block(); index < num_items; index += gridDim.x) {
    const QueryTile queries = CacheWork::query_tile<Config::kBlockM>(params, index, read_lane());
    const KeyTiles tiles = Config::Tiles::template key_tiles<Config::kBlockN>(
        mask, queries.sequence, queries.first_position, queries.last_position(Config::kBlockM));
    __syncthreads();  // every warp is done with the item before
    if (read_thread() == 0) {
      shared.queries = queries;
      shared.tiles = CacheWork::part_of(params, queries, tiles);
    }
    __syncthreads();
    attend_item<Config>(params, shared);
  }
}

// kernel: the variant's entry, an instance of flash_fwd_cache<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd_cache(Kernel* kernel, FwdCacheParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(CacheStorage<Config>);
  static_assert(kSharedBytes <= bytes_of(SharedLimit::k99), "one tile for every device");
  static_assert(Config::kMinBlocksPerSm * (kSharedBytes + 1024) <= 164 * 1024, "see cache_ctas_per_sm");

  params.by_items = make_divisor(params.items_per_part);
  params.by_m_blocks = make_divisor(params.num_m_blocks);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(params.num_ctas), dim3(Config::kNumThreads), arguments,
                          kSharedBytes, stream);
}

}  // namespace flash_ext::sm80
