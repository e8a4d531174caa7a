// Forward for compute capability 8.0 and later without wgmma: out = softmax(scale * Q K^T) V and its log-sum-exp.
// Pipeline, memory and tiles: docs/sm80.md.
//
// A CTA takes one tile of kBlockM queries. Q lies in shared memory; K and V arrive tile by tile through stages that all
// threads fill by cp.async. A warp owns kRowTiles times 16 rows of Q and computes, per tile of kBlockN keys, S = Q K^T, the
// online softmax and O += P V, with S, P and O in registers. Other warps and CTAs of the SM fill the tensor cores while
// one does softmax.
#pragma once

#include "common/masks.cuh"
#include "common/math.cuh"
#include "common/outputs.cuh"
#include "common/params.h"
#include "common/scheduler.cuh"
#include "common/scores.cuh"
#include "common/seqlens.cuh"
#include "common/softmax.cuh"
#include "common/swizzle.cuh"
#include "common/tiles.cuh"
#include "common/work.cuh"
#include "sm80/limits.h"
#include "sm80/primitives.cuh"
#include "sm80/products.cuh"
#include "sm80/tile_copy.cuh"

namespace flash_ext::sm80 {

// Tile sizes. Where tensor cores are fast (k163), matrix loads from shared memory must be shared by 32 rows a warp, else
// they take as long as the products; O of 32 rows fits the registers up to head_dim 128, beside a plain score. Elsewhere
// more warps are better. kStagesK, kStagesV: 2 and 2, 2 and 1, or 1 and 1; see `step`.
template <int kHeadDim, SharedLimit kLimit, bool kModifiesScores>
struct FwdTile;
template <>
struct FwdTile<64, SharedLimit::k163, false> {
  static constexpr int kBlockM = 128, kBlockN = 128, kWarps = 4, kStagesK = 2, kStagesV = 1, kMinBlocksPerSm = 2;
};
template <>
struct FwdTile<96, SharedLimit::k163, false> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 4, kStagesK = 2, kStagesV = 1, kMinBlocksPerSm = 2;
};
template <>
struct FwdTile<128, SharedLimit::k163, false> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 4, kStagesK = 2, kStagesV = 1, kMinBlocksPerSm = 2;
};
template <bool kModifiesScores>
struct FwdTile<192, SharedLimit::k163, kModifiesScores> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 8, kStagesK = 2, kStagesV = 2, kMinBlocksPerSm = 1;
};
template <bool kModifiesScores>
struct FwdTile<256, SharedLimit::k163, kModifiesScores> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 8, kStagesK = 2, kStagesV = 1, kMinBlocksPerSm = 1;
};
template <bool kModifiesScores>
struct FwdTile<64, SharedLimit::k99, kModifiesScores> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 8, kStagesK = 2, kStagesV = 2, kMinBlocksPerSm = kModifiesScores ? 1 : 2;
};
template <>
struct FwdTile<96, SharedLimit::k99, false> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 8, kStagesK = 2, kStagesV = 2, kMinBlocksPerSm = 1;
};
template <bool kModifiesScores>
struct FwdTile<128, SharedLimit::k99, kModifiesScores> {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 8, kStagesK = 2, kStagesV = 2, kMinBlocksPerSm = 1;
};
template <bool kModifiesScores>
struct FwdTile<192, SharedLimit::k99, kModifiesScores> {
  static constexpr int kBlockM = 64, kBlockN = 64, kWarps = 4, kStagesK = 2, kStagesV = 1, kMinBlocksPerSm = 1;
};
template <bool kModifiesScores>
struct FwdTile<256, SharedLimit::k99, kModifiesScores> {
  static constexpr int kBlockM = 64, kBlockN = 64, kWarps = 4, kStagesK = 1, kStagesV = 1, kMinBlocksPerSm = 1;
};

// A kernel for every head_dim up to kHeadDim and head_dim_v up to kHeadDimV: copies fill the other columns with zeros.
template <class Element_, int kHeadDim_, int kHeadDimV_, class Mask_, class Score_, SharedLimit kLimit_>
struct FwdConfig : FwdTile<kHeadDim_, kLimit_, Score_::kModifies> {
  using Tile = FwdTile<kHeadDim_, kLimit_, Score_::kModifies>;
  using Element = Element_;
  using Mask = Mask_;
  using Score = Score_;
  using Tiles = typename TilesOf<Mask>::Type;
  using KeyTiles = std::conditional_t<Tiles::kListed, ListedTiles<Tile::kBlockN>, flash_ext::KeyTiles>;
  using Output = DenseOutput<Element>;
  static constexpr SharedLimit kLimit = kLimit_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kNumThreads = Tile::kWarps * 32;
  static constexpr int kWarpRows = Tile::kBlockM / Tile::kWarps;
  static constexpr int kRowTiles = kWarpRows / kRowsPerWarp;  // of 16 rows, a warp
  // Bytes of a tile with this many rows, in whole slabs.
  static constexpr int kQueryTileBytes = Tile::kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kKeyTileBytes = Tile::kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kValueTileBytes = Tile::kBlockN * num_slabs(kHeadDimV) * kSlabRowBytes;

