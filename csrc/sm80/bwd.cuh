// Backward for compute capability 8.0 and later without wgmma: dQ, dK and dV from the row statistics of bwd_preprocess.
// Pipeline, memory and tiles: docs/sm80.md.
//
// A CTA owns kBlockN keys of one KV head. K and V stay in shared memory; Q and dO of every query head of the group arrive
// tile by tile by cp.async. Per tile the eight warps compute S^T = K Q^T and dP^T = V dO^T (rows are keys), P and dS in
// registers, which then pass through shared memory: dV += P^T dO, dK += dS^T Q in registers, and dQ = dS K, which is added
// to the float32 sum in memory (dq_blocks.cuh).
#pragma once

#include <climits>
#include <type_traits>

#include "common/bwd_scores.cuh"
#include "common/dq_blocks.cuh"
#include "common/masks.cuh"
#include "common/math.cuh"
#include "common/outputs.cuh"
#include "common/params.h"
#include "common/scheduler.cuh"
#include "common/seqlens.cuh"
#include "common/swizzle.cuh"
#include "common/tiles.cuh"
#include "sm80/limits.h"
#include "sm80/primitives.cuh"
#include "sm80/products.cuh"
#include "sm80/tile_copy.cuh"

namespace flash_ext::sm80 {

constexpr int kBwdWarps = 8;

// Tile sizes. kKeyWarps: groups of warps that share the keys of S and dP; the warps of a group share the queries. kSumKeyWarps:
// the same for dK and dV, whose columns a group shares. kDqRowWarps: groups that share the queries of dQ. kStages: of Q and dO.
// kDoutParts: dO arrives in so many parts of its columns, of which two lie in shared memory (`sliced_step`).
template <int kHeadDim, SharedLimit kLimit>
struct BwdTile;
template <>
struct BwdTile<64, SharedLimit::k163> {
  static constexpr int kBlockM = 128, kBlockN = 128, kStages = 2, kKeyWarps = 4, kSumKeyWarps = 4, kDqRowWarps = 4, kDoutParts = 1;
};
template <>
struct BwdTile<128, SharedLimit::k163> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 2, kKeyWarps = 4, kSumKeyWarps = 4, kDqRowWarps = 2, kDoutParts = 1;
};
template <>
struct BwdTile<256, SharedLimit::k163> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStages = 1, kKeyWarps = 2, kSumKeyWarps = 2, kDqRowWarps = 2, kDoutParts = 1;
};
template <>
struct BwdTile<64, SharedLimit::k99> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 2, kKeyWarps = 4, kSumKeyWarps = 4, kDqRowWarps = 2, kDoutParts = 1;
};
template <>
struct BwdTile<128, SharedLimit::k99> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStages = 1, kKeyWarps = 2, kSumKeyWarps = 2, kDqRowWarps = 2, kDoutParts = 1;
};
template <>
struct BwdTile<256, SharedLimit::k99> {
  static constexpr int kBlockM = 32, kBlockN = 64, kStages = 1, kKeyWarps = 4, kSumKeyWarps = 2, kDqRowWarps = 1, kDoutParts = 4;
};

// A kernel for every head_dim up to kHeadDim and head_dim_v up to kHeadDimV: copies fill the other columns with zeros.
template <class Element_, int kHeadDim_, int kHeadDimV_, class Mask_, class Score_, SharedLimit kLimit_>
struct BwdConfig : BwdTile<kHeadDim_, kLimit_> {
  using Tile = BwdTile<kHeadDim_, kLimit_>;
  using Element = Element_;
  using Mask = Mask_;
  using Score = typename BackwardOf<Score_>::Type;
  using Tiles = typename TilesOf<Mask>::Type;
  static constexpr SharedLimit kLimit = kLimit_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kNumThreads = kBwdWarps * 32;
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr int kWarpsPerGroup = kBwdWarps / Tile::kKeyWarps;
  static constexpr int kWarpKeys = Tile::kBlockN / Tile::kKeyWarps;
  static constexpr int kWarpQueries = Tile::kBlockM / kWarpsPerGroup;
  static constexpr int kWarpsPerSumGroup = kBwdWarps / Tile::kSumKeyWarps;
  static constexpr int kSumKeys = Tile::kBlockN / Tile::kSumKeyWarps;
  static constexpr int kPartColumns = kHeadDimV / Tile::kDoutParts;       // of dO
  static constexpr int kWarpColumns = kHeadDim / kWarpsPerSumGroup;       // of dK
  static constexpr int kWarpColumnsV = kPartColumns / kWarpsPerSumGroup;  // of dV, in each part
  static constexpr int kDqColumnWarps = kBwdWarps / Tile::kDqRowWarps;
  static constexpr int kDqRows = Tile::kBlockM / Tile::kDqRowWarps;
  static constexpr int kDqColumns = kHeadDim / kDqColumnWarps;
  static constexpr int kDqColumnBlocks = num_slabs(kHeadDim);
  // Bytes of a tile with this many rows, in whole slabs.
  static constexpr int kQueryTileBytes = Tile::kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kDoutTileBytes = Tile::kBlockM * num_slabs(kPartColumns) * kSlabRowBytes;
  static constexpr int kDoutTiles = Tile::kDoutParts > 1 ? 2 : Tile::kStages;
  static constexpr int kKeyTileBytes = Tile::kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kValueTileBytes = Tile::kBlockN * num_slabs(kHeadDimV) * kSlabRowBytes;
  static constexpr int kScoreTileBytes = Tile::kBlockN * num_slabs(Tile::kBlockM) * kSlabRowBytes;
  // Where less than a slab of queries: P^T and dS^T lie side by side in one tile.
  static constexpr int kScoreTiles = Tile::kBlockM < kSlabColumns ? 1 : 2;
  static constexpr int kGradientColumn = kScoreTiles == 1 ? Tile::kBlockM : 0;  // of dS^T

