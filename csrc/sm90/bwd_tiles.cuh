// Sizes, shared memory and the order of work of the Hopper backward (bwd.cuh).
#pragma once

#include "common/bwd_scores.cuh"
#include "common/dq_blocks.cuh"
#include "common/masks.cuh"
#include "common/params.h"
#include "common/scheduler.cuh"
#include "common/scores.cuh"
#include "common/seqlens.cuh"
#include "common/swizzle.cuh"
#include "common/tiles.cuh"
#include "sm90/pipeline.cuh"

namespace flash_ext::sm90 {

constexpr int kBwdConsumers = 2;  // warpgroups
constexpr int kBwdThreads = (1 + kBwdConsumers) * 128;
constexpr int kBwdMaxSharedBytes = 227 * 1024;

// Who works on an item: a CTA on a tile of keys, or a pair of CTAs on two neighbouring tiles, which exchanges dS
// (bwd_cluster.cuh) so that dQ of both tiles is added to memory once.
struct SingleCta {
  static constexpr int kCtas = 1;
};
struct CtaPair {
  static constexpr int kCtas = 2;
};

// What a CTA forms of dQ: all of its tiles; over the keys of both CTAs, all of every other tile of queries, or half of the
// columns of each.
enum class DqShare { kAll, kEveryOtherTile, kHalfColumns };

// Tile sizes by head dims. kBlockN = 128: each consumer owns 64 keys, and their dK and dV (64 x (head_dim + head_dim_v)
// numbers) stay in its registers. kBlockN = 64, where those do not fit: the consumers share the keys, one owns dK, the
// other dV.
template <int kHeadDim, int kHeadDimV, class Cluster = SingleCta>
struct BwdTile;
template <>
struct BwdTile<64, 64> {
  static constexpr int kBlockM = 128, kBlockN = 128, kStagesQ = 2, kStagesDout = 2, kStagesDs = 2;
};
template <>
struct BwdTile<96, 96> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStagesQ = 2, kStagesDout = 2, kStagesDs = 2;
};
template <>
struct BwdTile<128, 128> : BwdTile<96, 96> {};
template <>
struct BwdTile<192, 128> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStagesQ = 2, kStagesDout = 2, kStagesDs = 1;
};
template <>
struct BwdTile<192, 192> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStagesQ = 2, kStagesDout = 2, kStagesDs = 2;
};
template <>
struct BwdTile<256, 256> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStagesQ = 2, kStagesDout = 1, kStagesDs = 1;
};
template <>
struct BwdTile<128, 128, CtaPair> : BwdTile<128, 128> {};
template <>
struct BwdTile<256, 256, CtaPair> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStagesQ = 2, kStagesDout = 1, kStagesDs = 2;
};