  static_assert(kWarpRows % kRowsPerWarp == 0 && kRowTiles > 0, "a warp owns whole row tiles of mma.sync");
  static_assert(Tile::kBlockN % 16 == 0, "P V steps through 16 keys at a time");
  static_assert(kHeadDim % 16 == 0, "Q K^T steps through 16 columns at a time");
  static_assert(kHeadDimV % 16 == 0, "P V writes 16 columns at a time");
  static_assert(Tile::kStagesK >= Tile::kStagesV && Tile::kStagesK <= 2, "see `step`");
};

template <class Config>
struct SharedStorage {
  // 128: within a line, the swizzle depends on the row alone.
  alignas(kSlabRowBytes) uint8_t q[Config::kQueryTileBytes];  // at the end each warp's output, in its own rows
  alignas(kSlabRowBytes) uint8_t k[Config::kStagesK][Config::kKeyTileBytes];
  alignas(kSlabRowBytes) uint8_t v[Config::kStagesV][Config::kValueTileBytes];
  // What the CTA works on: here, since the main loop has no registers for it.
  QueryTile queries;
  typename Config::KeyTiles tiles;
  const uint8_t *k_rows, *v_rows;  // the sequence's first, of this head
};

// ptxas moves the last additions of the row sums behind the barrier, among the products of P V, where registers are scarcest
// at head_dim 128.
template <int kRowTiles>
__device__ __forceinline__ void complete_sums(const OnlineSoftmax (&softmax)[kRowTiles]) {
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) sum += softmax[r].row_sum[0] + softmax[r].row_sum[1];
  complete_here(sum);
}