  static_assert(kHeadDim % kSlabColumns == 0 && kHeadDimV % kSlabColumns == 0, "products step through slabs");
  static_assert(kWarpKeys % 16 == 0 && kSumKeys % 16 == 0 && kWarpQueries % 16 == 0 && kWarpColumns % 16 == 0 &&
                    kWarpColumnsV % 16 == 0 && kDqRows % 16 == 0 && kDqColumns % 16 == 0,
                "a warp owns whole tiles of mma.sync");
  static_assert(kPartColumns % kSlabColumns == 0, "parts of dO are whole slabs");
  static_assert(kSlabColumns % kWarpColumns == 0 && kSlabColumns % kWarpColumnsV == 0 && kSlabColumns % kDqColumns == 0 &&
                    kSlabColumns % kWarpQueries == 0,
                "a warp's columns lie in one slab");
  static_assert((Tile::kBlockM % kDqBlockRows == 0 || kDqBlockRows % Tile::kBlockM == 0) && kStatsRowAlignment % Tile::kBlockM == 0,
                "tiles of queries are blocks of dQ or parts of one, and never straddle two sequences");
  static_assert(kDqBlockRows / Tile::kBlockM <= kDqColumnBlocks, "each part of a block has turns of its own");
  static_assert(Tile::kStages * kQueryTileBytes >= kBwdWarps * kStagingBytesPerWarp, "dK and dV leave through Q's stages");
};

// One tile of keys of one KV head, and the queries that see them.
struct BwdWork {
  Sequence sequence;  // with the keys of this launch alone
  int index;          // of the sequence
  int n_block;
  int head_kv;
  int stats_row;      // of the sequence's first query among the statistics of a head
  QueryTiles tiles;   // of ranges
};

// Where a CTA stands among the tiles of queries that it visits, head by head.
template <class Config, bool kListed = Config::Tiles::kListed>
struct QueryVisit {
  int head;
  int m_block;

  __device__ __forceinline__ QueryVisit(const BwdParams& params, const BwdWork& work)
      : head(work.tiles.begin < work.tiles.end ? work.head_kv * (params.num_heads / params.num_heads_kv) : INT_MAX),
        m_block(work.tiles.begin) {}
  __device__ __forceinline__ bool exists(const BwdParams& params, const BwdWork& work) const {
    return head < (work.head_kv + 1) * (params.num_heads / params.num_heads_kv);
  }
  __device__ __forceinline__ void advance(const BwdParams&, const BwdWork& work) {
    if (++m_block < work.tiles.end) return;
    m_block = work.tiles.begin;
    ++head;
  }
  __device__ __forceinline__ bool is_masked(const BwdWork& work) const {
    return m_block < work.tiles.full_begin || m_block >= work.tiles.full_end;
  }
};

template <class Config>
struct QueryVisit<Config, true> {
  using Line = ListedLine<Config::kBlockM>;
  int head;
  int m_block;
  int slot;                   // of the tile's bits, below 0: full
  uint32_t place, line_end;  // in the list