// A kernel for every head_dim up to kHeadDim and head_dim_v up to kHeadDimV: TMA fills the other columns with zeros.
template <class Element_, int kHeadDim_, int kHeadDimV_, class Mask_, class Score_, class Cluster_ = SingleCta>
struct BwdConfig : BwdTile<kHeadDim_, kHeadDimV_, Cluster_> {
  using Cluster = Cluster_;
  using Tile = BwdTile<kHeadDim_, kHeadDimV_, Cluster>;
  using Element = Element_;
  using Mask = Mask_;
  using Score = typename BackwardOf<Score_>::Type;
  using Tiles = typename TilesOf<Mask>::Type;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kNumThreads = kBwdThreads;
  static constexpr int kMinBlocksPerSm = 1;
  // Whether a consumer owns 64 keys (else the consumers share 64 keys, and each has half of the queries of S and dP).
  static constexpr bool kOwnsKeys = Tile::kBlockN == kBwdConsumers * kRowsPerWarpgroup;
  // A pair's producer and writers keep more numbers.
  static constexpr int kProducerRegisters = Cluster::kCtas == 2 ? 40 : 24;
  static constexpr int kConsumerRegisters = Cluster::kCtas == 2 ? 232 : 240;
  // dK and dV leave no registers for S and dP side by side: dP is computed after S, and dS from the rounded P.
  static constexpr bool kOneScoreTile = kOwnsKeys && kHeadDim + kHeadDimV > 256;
  static constexpr bool kSparesRegisters = kOneScoreTile || Score::kModifies;
  // P is rounded after dS, and dV issued with dK: the registers of S and dP then become those of P, dS and dQ.
  static constexpr bool kLateDv = Cluster::kCtas == 2 && kOwnsKeys;
  // Descriptors are computed anew in each trip, from a base that the compiler cannot see through.
  static constexpr bool kHidesBase = kSparesRegisters || kHeadDim == 256 || Cluster::kCtas == 2;
  // Which gradients the kernel forms.
  static constexpr bool kWantsDq = true, kWantsDkv = true;
  static constexpr int kQueriesPerConsumer = kOwnsKeys ? Tile::kBlockM : Tile::kBlockM / kBwdConsumers;
  // Bytes of a tile with this many rows, in whole slabs.
  static constexpr int kQueryTileBytes = Tile::kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kDoutTileBytes = Tile::kBlockM * num_slabs(kHeadDimV) * kSlabRowBytes;
  static constexpr int kKeyTileBytes = Tile::kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kValueTileBytes = Tile::kBlockN * num_slabs(kHeadDimV) * kSlabRowBytes;
  // dS^T (and P^T): a row for each key, queries in slabs.
  static constexpr int kScoreTileBytes = Tile::kBlockN * num_slabs(Tile::kBlockM) * kSlabRowBytes;
  static constexpr int kStatsBytes = Tile::kBlockM * 4;
  // dQ of a tile, in blocks: row block u / kDqColumnBlocks, column block u % kDqColumnBlocks.
  static constexpr int kDqColumnBlocks = num_slabs(kHeadDim);
  static constexpr int kDqBlocks = Tile::kBlockM / kDqBlockRows * kDqColumnBlocks;
  static constexpr bool kPaired = Cluster::kCtas == 2;
  static constexpr int kItemKeys = Cluster::kCtas * Tile::kBlockN;
  static constexpr DqShare kDqShare = !kPaired    ? DqShare::kAll
                                      : kOwnsKeys ? DqShare::kEveryOtherTile
                                                  : DqShare::kHalfColumns;
  // P beside dS, where P is in shared memory. A pair has no room for a second one.
  static constexpr int kStagesP = kDqShare == DqShare::kHalfColumns ? 1 : Tile::kStagesDs;
  // A block of dQ goes out in this many pieces: a pair's shared memory holds the peer's keys and dS too.
  static constexpr int kDqPieces = kPaired ? 2 : 1;
  static constexpr int kDqPieceBytes = kDqBlockBytes / kDqPieces;
  // Slabs of the peer's keys that dQ needs.
  static constexpr int kPeerKeySlabs = kDqShare == DqShare::kHalfColumns ? kDqColumnBlocks / 2 : kDqColumnBlocks;

  static_assert(Tile::kBlockM % kDqBlockRows == 0 && kStatsRowAlignment % Tile::kBlockM == 0,
                "tiles of queries are blocks of dQ, and never straddle two sequences");
  static_assert(kOwnsKeys || (Tile::kBlockN == kRowsPerWarpgroup && kHeadDim == kHeadDimV),
                "consumers that share 64 keys accumulate dK and dV with the same instructions");
  static_assert(!kPaired || kPeerKeySlabs == kBwdConsumers, "each consumer of a pair forms one block of dQ at a time");
  static_assert(!kPaired || (Tile::kStagesDs == 2 && !Score::kModifies && !Tiles::kListed), "what pairs are written for");
};

// Kernels for inputs without a gradient, that leave out the products of what is not wanted: of frozen k and v, and of frozen q.
// A branch in the kernel that has all products would cost it registers, and ptxas would serialise the products.
template <class Config>
struct DqAlone : Config {
  static constexpr bool kWantsDkv = false;
};
template <class Config>
struct DkvAlone : Config {
  static constexpr bool kWantsDq = false;
};

template <bool kPresent, int kStages, int kBytes>
struct ScoreTiles {
  uint8_t stage[kStages][kBytes];
};
template <int kStages, int kBytes>
struct ScoreTiles<false, kStages, kBytes> {};