template <class Config>
__device__ __forceinline__ void flash_fwd_sm80(const FwdParams& params) {
  using Element = typename Config::Element;
  using Score = typename Config::Score;
  constexpr int kRowTiles = Config::kRowTiles;
  constexpr int kNumAccS = Config::kBlockN / 2;
  constexpr int kNumAccO = Config::kHeadDimV / 2;
  using QueryCopy = TileCopy<Config::kBlockM, Config::kHeadDim, Config::kNumThreads>;
  using KeyCopy = TileCopy<Config::kBlockN, Config::kHeadDim, Config::kNumThreads>;
  using ValueCopy = TileCopy<Config::kBlockN, Config::kHeadDimV, Config::kNumThreads>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  SharedStorage<Config>& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);

  const auto softmax_scale = [&] { return Score::kModifies ? 1.f : fold_scale(params.score.softmax_scale).log2_scale; };
  const auto read_warp_row = [] { return read_thread() / 32 * Config::kWarpRows; };  // within the tile of queries
  const typename Config::Mask mask(params.mask);

  // The i-th tile visited; of ranges, only the first one may reach beyond the sequence.
  const auto load_k = [&](int i, int num_rows) {
    const int first = shared.tiles.n_block(i) * Config::kBlockN;
    KeyCopy::copy(shared_address(shared.k[i % Config::kStagesK]), num_rows, params.head_dim,
                  shared.k_rows + int64_t{2} * first * params.k_strides.row, 2 * params.k_strides.row);
  };
  const auto load_v = [&](int i, int num_rows) {
    const int first = shared.tiles.n_block(i) * Config::kBlockN;
    ValueCopy::copy(shared_address(shared.v[i % Config::kStagesV]), num_rows, params.head_dim_v,
                    shared.v_rows + int64_t{2} * first * params.v_strides.row, 2 * params.v_strides.row);
  };
  const auto rows_left = [&](int i) { return shared.queries.sequence.k.num_rows - shared.tiles.n_block(i) * Config::kBlockN; };
  const auto rows_from = [&](int i) { return Config::Tiles::kListed || i == 0 ? rows_left(i) : Config::kBlockN; };

  {
    const int thread = read_thread();
    const auto item = [&] {
      if constexpr (Config::Tiles::kListed) return listed_item<Config::kBlockM>(params, read_block());
      return params.schedule.item(read_block());
    };
    const QueryTile queries = warp_query_tile<Config::kBlockM>(params, item(), read_lane());
    if (!queries.exists()) return;
    const Sequence& sequence = queries.sequence;
    typename Config::KeyTiles tiles;
    if constexpr (Config::Tiles::kListed) {
      static_assert(kMaskBlock % Config::kBlockM == 0, "a tile of queries lies in one block");
      tiles = Config::KeyTiles::of_line(params.blocks, queries.index, queries.head(0), queries.first_position / kMaskBlock);
    } else {
      tiles = Config::Tiles::template key_tiles<Config::kBlockN>(mask, sequence, queries.first_position,
                                                                 queries.last_position(Config::kBlockM));
    }
    if (thread == 0) {
      shared.queries = queries;
      shared.tiles = tiles;
      shared.k_rows = rows_of(params.k, params.k_strides, sequence.k, queries.head_kv);
      shared.v_rows = rows_of(params.v, params.v_strides, sequence.k, queries.head_kv);
    }
    if (tiles.num_tiles > 0) {
      const uint8_t* first = rows_of(params.q, params.q_strides, sequence.q, queries.head_kv * queries.group);
      QueryCopy::copy(shared_address(shared.q), params.head_dim, [&](int row) {
        return queries.holds(row) ? first + 2 * (queries.position(row) * params.q_strides.row +
                                                 queries.head_in_group(row) * params.q_strides.head)
                                  : nullptr;
      });
    }
    const FoldedScale scale = fold_scale(params.score.softmax_scale);
    if (!Score::kModifies && tiles.num_tiles > 0 && scale.changes_q()) {  // a scale that is not positive: each thread rewrites what it copied
      commit_copies();
      wait_for_copies<0>();
      QueryCopy::rewrite(shared.q, scale.q_keep_bits, scale.q_flip_bits);
    }
  }
  __syncthreads();
  if (shared.tiles.num_tiles > 0) {
    load_k(0, rows_from(0));
    if constexpr (Config::kStagesV == 2) load_v(0, rows_from(0));
  }
  commit_copies();

  float acc_s[kRowTiles][kNumAccS], acc_o[kRowTiles][kNumAccO];
  uint32_t p_regs[kRowTiles][kNumAccS / 2];
  OnlineSoftmax softmax[kRowTiles];
  clear(acc_o);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) softmax[r] = OnlineSoftmax(softmax_scale());

  const auto scores = [&](uint32_t k_tile) {
    const int lane = read_lane();
    const RowsA<Config::kBlockM> queries(shared_address(shared.q), read_warp_row(), 0, lane);
    const RowsB<Config::kBlockN> keys(k_tile, 0, 0, lane);
    clear(acc_s);
    multiply<Element, Config::kHeadDim / 16, Config::kBlockN / 16>(
        acc_s, [&](auto& registers, int r, int step) { queries.load(registers, r, step); },
        [&](auto& registers, int step, int pair) { keys.load(registers, pair, step); });
  };
  const auto output = [&](uint32_t v_tile) {
    const ColumnsB<Config::kBlockN> values(v_tile, 0, 0, read_lane());
    multiply<Element, Config::kBlockN / 16, Config::kHeadDimV / 16>(
        acc_o,
        [&](auto& registers, int r, int step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) registers[i] = p_regs[r][4 * step + i];
        },
        [&](auto& registers, int step, int pair) { values.load(registers, step, pair); });
  };

  const auto position_of = [&](int row_tile, int half, int lane) {
    return shared.queries.position(read_warp_row() + row_tile * kRowsPerWarp + acc_row(lane, half));
  };
  // The i-th tile visited.
  const auto hide = [&](int i) {
    const int lane = read_lane();
    if constexpr (Config::Tiles::kListed) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t hidden[2];
        shared.tiles.load_hidden(params.blocks, i, /*direction=*/0, position_of(r, 0, lane) % kMaskBlock, lane, hidden);
        hide_keys(acc_s[r], hidden);
      }
      return;
    }
    const int first_key = shared.tiles.n_block(i) * Config::kBlockN + acc_first_col(lane);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      typename HiddenBits<kNumAccS>::Word hidden[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = position_of(r, half, lane);
        const int end = mask.visible_end(position, shared.queries.sequence) - first_key;
        hidden[half] = Config::Tiles::kMaskedLeft
                           ? HiddenBits<kNumAccS>::outside(mask.visible_begin(position, shared.queries.sequence) - first_key, end)
                           : HiddenBits<kNumAccS>::from(end);
      }
      hide_keys(acc_s[r], hidden);
    }
  };
  static_assert(!Score::kModifies || kRowTiles == 1, "one score policy holds the numbers of two rows");
  const int score_rows[2] = {read_warp_row() + acc_row(read_lane(), 0), read_warp_row() + acc_row(read_lane(), 1)};
  const Score score(params.score, shared.queries.sequence.k, shared.queries.index, shared.queries.head_kv,
                    {shared.queries.existing_head(score_rows[0]), shared.queries.existing_head(score_rows[1])});

  // One tile of keys. A stage is filled again once a barrier has shown that every warp has read it:
  //   stages 2, 2: the copies of the next K and V run during the whole step;
  //   stages 2, 1: V's own copy runs during the scores and the softmax, that of the next K during the whole step;
  //   stages 1, 1: V's copy runs during the scores and the softmax, that of the next K during P V.
  const auto step = [&](int i) {
    wait_for_copies<0>();
    __syncthreads();
    const auto& tiles = shared.tiles;
    const RowRange& keys = shared.queries.sequence.k;
    const bool more = i + 1 < tiles.num_tiles;
    const auto biases = score.template load_tile<Config::kBlockN>(keys, tiles.n_block(i), read_lane());
    if constexpr (Config::kStagesV == 1) {
      load_v(i, rows_from(i));
      commit_copies();
    }
    if constexpr (Config::kStagesK == 2) {
      if (more) load_k(i + 1, rows_from(i + 1));
      if constexpr (Config::kStagesV == 2) {
        if (more) load_v(i + 1, rows_from(i + 1));
      }
      commit_copies();
    }
    scores(shared_address(shared.k[i % Config::kStagesK]));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if constexpr (Score::kModifies) {
        const int lane = read_lane();
        const int from = shared.queries.sequence.diagonal - tiles.n_block(i) * Config::kBlockN - acc_first_col(lane);
        score.template modify<Config::kBlockN>(acc_s[r], biases,
                                               {position_of(r, 0, lane) + from, position_of(r, 1, lane) + from}, lane);
      }
    }
    // A branch, not loops of their own: the tile's code then stands once.
    bool masked = i < tiles.num_masked;
    if constexpr (Config::Tiles::kMaskedLeft) masked |= i >= tiles.full_end;
    if (masked) hide(i);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float rescale[2];
      softmax[r].update(acc_s[r], softmax_scale(), rescale);