  __device__ __forceinline__ QueryVisit(const BwdParams& params, const BwdWork& work)
      : head(work.head_kv * (params.num_heads / params.num_heads_kv) - 1), m_block(0), slot(0), place(0), line_end(0) {
    find(params, work);
  }
  __device__ __forceinline__ bool exists(const BwdParams& params, const BwdWork& work) const {
    return head < (work.head_kv + 1) * (params.num_heads / params.num_heads_kv);
  }
  __device__ __forceinline__ void advance(const BwdParams& params, const BwdWork& work) {
    ++place;
    find(params, work);
  }
  __device__ __forceinline__ bool is_masked(const BwdWork&) const { return slot >= 0; }
  __device__ __forceinline__ ListedTile tile() const { return {m_block, slot, int(place / Line::kTilesPerBlock)}; }

  // The tile at `place`, or the next one that exists: lines may be empty, the last block of queries may have tiles beyond them.
  __device__ __forceinline__ void find(const BwdParams& params, const BwdWork& work) {
    for (;; ++place) {
      while (place >= line_end) {
        ++head;
        if (!exists(params, work)) return;
        const Line line = Line::of(params.blocks, work.index, head, work.n_block * Config::kBlockN / kMaskBlock);
        place = line.begin;
        line_end = line.end;
      }
      const ListedTile found = Line::tile(params.blocks, place);
      m_block = found.index;
      slot = found.slot;
      if (m_block * Config::kBlockM < params.seqlens_q.num_rows) return;
    }
  }
};

template <class Config>
struct BwdStorage {
  alignas(kSlabRowBytes) uint8_t k[Config::kKeyTileBytes];
  alignas(kSlabRowBytes) uint8_t v[Config::kValueTileBytes];
  alignas(kSlabRowBytes) uint8_t q[Config::kStages][Config::kQueryTileBytes];  // at the end: staging of dK and dV
  alignas(kSlabRowBytes) uint8_t dout[Config::kDoutTiles][Config::kDoutTileBytes];
  // P^T in the first, dS^T in the last: a row for each key, queries in slabs. At the end sums of the bias gradient.
  alignas(kSlabRowBytes) uint8_t scores[Config::kScoreTiles][Config::kScoreTileBytes];
  alignas(16) float lse_log2[Config::kStages][Config::kBlockM];
  alignas(16) float delta[Config::kStages][Config::kBlockM];
  BwdWork work;  // here, since the main loop has no registers for it
};

__device__ __forceinline__ void reduce_add(float* address, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// Deterministic sums of dQ: a tile of keys waits until those before it have added theirs.
__device__ __forceinline__ void wait_for_turn(const int* turns, int turn) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turns) : "memory");
  } while (now != turn);
}
__device__ __forceinline__ void pass_turn(int* turns) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
}

// A warp's packed fragment of 16 keys x (16 * kPairs) queries into its place in P^T or dS^T. `place`: see score_place.
template <class Element, int kPairs, int kTileRows>
__device__ __forceinline__ void store_scores(uint32_t place, const float (&acc)[8 * kPairs]) {
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = staging_source(pair, r);
      const uint32_t address = (place ^ (step_bits(pair) + (r >> 1) * 16)) + pair / kStepsPerSlab * kTileRows * kSlabRowBytes +
                               (r & 1) * 8 * kSlabRowBytes;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(pack_pair<Element>(acc[i], acc[i + 1])) : "memory");
    }
  }
}
template <int kTileRows>
__device__ __forceinline__ uint32_t score_place(uint32_t tile, int first_key, int first_query, int lane) {
  return (tile + first_query / kSlabColumns * kTileRows * kSlabRowBytes + first_key * kSlabRowBytes +
          swizzle_128b(lane / 4 * kSlabRowBytes) + lane % 4 * 4) ^
         (first_query % kSlabColumns * 2);
}

template <class Config>
__device__ __forceinline__ bool find_bwd_work(const BwdParams& params, BwdWork* work) {
  const WorkItem item = params.schedule.item(blockIdx.x);
  // Tiles of keys ascend within a head: the order of a deterministic dQ, and with causal masks the longest come first.
  SequenceBlock place{item.batch, params.schedule.num_m_blocks - 1 - item.m_block};
  if constexpr (Config::Tiles::kListed) place.block = ordered_tile<Config::kBlockN>(params.blocks, place.block);
  if (params.seqlens_k.cu_seqlens != nullptr) {
    place = block_at_slot(params.seqlens_k, params.batch, Config::kBlockN, place.block);
  }
  const Sequence sequence = with_keys_between(sequence_of(params.seqlens_q, params.seqlens_k, place.index), params.key_begin,
                                              params.key_end);
  if (place.block * Config::kBlockN >= sequence.k.num_rows) return false;
  const int stats_row = params.seqlens_q.cu_seqlens == nullptr
                            ? 0
                            : first_slot(params.seqlens_q, place.index, kStatsRowAlignment) * kStatsRowAlignment;
  QueryTiles tiles{};
  if constexpr (Config::Tiles::kListed) {
    static_assert(kMaskBlock % Config::kBlockN == 0, "a tile of keys lies in one block");
  } else {
    tiles = Config::Tiles::template query_tiles<Config::kBlockM, Config::kBlockN>(typename Config::Mask(params.mask), sequence,
                                                                                  place.block);
  }
  *work = {sequence, place.index, place.block, item.head, stats_row, tiles};
  return true;
}

