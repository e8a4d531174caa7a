// Hopper forward: out = softmax(scale * Q K^T) V and its log-sum-exp. Timeline, barriers, memory: docs/fwd_sm90.md.
//
// A persistent CTA takes tiles of kBlockM queries. Warpgroup 0 is the producer: one thread copies Q, K and V by TMA
// into rings of stages. Each other warpgroup owns 64 rows of Q and, per tile of kBlockN keys, computes S = Q K^T, the
// online softmax and O += P V, with S, P and O in registers. Two overlaps keep the tensor cores busy during softmax:
// within a warpgroup, S of the next tile and P V of the previous one are issued before the softmax of the next tile;
// between warpgroups, a token (NamedBarrier::kTurn0) lets one issue its products while the others do softmax.
#pragma once

#include <cstddef>

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
#include "host/tma.h"
#include "sm90/barriers.h"
#include "sm90/copies.cuh"
#include "sm90/items.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

// Tile sizes by head dims, mask and score: registers bound S + P + O of a consumer thread and what masks and scores need
// beside them, shared memory the stages.
template <int kBlockM_, int kBlockN_, int kStages_, int kStagesQ_>
struct TileSizes {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_, kStagesQ = kStagesQ_;
};

template <int kHeadDim, int kHeadDimV, class Mask, class Score>
struct FwdTile;
template <class Mask, class Score>
struct FwdTile<64, 64, Mask, Score> : TileSizes<192, 128, 4, 2> {};
template <class Mask>
struct FwdTile<64, 64, Mask, ModifiedScore> : TileSizes<128, 128, 4, 2> {};  // three consumers have no registers for it
template <class Mask, class Score>
struct FwdTile<128, 128, Mask, Score> : TileSizes<128, 128, 2, 2> {};
template <class Score>
struct FwdTile<128, 128, FullMask, Score> : TileSizes<128, 176, 2, 1> {};
// Its slabs are those of 128; three consumers have no registers for it.
template <class Mask, class Score>
struct FwdTile<96, 96, Mask, Score> : FwdTile<128, 128, Mask, Score> {};
template <class Mask, class Score>
struct FwdTile<192, 128, Mask, Score> : TileSizes<128, 128, 2, 1> {};
template <class Mask, class Score>
struct FwdTile<192, 192, Mask, Score> : TileSizes<128, 112, 2, 1> {};
template <class Mask>
struct FwdTile<192, 192, Mask, ModifiedScore> : TileSizes<128, 96, 2, 1> {};
template <class Mask, class Score>
struct FwdTile<256, 256, Mask, Score> : TileSizes<128, 80, 2, 1> {};
template <class Score>
struct FwdTile<256, 256, LocalMask, Score> : TileSizes<128, 64, 2, 1> {};
// A tile holds a whole group of short sequences, queries and keys.
template <>
struct FwdTile<64, 64, SegmentMask, PlainScore> : TileSizes<128, 128, 4, 2> {};
// Tiles of listed blocks divide a block of the mask.
template <>
struct FwdTile<64, 64, BlockMask, PlainScore> : TileSizes<128, 128, 4, 2> {};
template <>
struct FwdTile<64, 64, BlockMask, ModifiedScore> : TileSizes<128, 128, 4, 2> {};
template <>
struct FwdTile<192, 128, BlockMask, ModifiedScore> : TileSizes<128, 64, 4, 1> {};
template <>
struct FwdTile<192, 192, BlockMask, PlainScore> : TileSizes<128, 64, 3, 1> {};
template <>
struct FwdTile<192, 192, BlockMask, ModifiedScore> : TileSizes<128, 64, 3, 1> {};
template <class Score>
struct FwdTile<256, 256, BlockMask, Score> : TileSizes<128, 64, 2, 1> {};

// Producer policy: what the producer warpgroup does.
struct TmaProducer {
  static constexpr int kArrivals = 1;  // on a full barrier of K or V, beside the bytes
  template <class Config, class Shared>
  __device__ __forceinline__ static void run(const FwdParams& params, Shared& shared, int warp);
};