#pragma unroll
      for (int n = 0; n < kNumAccS / 2; ++n) p_regs[r][n] = pack_pair<Element>(acc_s[r][2 * n], acc_s[r][2 * n + 1]);
#pragma unroll
      for (int n = 0; n < kNumAccO; ++n) acc_o[r][n] *= rescale[acc_half(n)];
    }
    if constexpr (Config::kStagesV == 1) {
      if constexpr (kRowTiles * kNumAccO >= 128) complete_sums(softmax);
      wait_for_copies<Config::kStagesK - 1>();
      __syncthreads();
      if constexpr (Config::kStagesK == 1) {
        if (more) load_k(i + 1, rows_from(i + 1));
        commit_copies();
      }
    }
    output(shared_address(shared.v[i % Config::kStagesV]));
  };

#pragma unroll 1
  for (int i = 0; i < shared.tiles.num_tiles; ++i) step(i);

  const QueryTile done = shared.queries;
  const int lane = read_lane();
  const int first_row = read_warp_row();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int tile_row = first_row + r * kRowsPerWarp;
    float normalise[2], lse[2], largest[2], sinks[2] = {-INFINITY, -INFINITY};
    if (params.sinks != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sinks[half] = params.sinks[done.existing_head(tile_row + acc_row(lane, half))];
      }
    }
    softmax[r].finish(sinks, normalise, lse, largest);
    if (params.max_logit != nullptr) store_max_logit(params.max_logit, done, tile_row, largest, lane);
#pragma unroll
    for (int n = 0; n < kNumAccO; ++n) acc_o[r][n] *= normalise[acc_half(n)];
    // Rows without keys: the hidden values that met their zero weights may have been NaN.
    if (normalise[0] == 0.f || normalise[1] == 0.f) {
#pragma unroll
      for (int n = 0; n < kNumAccO; ++n) {
        if (normalise[acc_half(n)] == 0.f) acc_o[r][n] = 0.f;
      }
    }
    typename Config::Output out(params, done, tile_row);
    out.store_lse(lse, lane);
    // Staged in the warp's own rows of Q's first slab, which no other warp reads.
    __syncwarp();
    out.store_rows(acc_o[r], shared_address(shared.q) + tile_row * kSlabRowBytes, lane);
  }
}

// kernel: the variant's entry, an instance of flash_fwd_sm80<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd(Kernel* kernel, FwdParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= bytes_of(Config::kLimit), "the tile does not fit the devices that it is made for");

  if (params.batch == 0 || params.num_heads == 0 || params.seqlens_q.num_rows == 0) return cudaSuccess;
  params.schedule = make_fwd_schedule(params, Config::kBlockM);

  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(params.schedule.num_items())),
                          dim3(Config::kNumThreads), arguments, kSharedBytes, stream);
}

}  // namespace flash_ext::sm80