template <class Config>
__device__ __forceinline__ void flash_bwd_sm80(const BwdParams& params) {
  using Element = typename Config::Element;
  using Score = typename Config::Score;
  constexpr int kRowTiles = Config::kWarpKeys / 16, kSumRowTiles = Config::kSumKeys / 16;
  constexpr int kPairsS = Config::kWarpQueries / 16;
  constexpr int kDqRowTiles = Config::kDqRows / 16;
  constexpr int kDqPairs = Config::kDqColumns / 16;
  using QueryCopy = TileCopy<Config::kBlockM, Config::kHeadDim, Config::kNumThreads>;
  using DoutCopy = TileCopy<Config::kBlockM, Config::kPartColumns, Config::kNumThreads>;
  using KeyCopy = TileCopy<Config::kBlockN, Config::kHeadDim, Config::kNumThreads>;
  using ValueCopy = TileCopy<Config::kBlockN, Config::kHeadDimV, Config::kNumThreads>;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  BwdStorage<Config>& shared = *reinterpret_cast<BwdStorage<Config>*>(shared_bytes);

  {
    BwdWork found;
    if (!find_bwd_work<Config>(params, &found)) return;
    if (read_thread() == 0) shared.work = found;
  }
  __syncthreads();
  const BwdWork& work = shared.work;
  const Sequence& sequence = work.sequence;
  const int warp = read_thread() / 32;
  const int warp_key = warp / Config::kWarpsPerGroup * Config::kWarpKeys;     // in the tile
  const int warp_query = warp % Config::kWarpsPerGroup * Config::kWarpQueries;  // in the tile of queries, for S and dP
  const int sum_key = warp / Config::kWarpsPerSumGroup * Config::kSumKeys;      // for dK and dV
  const int sum_column = warp % Config::kWarpsPerSumGroup;                      // in units of a warp's columns
  const uint32_t p_tile = shared_address(shared.scores[0]), ds_tile = shared_address(shared.scores[Config::kScoreTiles - 1]);
  const typename Config::Mask mask(params.mask);

  // The statistics of queries m_block of a head, and its sums of dQ, stand at these rows.
  const auto statistics_of = [&](int head, int m_block) {
    return (int64_t(sequence.q.batch) * params.num_heads + head) * params.stats_rows + work.stats_row +
           m_block * Config::kBlockM;
  };
  const auto load_dout = [&](int head, int m_block, int stage, int part) {
    const int first = m_block * Config::kBlockM;
    DoutCopy::copy(shared_address(shared.dout[stage]), sequence.q.num_rows - first, params.head_dim_v - part * Config::kPartColumns,
                   rows_of(params.dout, params.dout_strides, sequence.q, head) + int64_t{2} * first * params.dout_strides.row +
                       2 * part * Config::kPartColumns,
                   2 * params.dout_strides.row);
  };
  const auto load_queries = [&](int head, int m_block, int stage) {
    const int first = m_block * Config::kBlockM;
    QueryCopy::copy(shared_address(shared.q[stage]), sequence.q.num_rows - first, params.head_dim,
                    rows_of(params.q, params.q_strides, sequence.q, head) + int64_t{2} * first * params.q_strides.row,
                    2 * params.q_strides.row);
    if constexpr (Config::kDoutParts == 1) load_dout(head, m_block, stage, 0);
    const int thread = read_thread();
    constexpr int kCopies = Config::kBlockM / 4;
    const int64_t row = statistics_of(head, m_block) + thread % kCopies * 4;
    if (thread < kCopies) {
      copy_16_bytes(shared_address(&shared.lse_log2[stage][4 * thread]), params.lse_log2 + row, true);
    } else if (thread < 2 * kCopies) {
      copy_16_bytes(shared_address(&shared.delta[stage][4 * (thread - kCopies)]), params.delta + row, true);
    }
  };

  float acc_dk[kSumRowTiles][Config::kWarpColumns / 2], acc_dv[Config::kDoutParts][kSumRowTiles][Config::kWarpColumnsV / 2];
  clear(acc_dk);
#pragma unroll
  for (auto& part : acc_dv) clear(part);
  static_assert(kRowTiles <= 2);
  Score score[2] = {Score(params.score), Score(params.score)};
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    score[r].begin_item(params.score, sequence.k, work.index, work.head_kv,
                        work.n_block * Config::kBlockN + warp_key + 16 * r + acc_row(read_lane(), 0));
  }

  float acc_s[kRowTiles][8 * kPairsS], acc_dp[kRowTiles][8 * kPairsS];
  // S^T of a tile of queries, which lies in `stage`.
  const auto compute_scores = [&](int stage, int lane) {
    clear(acc_s);
    const RowsA<Config::kBlockN> keys(shared_address(shared.k), warp_key, 0, lane);
    const RowsB<Config::kBlockM> queries(shared_address(shared.q[stage]), warp_query, 0, lane);
    multiply<Element, Config::kHeadDim / 16, kPairsS>(
        acc_s, [&](auto& registers, int r, int step) { keys.load(registers, r, step); },
        [&](auto& registers, int step, int pair) { queries.load(registers, pair, step); });
  };
  // dP^T += V dO^T, of a part of the columns.
  const auto add_dp = [&](int stage, int part, int lane) {
    const RowsA<Config::kBlockN> values(shared_address(shared.v), warp_key, part * Config::kPartColumns, lane);
    const RowsB<Config::kBlockM> douts(shared_address(shared.dout[stage]), warp_query, 0, lane);
    multiply<Element, Config::kPartColumns / 16, kPairsS>(
        acc_dp, [&](auto& registers, int r, int step) { values.load(registers, r, step); },
        [&](auto& registers, int step, int pair) { douts.load(registers, pair, step); });
  };
  const auto first_column_of = [&](int lane) { return warp_query + acc_first_col(lane); };  // of the thread, in the tile
  const auto key_of = [&](int r, int lane) {                                                // of the thread's upper row
    return work.n_block * Config::kBlockN + warp_key + 16 * r + acc_row(lane, 0);
  };

  // P^T = exp2(exponents), a column for each query.
  const auto weigh = [&](const QueryVisit<Config>& visit, int stage, int r, int lane) {
    const int first = visit.m_block * Config::kBlockM + first_column_of(lane), key = key_of(r, lane);
    score[r].begin_head(params.score, work.index, visit.head);
    score[r].exponents(acc_s[r], shared_address(&shared.lse_log2[stage][first_column_of(lane)]), first + sequence.diagonal - key);
    if (visit.is_masked(work)) {
      typename HiddenBits<8 * kPairsS>::Word hidden[2];
      if constexpr (Config::Tiles::kListed) {
        load_hidden<Config::kBlockM>(params.blocks, visit.tile(), /*direction=*/1, key % kMaskBlock, lane, hidden);
        // A thread has two of eight queries.
        hidden[0] >>= warp_query / 4;
        hidden[1] >>= warp_query / 4;
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int my_key = key + 8 * half;
          const bool exists = my_key < sequence.k.num_rows;
          const int end = exists ? mask.rows_end(my_key, sequence) - first : 0;
          hidden[half] = HiddenBits<8 * kPairsS>::outside(mask.rows_begin(my_key, sequence) - first, end);
        }
      }
      hide_keys(acc_s[r], hidden);
    }