// A kernel for every head_dim up to kHeadDim and head_dim_v up to kHeadDimV: TMA fills the other columns with zeros.
template <class Element_, int kHeadDim_, int kHeadDimV_, class Mask_, class Score_ = PlainScore>
struct FwdConfig : FwdTile<kHeadDim_, kHeadDimV_, Mask_, Score_> {
  using Tile = FwdTile<kHeadDim_, kHeadDimV_, Mask_, Score_>;
  using Element = Element_;
  using Mask = Mask_;
  using Score = Score_;
  using Tiles = typename TilesOf<Mask>::Type;
  using Params = FwdParams;
  using Work = ScheduledWork;
  using Producer = TmaProducer;
  using Output = DenseOutput<Element>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kNumConsumers = Tile::kBlockM / kRowsPerWarpgroup;  // warpgroups
  static constexpr int kNumThreads = (1 + kNumConsumers) * kThreadsPerWarpgroup;
  static constexpr int kMinBlocksPerSm = 1;
  // setmaxnreg; together they fit the register file, 65536 / kNumThreads registers at launch.
  static constexpr bool kMovesRegisters = true;
  static constexpr int kProducerRegisters = kNumConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kNumConsumers == 2 ? 240 : 160;
  // Bytes of a tile with this many rows, in whole slabs.
  static constexpr int kQueryTileBytes = Tile::kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kKeyTileBytes = Tile::kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kValueTileBytes = Tile::kBlockN * num_slabs(kHeadDimV) * kSlabRowBytes;
  static constexpr int kRingBytes =
      Tile::kStagesQ * kQueryTileBytes + Tile::kStages * (kKeyTileBytes + kValueTileBytes);
  static constexpr int kStagingAreas = kNumConsumers * 4;
  static constexpr int kStagingBytes = kStagingAreas * kStagingBytesPerWarp;
  // Where no room is left for staging the output (the last kilobyte holds the barriers), each warp stages it in its own
  // rows of Q.
  static constexpr bool kStagesInQuery = kRingBytes + kStagingBytes + kSwizzleGroupBytes > kMaxSharedBytes;

  static_assert(Tile::kBlockM % kRowsPerWarpgroup == 0, "a consumer warpgroup owns 64 rows");
  static_assert(kNumConsumers == 2 || kNumConsumers == 3, "the register budget is made for 2 or 3 consumers");
  static_assert(Tile::kBlockN % 16 == 0, "P V steps through 16 keys at a time");
  static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "head dims fill halves of slabs");
  static_assert(!kStagesInQuery || Tile::kStagesQ == 1, "more stages of Q than there is room for");
};

template <bool kPresent, int kAreas>
struct OutputStaging {
  uint8_t areas[kAreas][kStagingBytesPerWarp];
};
template <int kAreas>
struct OutputStaging<false, kAreas> {};