template <class Config, class Cluster = typename Config::Cluster>
struct PairTiles {};
template <class Config>
struct PairTiles<Config, CtaPair> {
  uint8_t k[Config::kPeerKeySlabs * Config::kBlockN * kSlabRowBytes];  // slabs of the peer's tile of keys
  uint8_t ds[Config::kScoreTileBytes];                                 // dS^T of its keys, which it sends
};

template <class Config, class Cluster = typename Config::Cluster>
struct PairBarriers {};
template <class Config>
struct PairBarriers<Config, CtaPair> {
  // kEveryOtherTile only: 8 arrivals, lane 0 of each consumer warp, when its part of dS of a tile whose dQ is formed here is
  // written; the consumers wait.
  uint64_t ds_full;
  // 1 arrival (a consumer's expect_tx) and the bytes that the peer sends; the consumers wait.
  uint64_t peer_ds_full;
  // By stage of dS, and each before it is written again. 0, kEveryOtherTile only: 8 arrivals, lane 0 of each consumer warp, when
  // the dQ formed here is complete; the consumers wait. 1: 8 arrivals of the peer's consumer warps, when dQ of what was sent is
  // complete; who sends waits.
  uint64_t empty[2];
};

template <bool kPresent>
struct BiasSums {
  float of_keys[kRowsPerWarpgroup];
};
template <>
struct BiasSums<false> {};