#pragma unroll
    for (float& x : acc_s[r]) x = fast_exp2(x);
    store_scores<Element, kPairsS, Config::kBlockN>(
        score_place<Config::kBlockN>(p_tile, warp_key + 16 * r, warp_query, lane), acc_s[r]);
  };

  // dS^T = P^T (dP^T - delta), neighbouring queries pair by pair.
  const auto differentiate = [&](const QueryVisit<Config>& visit, int stage, int r, int lane) {
    const uint32_t lse = shared_address(&shared.lse_log2[stage][first_column_of(lane)]);
    const uint32_t delta = shared_address(&shared.delta[stage][first_column_of(lane)]);
    const int distance = visit.m_block * Config::kBlockM + first_column_of(lane) + sequence.diagonal - key_of(r, lane);
    const auto with = [&](auto& of_row, auto softcap) {
#pragma unroll
      for (int i = 0; i < 8 * kPairsS; i += 4) {
        const float2 delta_pair = load_shared_pair(delta + acc_col_offset(i) * 4);
        float2 lse_pair{};
        if constexpr (softcap) lse_pair = load_shared_pair(lse + acc_col_offset(i) * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = i + 2 * half;
          const float2 p{acc_s[r][j], acc_s[r][j + 1]};
          float2 ds{p.x * (acc_dp[r][j] - delta_pair.x), p.y * (acc_dp[r][j + 1] - delta_pair.y)};
          if constexpr (Score::kModifies) of_row.bias_sum[half] += ds.x + ds.y;
          if constexpr (softcap) {
            const float from = static_cast<float>(distance) + float(acc_col_offset(i) - 8 * half);
            ds.x *= of_row.softcap_factor(p.x, lse_pair.x, half, from);
            ds.y *= of_row.softcap_factor(p.y, lse_pair.y, half, from + 1.f);
          }
          acc_s[r][j] = ds.x;
          acc_s[r][j + 1] = ds.y;
        }
      }
    };
    if constexpr (Score::kModifies) {
      if (score[r].numbers.has_softcap()) {
        with(score[r], std::true_type{});
      } else {
        with(score[r], std::false_type{});
      }
    } else {
      with(score[r], std::false_type{});
    }
    store_scores<Element, kPairsS, Config::kBlockN>(
        score_place<Config::kBlockN>(ds_tile, warp_key + 16 * r, Config::kGradientColumn + warp_query, lane), acc_s[r]);
  };

  // dV += P^T dO, of a part of the columns; load_p(registers, row tile, step).
  const auto add_dv = [&](auto& acc, int stage, auto&& load_p, int lane) {
    const ColumnsB<Config::kBlockM> douts(shared_address(shared.dout[stage]), 0, sum_column * Config::kWarpColumnsV, lane);
    multiply<Element, Config::kBlockM / 16, Config::kWarpColumnsV / 16>(
        acc, load_p, [&](auto& registers, int step, int pair) { douts.load(registers, step, pair); });
  };
  // dK += dS^T Q.
  const auto add_dk = [&](int stage, int lane) {
    const RowsA<Config::kBlockN> gradients(ds_tile, sum_key, Config::kGradientColumn, lane);
    const ColumnsB<Config::kBlockM> queries(shared_address(shared.q[stage]), 0, sum_column * Config::kWarpColumns, lane);
    multiply<Element, Config::kBlockM / 16, Config::kWarpColumns / 16>(
        acc_dk, [&](auto& registers, int r, int step) { gradients.load(registers, r, step); },
        [&](auto& registers, int step, int pair) { queries.load(registers, step, pair); });
  };

  // One tile of queries, which lies in `stage`.
  const auto step = [&](const QueryVisit<Config>& visit, int stage) {
    int lane = read_lane();
    compute_scores(stage, lane);
    clear(acc_dp);
    add_dp(stage, 0, lane);
    lane = read_lane();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      weigh(visit, stage, r, lane);
      differentiate(visit, stage, r, lane);
    }
    __syncthreads();
    const RowsA<Config::kBlockN> weights(p_tile, sum_key, 0, lane);
    add_dv(acc_dv[0], stage, [&](auto& registers, int r, int step) { weights.load(registers, r, step); }, lane);
    add_dk(stage, lane);
  };

  // The same with dO in parts, which pass through two tiles: a part's share of dP and dV, while the next one arrives. Q and the
  // first part have arrived; at the end those of the next tile are on their way.
  const auto sliced_step = [&](const QueryVisit<Config>& visit, const QueryVisit<Config>& next, bool more) {
    const int lane = read_lane();
    load_dout(visit.head, visit.m_block, 1, 1);
    commit_copies();
    compute_scores(0, lane);
    clear(acc_dp);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) weigh(visit, 0, r, lane);
    __syncthreads();
    uint32_t p[Config::kBlockM / 16][kSumRowTiles][4];
    const RowsA<Config::kBlockN> weights(p_tile, sum_key, 0, lane);