template <class Config>
struct SharedStorage {
  alignas(kSwizzleGroupBytes) uint8_t q[Config::kStagesQ][Config::kQueryTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t k[Config::kStages][Config::kKeyTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t v[Config::kStages][Config::kValueTileBytes];
  alignas(kSwizzleGroupBytes) OutputStaging<!Config::kStagesInQuery, Config::kStagingAreas> out;
  // Who arrives, how many, who waits: see RingBarriers.
  RingBarriers<Config::kStagesQ> q_ring;
  RingBarriers<Config::kStages> k_ring;
  RingBarriers<Config::kStages> v_ring;
  // What the end of an item needs of it waits here, a copy for each consumer warp: registers are short in the main loop.
  QueryTile items[4 * Config::kNumConsumers];
};

// ---- producer: one warp, of which one thread copies ----

template <class Config>
__device__ __forceinline__ void produce(const FwdParams& params, SharedStorage<Config>& shared) {
  const bool elected = elect_one();
  RingState<Config::kStagesQ> q_state;
  RingState<Config::kStages> k_state, v_state;

  const auto copy_item = [&](const QueryTile& queries, const auto& tiles) {
    if (tiles.num_tiles == 0) {
      if constexpr (Config::kStagesInQuery) {  // the buffer without a copy, for the zeros that leave through it
        shared.q_ring.begin_fill(q_state, 0);
        q_state.advance();
      }
      return;
    }
    const RowRange& keys = queries.sequence.k;
    const auto load_k = [&](int i) {
      shared.k_ring.begin_fill(k_state, Config::kKeyTileBytes);
      load_rows<Config::kBlockN, Config::kHeadDim>(params.k_tma, &shared.k_ring.full[k_state.stage], shared.k[k_state.stage],
                                                   keys, tiles.n_block(i) * Config::kBlockN, queries.head_kv,
                                                   CacheHint::kEvictLast);
      k_state.advance();
    };
    const auto load_v = [&](int i) {
      shared.v_ring.begin_fill(v_state, Config::kValueTileBytes);
      load_rows<Config::kBlockN, Config::kHeadDimV>(params.v_tma, &shared.v_ring.full[v_state.stage],
                                                    shared.v[v_state.stage], keys, tiles.n_block(i) * Config::kBlockN,
                                                    queries.head_kv, CacheHint::kEvictLast);
      v_state.advance();
    };

    load_k(0);
    shared.q_ring.begin_fill(q_state, Config::kQueryTileBytes);
    load_queries<Config::kBlockM, Config::kHeadDim>(params.q_tma, &shared.q_ring.full[q_state.stage],
                                                    shared.q[q_state.stage], queries, CacheHint::kEvictFirst);
    q_state.advance();
    // In the order of consumption: V follows one step behind K.
    for (int i = 1; i < tiles.num_tiles; ++i) {
      load_k(i);
      load_v(i - 1);
    }
    load_v(tiles.num_tiles - 1);
  };

  for_each_item<Config>(params, read_lane(), [&](const QueryTile& queries, const auto& tiles) {
    if (elected) copy_item(queries, tiles);
    __syncwarp();
  });
}

template <class Config, class Shared>
__device__ __forceinline__ void TmaProducer::run(const FwdParams& params, Shared& shared, int warp) {
  if (warp == 0) produce<Config>(params, shared);
}

// ---- consumers: 64 rows each ----

template <class Config>
__device__ __forceinline__ void consume(const typename Config::Params& params, SharedStorage<Config>& shared,
                                        int warpgroup) {
  using Element = typename Config::Element;
  using Score = typename Config::Score;
  using Shared = SharedStorage<Config>;
  constexpr int kNumAccS = Config::kBlockN / 2;
  constexpr int kNumAccO = Config::kHeadDimV / 2;
  constexpr int kTurnThreads = 2 * kThreadsPerWarpgroup;
  constexpr bool kTakesTurns = Config::kNumConsumers > 1;
  const int thread = threadIdx.x % kThreadsPerWarpgroup;
  const int lane = thread % 32;
  const bool elected = lane == 0;
  const int warp_row = warpgroup * kRowsPerWarpgroup + thread / 32 * kRowsPerWarp;  // within the tile of queries
  const auto staging_area = [&]() -> uint32_t {
    if constexpr (Config::kStagesInQuery) {
      return shared_address(shared.q[0]) + warp_row * kSlabRowBytes;  // the warp's rows of the first slab
    } else {
      return shared_address(shared.out.areas[warpgroup * 4 + thread / 32]);
    }
  };
  const uint32_t staging = staging_area();
  // Shuffles whose results the compiler cannot derive again: barrier numbers and descriptors then stay in registers
  // instead of being computed anew for every tile.
  const int my_index = __shfl_sync(0xffffffffu, threadIdx.x / kThreadsPerWarpgroup - 1, lane);
  const int my_turn = turn_of(my_index);
  const int next_turn = turn_of(my_index + 1 == Config::kNumConsumers ? 0 : my_index + 1);

  const typename Config::Mask mask(params.mask);
  const FoldedScale scale = fold_scale(params.score.softmax_scale);
  const float softmax_scale = Score::kModifies ? 1.f : scale.log2_scale;
  // Descriptors start from the base of shared memory, so that one register serves all of them. Units of 16 bytes.
  constexpr uint32_t kQueries = offsetof(Shared, q) / 16, kQueryStage = sizeof(shared.q[0]) / 16;
  constexpr uint32_t kKeys = offsetof(Shared, k) / 16, kKeyStage = sizeof(shared.k[0]) / 16;
  constexpr uint32_t kValues = offsetof(Shared, v) / 16, kValueStage = sizeof(shared.v[0]) / 16;
  const uint32_t base = __shfl_sync(0xffffffffu, shared_address(&shared), 0);
  // The number is never negative: this is kDescriptorHigh, but the compiler does not know and keeps it in its register. For
  // K only up to head_dim 128: beyond, there are more descriptors than uniform registers.
  const uint32_t descriptor_high = kDescriptorHigh + (params.seqlens_k.num_rows >> 31);
  const WgmmaDescriptor q_major{k_major_descriptor(base), kDescriptorHigh};
  const WgmmaDescriptor k_major{k_major_descriptor(base),
                                Config::kHeadDim > 128 ? kDescriptorHigh : descriptor_high};
  const WgmmaDescriptor mn_major{mn_major_descriptor(base, Config::kBlockN), descriptor_high};
  const uint32_t my_query_step = warpgroup * (kRowsPerWarpgroup * kSlabRowBytes >> 4);

  RingState<Config::kStagesQ> q_state;
  RingState<Config::kStages> k_state, v_state;
  float acc_s[kNumAccS], acc_o[kNumAccO];
  uint32_t p_regs[kNumAccS / 2];

  // S = Q K^T and O += P V, asynchronous: accumulators and operands are taken until the matching wait.
  const auto issue_scores = [&] {
    const uint32_t q_step = my_query_step + kQueries + q_state.stage * kQueryStage;
    const uint32_t k_step = kKeys + k_state.stage * kKeyStage;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 16; ++step) {
      Wgmma<Element, Config::kBlockN>::ss(acc_s, q_major.at(q_step + k_major_step(Config::kBlockM, step)),
                                          k_major.at(k_step + k_major_step(Config::kBlockN, step)), step > 0);
    }
    wgmma_commit();
  };
  const auto issue_output = [&] {
    const uint32_t v_step = kValues + v_state.stage * kValueStage;
    wgmma_fence();  // within `step` the one before S would do, but ptxas wants one before each product (C7519)
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
      Wgmma<Element, Config::kHeadDimV>::rs(acc_o, &p_regs[4 * step], mn_major.at(v_step + mn_major_step(step)));
    }
    wgmma_commit();
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < kNumAccS / 2; ++i) p_regs[i] = pack_pair<Element>(acc_s[2 * i], acc_s[2 * i + 1]);
  };

  // The first turn is warpgroup 0's.
  if (kTakesTurns && warpgroup == Config::kNumConsumers - 1) named_barrier_arrive(next_turn, kTurnThreads);

  QueryTile& kept = shared.items[warpgroup * 4 + thread / 32];

  for_each_item<Config>(params, lane, [&](const QueryTile& queries, const auto& tiles) {
    if (elected) kept = queries;
    __syncwarp();
    const Sequence& sequence = queries.sequence;
    OnlineSoftmax softmax(softmax_scale);
#pragma unroll
    for (float& x : acc_o) x = 0.f;
    const int rows[2] = {warp_row + acc_row(lane, 0), warp_row + acc_row(lane, 1)};
    const Score score(params.score, sequence.k, queries.index, queries.head_kv,
                      {queries.existing_head(rows[0]), queries.existing_head(rows[1])});

    // Of the thread's rows, less the column of its first accumulator. Where registers are short they come from the rows'
    // places on the diagonal, which the score needs too.
    int visible_begin[2], visible_end[2], diagonal[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = queries.position(rows[half]);
      visible_begin[half] = mask.visible_begin(position, sequence) - acc_first_col(lane);
      visible_end[half] = mask.visible_end(position, sequence) - acc_first_col(lane);
      diagonal[half] = position + sequence.diagonal - acc_first_col(lane);
    }
    // The i-th tile visited.
    const auto masked_tile = [&](int i) {
      MaskedTile<kNumAccS> tile;
      if constexpr (Config::Tiles::kListed) {
        tiles.load_hidden(params.blocks, i, /*direction=*/0, (queries.first_position + rows[0]) % kMaskBlock, lane, tile.hidden);
        return tile;
      }
      const int first_key = tiles.n_block(i) * Config::kBlockN;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (Score::kModifies) {
          const int position = diagonal[half] - sequence.diagonal + acc_first_col(lane);
          visible_begin[half] = mask.visible_begin(position, sequence) - acc_first_col(lane);
          visible_end[half] = mask.visible_end(position, sequence) - acc_first_col(lane);
        }
        const int end = visible_end[half] - first_key;
        tile.hidden[half] = Config::Tiles::kMaskedLeft
                                ? HiddenBits<kNumAccS>::outside(visible_begin[half] - first_key, end)
                                : HiddenBits<kNumAccS>::from(end);
      }
      return tile;
    };
    const auto modify_scores = [&](const typename Score::template Tile<Config::kBlockN>& biases, int n_block) {
      const int first_key = n_block * Config::kBlockN;
      score.template modify<Config::kBlockN>(acc_s, biases, {diagonal[0] - first_key, diagonal[1] - first_key}, lane);
    };

    // One tile of keys: its scores and softmax, while the previous tile's P V runs.
    const auto step = [&](const auto& tile, int n_block) {
      float rescale[2];
      const auto biases = score.template load_tile<Config::kBlockN>(sequence.k, n_block, lane);
      shared.k_ring.wait_full(k_state);
      if constexpr (kTakesTurns) named_barrier_sync(my_turn, kTurnThreads);
      issue_scores();
      shared.v_ring.wait_full(v_state);
      issue_output();
      if constexpr (kTakesTurns) named_barrier_arrive(next_turn, kTurnThreads);
      wgmma_wait<1>();
      pin_registers(acc_s);
      shared.k_ring.release(k_state, elected);
      k_state.advance();
      modify_scores(biases, n_block);
      tile.hide(acc_s);
      softmax.update(acc_s, softmax_scale, rescale);
      complete_before_wait(softmax.row_sum[0] + softmax.row_sum[1]);
      wgmma_wait<0>();
      pin_registers(acc_o);
      pin_registers(acc_s);
      shared.v_ring.release(v_state, elected);
      v_state.advance();
      round_weights();
#pragma unroll
      for (int i = 0; i < kNumAccO; ++i) acc_o[i] *= rescale[acc_half(i)];
    };

    if (tiles.num_tiles > 0) {
      shared.q_ring.wait_full(q_state);
      if (!Score::kModifies && scale.changes_q()) {
        rewrite_q<Config::kBlockM, num_slabs(Config::kHeadDim)>(shared_address(shared.q[q_state.stage]), warpgroup, thread, scale.q_keep_bits,
                          scale.q_flip_bits);
      }
      float rescale[2];
      const auto biases = score.template load_tile<Config::kBlockN>(sequence.k, tiles.n_block(0), lane);
      shared.k_ring.wait_full(k_state);
      issue_scores();
      wgmma_wait<0>();
      pin_registers(acc_s);
      shared.k_ring.release(k_state, elected);
      k_state.advance();
      modify_scores(biases, tiles.n_block(0));
      masked_tile(0).hide(acc_s);
      softmax.update(acc_s, softmax_scale, rescale);
      round_weights();

      int i = 1;
      const auto masked_until = [&](int end) {
        for (; i < end; ++i) step(masked_tile(i), tiles.n_block(i));
      };
      const auto unmasked_until = [&](int end) {
        for (; i < end; ++i) step(UnmaskedTile{}, tiles.n_block(i));
      };
      if constexpr (Config::Tiles::kMaskedLeft) {
        // Masked, unmasked, masked; the code of the masked loop stands once.
        for (int end = tiles.num_masked;; end = tiles.num_tiles) {
          masked_until(end);
          if (i >= tiles.num_tiles) break;
          unmasked_until(tiles.full_end);
        }
      } else {
        if constexpr (Config::Tiles::kManyMasked) masked_until(tiles.num_masked);
        unmasked_until(tiles.num_tiles);
      }
      if constexpr (!Config::kStagesInQuery) {
        shared.q_ring.release(q_state, elected);
        q_state.advance();
      }

      shared.v_ring.wait_full(v_state);
      issue_output();
      wgmma_wait<0>();
      pin_registers(acc_o);
      shared.v_ring.release(v_state, elected);
      v_state.advance();
    }

    const QueryTile& done = kept;
    float normalise[2], lse[2], largest[2], sinks[2] = {-INFINITY, -INFINITY};
    if (params.sinks != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sinks[half] = params.sinks[done.existing_head(warp_row + acc_row(lane, half))];
      }
    }
    softmax.finish(sinks, normalise, lse, largest);
    if (params.max_logit != nullptr) store_max_logit(params.max_logit, done, warp_row, largest, lane);