template <class Config>
struct BwdStorage {
  alignas(kSwizzleGroupBytes) uint8_t k[Config::kKeyTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t v[Config::kValueTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t q[Config::kStagesQ][Config::kQueryTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t dout[Config::kStagesDout][Config::kDoutTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t ds[Config::kStagesDs][Config::kScoreTileBytes];
  alignas(kSwizzleGroupBytes) ScoreTiles<!Config::kOwnsKeys, Config::kStagesP, Config::kScoreTileBytes> p;
  alignas(kSwizzleGroupBytes) PairTiles<Config> peer;
  alignas(kSwizzleGroupBytes) uint8_t dq[kBwdConsumers][Config::kDqPieceBytes];  // of each consumer, on its way out
  alignas(128) float lse_log2[Config::kStagesQ][Config::kBlockM];
  alignas(128) float delta[Config::kStagesDout][Config::kBlockM];
  BiasSums<Config::Score::kModifies && !Config::kOwnsKeys> bias;  // consumer 1's part of dk_bias, on its way to consumer 0
  // Who arrives, how many, who waits: see RingBarriers. The statistics travel with Q and dO.
  RingBarriers<1> k_ring, v_ring;
  RingBarriers<Config::kStagesQ> q_ring;
  RingBarriers<Config::kStagesDout> dout_ring;
  // full: 4 arrivals, one of each warp of the consumer, when its part of the block is written; the consumer's dQ writer waits.
  // empty: 1 arrival, of the writer when the block has been read; the consumer waits.
  RingBarriers<1> dq_ring[kBwdConsumers];
  PairBarriers<Config> pair;
};

// Of this CTA in its pair.
template <class Config>
__device__ __forceinline__ uint32_t rank_in_pair() {
  return blockIdx.x % Config::Cluster::kCtas;
}

// One tile of keys of one KV head; of a pair's two neighbouring tiles, this CTA's.
struct KeyItem {
  Sequence sequence;  // with the keys of the launch alone
  int index;          // of the sequence in the batch
  int n_block;
  int group;          // of tiles: n_block, or of a pair half of that
  int head_kv;
  int round;  // of the CTA
};

// Tiles of queries of an item that lists tell: where they stand follows from the item.
struct ListedColumn {};

// Lists are of dense batches, whole: what is known of a sequence takes no registers.
template <class Config>
__device__ __forceinline__ Sequence key_sequence(const BwdParams& params, int index) {
  if constexpr (Config::Tiles::kListed) {
    const int num_q = params.seqlens_q.num_rows, num_k = params.seqlens_k.num_rows;
    return {{0, num_q, index}, {0, num_k, index}, num_k - num_q};
  } else {
    return with_keys_between(sequence_of(params.seqlens_q, params.seqlens_k, index), params.key_begin, params.key_end);
  }
}

// Of the schedule's order, for a CTA's round.
template <class Config>
__device__ __forceinline__ int item_index(int round) {
  constexpr int kCtas = Config::Cluster::kCtas;
  return Schedule::index(round, blockIdx.x / kCtas, gridDim.x / kCtas);
}

template <class Config>
__device__ __forceinline__ KeyItem key_item(const BwdParams& params, int round) {
  const Schedule& schedule = params.schedule;
  const WorkItem work = schedule.item(item_index<Config>(round));
  SequenceBlock place{work.batch, schedule.num_m_blocks - 1 - work.m_block};
  if constexpr (Config::Tiles::kListed) {
    place.block = ordered_tile<Config::kBlockN>(params.blocks, place.block);
  } else if (params.seqlens_k.cu_seqlens != nullptr) {
    place = block_at_slot(params.seqlens_k, params.batch, Config::kItemKeys, place.block);
  }
  const int n_block = place.block * Config::Cluster::kCtas + static_cast<int>(rank_in_pair<Config>());
  return {key_sequence<Config>(params, place.index), place.index, n_block, place.block, work.head, round};
}

// The items of one CTA in order, the same for every role: function(item, tiles of queries). Tiles of keys ascend within
// a head (those of lists in their own order), which is the order of a deterministic dQ and begins with the longest.
template <class Config, class Function>
__device__ __forceinline__ void for_each_key_item(const BwdParams& params, Function&& function) {
  for (int round = 0; item_index<Config>(round) < params.schedule.num_items(); ++round) {
    const KeyItem item = key_item<Config>(params, round);
    const Sequence& sequence = item.sequence;
    if (item.group * Config::kItemKeys >= sequence.k.num_rows) continue;
    if constexpr (Config::Tiles::kListed) {
      static_assert(kMaskBlock % Config::kBlockN == 0, "a tile of keys lies in one block");
      function(item, ListedColumn{});
    } else {
      const typename Config::Mask mask(params.mask);
      QueryTiles tiles = Config::Tiles::template query_tiles<Config::kBlockM, Config::kItemKeys>(mask, sequence, item.group);
      if constexpr (Config::kPaired) {
        // Both visit what either's keys are seen by; a CTA whose tile lies beyond the keys hides all of it.
        QueryTiles mine{};
        if (item.n_block * Config::kBlockN < sequence.k.num_rows) {
          mine = Config::Tiles::template query_tiles<Config::kBlockM, Config::kBlockN>(mask, sequence, item.n_block);
        }
        tiles.full_begin = mine.full_begin;
        tiles.full_end = mine.full_end;
      }
      function(item, tiles);
    }
  }
}

// The tiles of queries of an item, head by head: function(query head, m_block, visit), visit the ListedTile of lists.
template <class Config, class Tiles, class Function>
__device__ __forceinline__ void for_each_query_tile(const BwdParams& params, const KeyItem& item, const Tiles& tiles,
                                                    Function&& function) {
  const int q_heads_per_kv = params.num_heads / params.num_heads_kv;
  for (int head = item.head_kv * q_heads_per_kv; head < (item.head_kv + 1) * q_heads_per_kv; ++head) {
    if constexpr (Config::Tiles::kListed) {
      using Line = ListedLine<Config::kBlockM>;
      const Line line = Line::of(params.blocks, item.index, head, item.n_block * Config::kBlockN / kMaskBlock);
      for (uint32_t place = line.begin; place < line.end; ++place) {
        const ListedTile tile = Line::tile(params.blocks, place);
        // The last block of queries may have tiles beyond them.
        if (tile.index * Config::kBlockM < params.seqlens_q.num_rows) function(head, tile.index, tile);
      }
    } else {
      for (int m_block = tiles.begin; m_block < tiles.end; ++m_block) function(head, m_block, 0);
    }
  }
}

// Row of a sequence's first query among the statistics of a head.
__device__ __forceinline__ int stats_first_row(const BwdParams& params, int sequence_index) {
  if (params.seqlens_q.cu_seqlens == nullptr) return 0;
  return first_slot(params.seqlens_q, sequence_index, kStatsRowAlignment) * kStatsRowAlignment;
}

}  // namespace flash_ext::sm90