#pragma unroll
    for (int i = 0; i < Config::kBlockM / 16; ++i) {
#pragma unroll
      for (int r = 0; r < kSumRowTiles; ++r) weights.load(p[i][r], r, i);
    }
#pragma unroll
    for (int part = 0; part < Config::kDoutParts; ++part) {
      if (part > 0) {
        wait_for_copies<0>();
        __syncthreads();
        if (part + 1 < Config::kDoutParts) {
          load_dout(visit.head, visit.m_block, (part + 1) % 2, part + 1);
        } else if (more) {
          load_dout(next.head, next.m_block, 0, 0);
        }
        commit_copies();
      }
      add_dp(part % 2, part, lane);
      add_dv(acc_dv[part], part % 2, [&](auto& registers, int r, int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) registers[i] = p[step][r][i];
      }, lane);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) differentiate(visit, 0, r, lane);
    __syncthreads();
    add_dk(0, lane);
    __syncthreads();  // every warp has read Q
    if (more) load_queries(next.head, next.m_block, 0);
    commit_copies();
  };

  // dQ of the tile whose dS^T lies in shared memory: added to the sum in memory.
  const auto add_dq = [&](const QueryVisit<Config>& visit) {
    if (params.dq_blocks == nullptr) return;
    const int lane = read_lane();
    const int row = warp / Config::kDqColumnWarps * Config::kDqRows;
    const int column = warp % Config::kDqColumnWarps * Config::kDqColumns;
    float acc_dq[kDqRowTiles][8 * kDqPairs];
    clear(acc_dq);
    const ColumnsA<Config::kBlockN> gradients(ds_tile, 0, Config::kGradientColumn + row, lane);
    const ColumnsB<Config::kBlockN> keys(shared_address(shared.k), 0, column, lane);
    multiply<Element, Config::kBlockN / 16, kDqPairs>(
        acc_dq, [&](auto& registers, int r, int step) { gradients.load(registers, step, r); },
        [&](auto& registers, int step, int pair) { keys.load(registers, step, pair); });

    // 64 rows of a head are a row of blocks. The turns of the first block serve all of them, or those of the first ones the
    // tiles of queries that share it.
    const int64_t row_block = (statistics_of(visit.head, visit.m_block) + row) / kDqBlockRows;
    const int first_in_block = visit.m_block * Config::kBlockM % kDqBlockRows;
    float* block = params.dq_blocks +
                   (row_block * Config::kDqColumnBlocks + column / kDqBlockColumns) * kDqBlockFloats +
                   dq_scalar_offset((first_in_block + row) % kDqBlockRows / 16 * 32 + lane, column % kDqBlockColumns / 2);
    int* turns = nullptr;
    if (params.dq_turns != nullptr) {
      turns = params.dq_turns + statistics_of(visit.head, visit.m_block) / kDqBlockRows * Config::kDqColumnBlocks +
              first_in_block / Config::kBlockM;
      // How many tiles of keys add to this tile of queries before this one.
      int turn;
      if constexpr (Config::Tiles::kListed) {
        turn = listed_turn<Config::kBlockN>(params.blocks, visit.tile(), work.n_block);
      } else {
        const int first_query = visit.m_block * Config::kBlockM;
        const KeyTiles before = Config::Tiles::template key_tiles<Config::kBlockN>(
            mask, sequence, first_query, min_of(first_query + Config::kBlockM, sequence.q.num_rows) - 1);
        turn = work.n_block - (before.end - before.num_tiles);
      }
      if (read_thread() == 0) wait_for_turn(turns, turn);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kDqRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 8 * kDqPairs; ++i) reduce_add(block + dq_scalar_offset(32 * r, i), acc_dq[r][i]);
    }
    if (turns != nullptr) {
      __threadfence();
      __syncthreads();
      if (read_thread() == 0) pass_turn(turns);
    }
  };

  QueryVisit<Config> visit(params, work);
  if (visit.exists(params, work)) {
    const int first_key = work.n_block * Config::kBlockN;
    const int rows_left = sequence.k.num_rows - first_key;
    KeyCopy::copy(shared_address(shared.k), rows_left, params.head_dim,
                  rows_of(params.k, params.k_strides, sequence.k, work.head_kv) + int64_t{2} * first_key * params.k_strides.row,
                  2 * params.k_strides.row);
    ValueCopy::copy(shared_address(shared.v), rows_left, params.head_dim_v,
                    rows_of(params.v, params.v_strides, sequence.k, work.head_kv) + int64_t{2} * first_key * params.v_strides.row,
                    2 * params.v_strides.row);
    load_queries(visit.head, visit.m_block, 0);
    if constexpr (Config::kDoutParts > 1) load_dout(visit.head, visit.m_block, 0, 0);
    commit_copies();
    int stage = 0;
    bool more = true;
#pragma unroll 1
    while (more) {
      QueryVisit<Config> next = visit;
      next.advance(params, work);
      more = next.exists(params, work);
      wait_for_copies<0>();
      __syncthreads();
      if constexpr (Config::kDoutParts > 1) {
        sliced_step(visit, next, more);
      } else if constexpr (Config::kStages == 2) {
        if (more) load_queries(next.head, next.m_block, stage ^ 1);
        commit_copies();
        step(visit, stage);
        stage ^= 1;
      } else {
        step(visit, 0);
        __syncthreads();  // every warp has read Q and dO
        if (more) load_queries(next.head, next.m_block, 0);
        commit_copies();
      }
      add_dq(visit);
      visit = next;
    }
  }
  __syncthreads();  // every warp has read Q, which becomes the staging

  const int lane = read_lane();
  const int first_key = work.n_block * Config::kBlockN;
  const uint32_t staging = shared_address(shared.q) + warp * kStagingBytesPerWarp;
  const auto store = [&](const auto& acc, void* gradient, const RowStrides& strides, int num_columns, int first_column) {
    if (gradient == nullptr) return;
    Element* first = static_cast<Element*>(gradient) + sequence.k.batch * strides.batch +
                     sequence.k.first_row * strides.row + work.head_kv * strides.head + first_column;
    constexpr int kColumns = 2 * std::extent_v<std::remove_reference_t<decltype(acc[0])>>;
    for (int r = 0; r < kSumRowTiles; ++r) {
      const int row_of_tile = first_key + sum_key + 16 * r;
      store_warp_rows<Element>(acc[r], staging, lane, min_of(num_columns - first_column, kColumns),
                               [&](int row_of_warp) -> Element* {
                                 const int row = row_of_tile + row_of_warp;
                                 return row < sequence.k.num_rows ? first + row * strides.row : nullptr;
                               });
    }
  };