#pragma unroll
    for (int i = 0; i < kNumAccO; ++i) acc_o[i] *= normalise[acc_half(i)];
    // Rows without keys: the hidden values that met their zero weights may have been NaN.
    if (normalise[0] == 0.f || normalise[1] == 0.f) {
#pragma unroll
      for (int i = 0; i < kNumAccO; ++i) {
        if (normalise[acc_half(i)] == 0.f) acc_o[i] = 0.f;
      }
    }
    typename Config::Output output(params, done, warp_row);
    output.store_lse(lse, lane);
    if constexpr (Config::kStagesInQuery) {
      if (tiles.num_tiles == 0) shared.q_ring.wait_full(q_state);
      named_barrier_sync(query_read_by(warpgroup), kThreadsPerWarpgroup);
    }
    output.store_rows(acc_o, staging, read_lane());
    if constexpr (Config::kStagesInQuery) {
      fence_async_proxy();  // the staged rows before the next tile of Q
      __syncwarp();
      shared.q_ring.release(q_state, elected);
      q_state.advance();
    }
  });

  // Takes the last signal of the ring, so that every arrival has met its wait.
  if (kTakesTurns && warpgroup == 0) named_barrier_sync(my_turn, kTurnThreads);
}

template <class Config>
__device__ __forceinline__ void flash_fwd_sm90(const typename Config::Params& params) {
  using Producer = typename Config::Producer;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedStorage<Config>& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  // The shuffle tells the compiler that the value is the same in the whole warp.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  if (warp == 0 && elect_one()) {
    prefetch_tensor_map(params.q_tma.map);
    if (Producer::kArrivals == 1 && params.seqlens_k.num_rows > 0) {
      prefetch_tensor_map(params.k_tma.map);
      prefetch_tensor_map(params.v_tma.map);
    }
    shared.q_ring.init(1, Config::kNumConsumers * 4);
    shared.k_ring.init(Producer::kArrivals, Config::kNumConsumers * 4);
    shared.v_ring.init(Producer::kArrivals, Config::kNumConsumers * 4);
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    if constexpr (Config::kMovesRegisters) decrease_registers<Config::kProducerRegisters>();
    Producer::template run<Config>(params, shared, warp);
  } else {
    if constexpr (Config::kMovesRegisters) increase_registers<Config::kConsumerRegisters>();
    consume<Config>(params, shared, warp / 4 - 1);
  }
}