#pragma unroll
  for (int part = 0; part < Config::kDoutParts; ++part) {
    store(acc_dv[part], params.dv, params.dv_strides, params.head_dim_v,
          part * Config::kPartColumns + sum_column * Config::kWarpColumnsV);
  }
#pragma unroll
  for (int r = 0; r < kSumRowTiles; ++r) {
#pragma unroll
    for (float& x : acc_dk[r]) x *= params.score.softmax_scale;
  }
  store(acc_dk, params.dk, params.dk_strides, params.head_dim, sum_column * Config::kWarpColumns);

  if constexpr (Score::kModifies) {
    if (params.dk_bias == nullptr) return;
    // The four threads of a row, then the warps that share the keys.
    float* sums = reinterpret_cast<float*>(shared.scores[Config::kScoreTiles - 1]);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = score[r].bias_sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int key = warp_key + 16 * r + acc_row(lane, half);
        if (lane % 4 == 0) sums[warp % Config::kWarpsPerGroup * Config::kBlockN + key] = sum;
      }
    }
    __syncthreads();
    const int thread = read_thread();
    if (thread >= Config::kBlockN || first_key + thread >= sequence.k.num_rows) return;
    float sum = 0.f;
#pragma unroll
    for (int part = 0; part < Config::kWarpsPerGroup; ++part) sum += sums[part * Config::kBlockN + thread];
    const RowStrides& strides = params.dk_bias_strides;
    params.dk_bias[sequence.k.batch * strides.batch + work.head_kv * strides.head + sequence.k.first_row + first_key + thread] = sum;
  }
}

// kernel: the variant's entry, an instance of flash_bwd_sm80<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_bwd(Kernel* kernel, BwdParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BwdStorage<Config>);
  static_assert(kSharedBytes <= bytes_of(Config::kLimit), "the tile does not fit the devices that it is made for");

  const bool packed = params.seqlens_k.cu_seqlens != nullptr;
  const int num_n_blocks = Config::Tiles::kListed ? num_ordered_tiles(params.seqlens_k.num_rows, Config::kBlockN)
                           : packed ? num_slots(params.seqlens_k.num_rows, params.batch, Config::kBlockN)
                                    : ceil_div(params.seqlens_k.num_rows, Config::kBlockN);
  const int grid_batch = packed ? 1 : params.batch;
  const int64_t num_items = int64_t(num_n_blocks) * params.num_heads_kv * grid_batch;
  if (num_items == 0) return cudaSuccess;
  if (num_items > INT_MAX) return cudaErrorInvalidConfiguration;
  // What the tiles of keys of one head read again and again: Q and dO of its query heads, and their sums of dQ.
  const int64_t bytes_per_row = (params.head_dim + params.head_dim_v) * 2 + params.head_dim * 4;
  const int64_t bytes = int64_t(params.seqlens_q.num_rows) * bytes_per_row * (params.num_heads / params.num_heads_kv);
  params.schedule = make_schedule(num_n_blocks, grid_batch, params.num_heads_kv, params.num_heads_kv, bytes);

  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_items)),
                          dim3(Config::kNumThreads), arguments, kSharedBytes, stream);
}

}  // namespace flash_ext::sm80