// kernel: the variant's entry, an instance of flash_fwd_sm90<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd(Kernel* kernel, FwdParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");

  if (params.batch == 0 || params.num_heads == 0 || params.seqlens_q.num_rows == 0) return cudaSuccess;
  // Item numbers are ints, and the last round goes past the end: the planner has seen to it that they fit.
  params.schedule = make_fwd_schedule(params, Config::kBlockM);

  const SeqlenParams &of_q = params.seqlens_q, &of_k = params.seqlens_k;
  const int tensor_batch = of_q.cu_seqlens != nullptr ? 1 : params.batch;
  cudaError_t status =
      encode_tma_queries(&params.q_tma, {params.q, params.q_strides, tensor_batch, of_q.num_rows, params.num_heads,
                                         params.head_dim, Config::kBlockM},
                         params.num_heads / params.num_heads_kv, params.heads_per_tile);
  // Without keys nothing is copied, and the maps of empty tensors do not exist.
  if (of_k.num_rows > 0) {
    // Where a sequence, or a part of the keys, ends before the tensor does, what comes next must not meet a zero weight.
    const bool ragged = of_k.cu_seqlens != nullptr || of_k.seqused != nullptr || params.num_splits > 1;
    if (status == cudaSuccess) {
      status = encode_tma_rows(&params.k_tma, {params.k, params.k_strides, tensor_batch, of_k.num_rows, params.num_heads_kv,
                                               params.head_dim, Config::kBlockN},
                               ragged);
    }
    if (status == cudaSuccess) {
      status = encode_tma_rows(&params.v_tma, {params.v, params.v_strides, tensor_batch, of_k.num_rows, params.num_heads_kv,
                                               params.head_dim_v, Config::kBlockN},
                               ragged);
    }
  }
  if (status != cudaSuccess) return status;

  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(params.num_ctas), dim3(Config::kNumThreads), arguments,
                          kSharedBytes, stream);
}

}  // namespace flash_ext::sm90
