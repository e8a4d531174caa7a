// The Hopper forward over a cache of latent vectors (multi-head latent attention, absorbed: DeepSeek-V2, arXiv 2405.04434):
// the values are the first columns of the keys, so that a tile of keys is read once and serves both products.
//
// 64 rows of queries by 64 keys. Warpgroup 0 produces, by TMA or cp.async. Each consumer owns 256 columns of O, 128 float32 a
// thread. The first one also computes S = Q K^T and the softmax, and puts P into shared memory, where both read it, and the
// factors of earlier results. S of the next tile is issued before P V of this one, so that the softmax runs beside both
// halves of P V. Items, parts, page look-ups: fwd_cache.cuh.
#pragma once

#include "sm90/fwd_cache.cuh"

namespace flash_ext::sm90 {

// Columns of a tile of keys that are copied, waited for and freed by themselves: what the first consumer reads as values, what
// the second does, and the rest.
enum LatentColumns { kFirstHalf, kSecondHalf, kPosition };
constexpr int kLatentGroups = 3;

// A kernel for every head_dim up to kHeadDim and head_dim_v up to kHeadDimV.
template <class Element_, int kHeadDim_, int kHeadDimV_, class Mask_, class Producer_>
struct MlaConfig {
  using Element = Element_;
  using Mask = Mask_;
  using Tiles = RangeTiles<Mask>;
  using Params = FwdCacheParams;
  using Work = CacheWork;
  using Producer = Producer_;
  using Output = CacheOutput<Element>;
  static constexpr int kBlockM = kRowsPerWarpgroup, kBlockN = 64, kStages = 2, kStagesQ = 1;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kHalfColumns = kHeadDimV / 2;
  static constexpr int kColumns = kHeadDim, kColumnsV = kHeadDimV, kElementsPerColumn = 1;  // see CacheConfig
  static constexpr int kGatheringWarps = 4;
  static constexpr int kNumConsumers = 2;
  static constexpr int kNumThreads = (1 + kNumConsumers) * kThreadsPerWarpgroup;
  static constexpr int kMinBlocksPerSm = 1;
  // setmaxnreg; together they fit the register file.
  static constexpr int kProducerRegisters = Producer::kArrivals == 1 ? 56 : 72;
  static constexpr int kConsumerRegisters = Producer::kArrivals == 1 ? 224 : 216;
  static constexpr int kQueryTileBytes = kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kKeyTileBytes = kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr bool kStagesInQuery = true;

  FX_HOST_DEVICE static constexpr int first_column(int group) { return group * kHalfColumns; }
  FX_HOST_DEVICE static constexpr int num_columns(int group) {
    return group == kPosition ? kHeadDim - kHeadDimV : kHalfColumns;
  }
  // Where the columns of a group begin in a tile of keys.
  FX_HOST_DEVICE static constexpr int group_offset(int group) {
    return first_column(group) / kSlabColumns * kBlockN * kSlabRowBytes;
  }

  static_assert(kHalfColumns == 256, "a half of O is one wgmma wide");
  static_assert(kHeadDim > kHeadDimV && kHeadDim % kSlabColumns == 0, "the rest of the columns are whole slabs");
};

template <class Element, int kHeadDim, int kHeadDimV, class Mask, class Producer>
struct SharedStorage<MlaConfig<Element, kHeadDim, kHeadDimV, Mask, Producer>> {
  using Config = MlaConfig<Element, kHeadDim, kHeadDimV, Mask, Producer>;
  alignas(kSwizzleGroupBytes) uint8_t q[Config::kStagesQ][Config::kQueryTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t k[Config::kStages][Config::kKeyTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t weights[Config::kBlockM * kSlabRowBytes];
  float row_factors[Config::kBlockM];
  // Who arrives, how many, who waits: see RingBarriers, and flash_fwd_mla for the numbers.
  RingBarriers<Config::kStagesQ> q_ring;
  RingBarriers<Config::kStages> k_rings[kLatentGroups];
  // As in fwd.cuh, a copy for each consumer warp.
  QueryTile items[4 * Config::kNumConsumers];
};

// ---- producers: the order of produce_cache, without copies of V ----

template <class Config>
struct MlaTmaLoader : CacheTmaLoader<Config, SharedStorage<Config>> {
  __device__ __forceinline__ void load_k(const QueryTile& queries, int n_block) {
    load_group<kFirstHalf>(queries, n_block);
    load_group<kSecondHalf>(queries, n_block);
    load_group<kPosition>(queries, n_block);
    this->k_state.advance();
  }
  __device__ __forceinline__ void load_v(const QueryTile&, int) {}

 private:
  template <LatentColumns kGroup>
  __device__ __forceinline__ void load_group(const QueryTile& queries, int n_block) {
    constexpr int kColumns = Config::num_columns(kGroup);
    RingState<Config::kStages> state = this->k_state;
    this->template load<kColumns>(this->params.k_tma, this->shared.k_rings[kGroup], state,
                                  this->shared.k[state.stage] + Config::group_offset(kGroup),
                                  Config::kBlockN * num_slabs(kColumns) * kSlabRowBytes, queries, n_block * Config::kBlockN,
                                  Config::first_column(kGroup));
  }
};

struct MlaTmaProducer {
  static constexpr int kArrivals = 1;
  template <class Config>
  __device__ __forceinline__ static void run(const FwdCacheParams& params, SharedStorage<Config>& shared, int warp) {
    if (warp == 0) {
      produce_cache<Config>(params, shared, warp, MlaTmaLoader<Config>{{params, shared, read_lane(), elect_one(), {}, {}}});
    }
  }
};

template <class Config>
struct MlaGatherLoader : CacheGatherLoader<Config, SharedStorage<Config>> {
  __device__ __forceinline__ void load_k(const QueryTile& queries, int n_block) {
    load_group<kFirstHalf>(queries, n_block);
    load_group<kSecondHalf>(queries, n_block);
    load_group<kPosition>(queries, n_block);
    this->k_state.advance();
  }
  __device__ __forceinline__ void load_v(const QueryTile&, int) {}

 private:
  template <LatentColumns kGroup>
  __device__ __forceinline__ void load_group(const QueryTile& queries, int n_block) {
    constexpr int kFirst = Config::first_column(kGroup);
    RingState<Config::kStages> state = this->k_state;
    // The first half is waited for with the tile before unsignalled, which S is taken from first; what it frees frees the rest.
    if (kGroup == kFirstHalf) {
      this->before_waiting_for(&this->shared.k_rings[kGroup].empty[state.stage], state.phase ^ 1);
    }
    this->template load<Config::num_columns(kGroup)>(
        static_cast<const typename Config::Element*>(this->params.k) + kFirst, this->params.k_strides,
        this->params.head_dim - kFirst, this->shared.k_rings[kGroup], state,
        this->shared.k[state.stage] + Config::group_offset(kGroup), queries, n_block);
  }
};

struct MlaGatherProducer {
  static constexpr int kArrivals = kThreadsPerWarpgroup;
  template <class Config>
  __device__ __forceinline__ static void run(const FwdCacheParams& params, SharedStorage<Config>& shared, int warp) {
    produce_cache<Config>(params, shared, warp, MlaGatherLoader<Config>{{params, shared, warp, read_lane(), {}, {}}});
  }
};

// ---- consumers ----

// What both consumers are made of: half of O, the 16 rows of each of four warps.
template <class Config>
struct LatentHalf {
  using Shared = SharedStorage<Config>;
  const FwdCacheParams& params;
  Shared& shared;
  int half;      // of the columns of O
  int warp;      // of the warpgroup
  int lane;
  bool elected;  // one lane of the warp
  RingState<Config::kStagesQ> q_state;
  // Descriptors start from the base of shared memory, so that one register serves all of them. Units of 16 bytes.
  WgmmaDescriptor k_major, mn_major;
  uint32_t first_value;
  float acc_o[Config::kHalfColumns / 2];

  __device__ __forceinline__ LatentHalf(const FwdCacheParams& params, Shared& shared, int half)
      : params(params),
        shared(shared),
        half(half),
        warp(threadIdx.x % kThreadsPerWarpgroup / 32),
        lane(threadIdx.x % 32),
        elected(lane == 0),
        first_value((offsetof(Shared, k) + Config::group_offset(half)) / 16) {
    const uint32_t base = __shfl_sync(0xffffffffu, shared_address(&shared), 0);
    k_major = {k_major_descriptor(base), kDescriptorHigh};
    mn_major = {mn_major_descriptor(base, Config::kBlockN), kDescriptorHigh};
  }

  __device__ __forceinline__ void meet(LatentBarrier barrier) const {
    named_barrier_sync(static_cast<int>(barrier), 2 * kThreadsPerWarpgroup);
  }
  __device__ __forceinline__ int warp_row() const { return warp * kRowsPerWarp; }
  // What the end of an item needs of it.
  __device__ __forceinline__ QueryTile& kept() { return shared.items[4 * half + warp]; }

  __device__ __forceinline__ void begin(const QueryTile& queries) {
    if (elected) kept() = queries;  // a hand-over comes before anybody reads it
#pragma unroll
    for (float& x : acc_o) x = 0.f;
  }

  // O += P V of the tile in `stage`, asynchronous.
  __device__ __forceinline__ void issue_output(int stage) {
    constexpr uint32_t kWeights = offsetof(Shared, weights) / 16;
    const uint32_t v_step = first_value + stage * (sizeof(shared.k[0]) / 16);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
      Wgmma<typename Config::Element, Config::kHalfColumns>::template ss<Major::kK, Major::kMn>(
          acc_o, k_major.at(kWeights + k_major_step(Config::kBlockM, step)), mn_major.at(v_step + mn_major_step(step)), true);
    }
    wgmma_commit();
  }

  // Where a factor of a row in the warp is not 1: the largest score seen so far seldom changes.
  __device__ __forceinline__ void multiply(const float (&factors)[2]) {
    if (!__any_sync(0xffffffffu, factors[0] != 1.f || factors[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < Config::kHalfColumns / 2; ++i) acc_o[i] *= factors[acc_half(i)];
  }

  // The rows leave, through Q where they are staged: both consumers are done with it.
  __device__ __forceinline__ void finish(const float (&normalise)[2]) {
    multiply(normalise);
    // Rows without keys: the hidden values that met their zero weights may have been NaN.
    if (normalise[0] == 0.f || normalise[1] == 0.f) {
#pragma unroll
      for (int i = 0; i < Config::kHalfColumns / 2; ++i) {
        if (normalise[acc_half(i)] == 0.f) acc_o[i] = 0.f;
      }
    }
    typename Config::Output output(params, kept(), warp_row(), half * Config::kHalfColumns);
    output.store_rows(acc_o, shared_address(shared.q[0]) + (4 * half + warp) * kStagingBytesPerWarp, read_lane());
    fence_async_proxy();  // the staged rows before the next tile of Q
    __syncwarp();
    shared.q_ring.release(q_state, elected);
    q_state.advance();
  }
};

// S, the softmax, and the first half of O.
template <class Config>
__device__ __forceinline__ void consume_scores(const FwdCacheParams& params, SharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  using Shared = SharedStorage<Config>;
  constexpr int kNumAccS = Config::kBlockN / 2;
  LatentHalf<Config> mine(params, shared, 0);
  const int lane = mine.lane, warp_row = mine.warp_row();

  const typename Config::Mask mask(params.mask);
  const FoldedScale scale = fold_scale(params.score.softmax_scale);
  const float softmax_scale = scale.log2_scale;
  constexpr uint32_t kQueries = offsetof(Shared, q) / 16;
  constexpr uint32_t kKeys = offsetof(Shared, k) / 16, kKeyStage = sizeof(shared.k[0]) / 16;
  RingState<Config::kStages> k_state, v_state;  // of the tiles whose scores, and whose P V, come next
  float acc_s[kNumAccS];

  const auto issue_scores = [&] {
    uint32_t q_step = kQueries, k_step = kKeys + k_state.stage * kKeyStage;
    // A loop: unrolled, the descriptors of Q would be kept in registers from tile to tile.
#pragma unroll 1
    for (int slab = 0; slab < num_slabs(Config::kHeadDim); ++slab) {
      constexpr int kSlabsOfGroup = num_slabs(Config::kHalfColumns);
      if (slab % kSlabsOfGroup == 0) shared.k_rings[slab / kSlabsOfGroup].wait_full(k_state);
      wgmma_fence();  // one fence and one group would do, but ptxas wants them in the loop (C7519)
#pragma unroll
      for (int step = 0; step < kSlabColumns / 16; ++step) {
        Wgmma<Element, Config::kBlockN>::ss(acc_s, mine.k_major.at(q_step + k_major_step(Config::kBlockM, step)),
                                            mine.k_major.at(k_step + k_major_step(Config::kBlockN, step)),
                                            slab > 0 || step > 0);
      }
      wgmma_commit();
      q_step += Config::kBlockM * kSlabRowBytes / 16;
      k_step += Config::kBlockN * kSlabRowBytes / 16;
    }
  };
  // S has been read from its operands.
  const auto release_scores = [&] {
    shared.k_rings[kSecondHalf].release(k_state, mine.elected);
    shared.k_rings[kPosition].release(k_state, mine.elected);
    k_state.advance();
  };
  const auto release_output = [&] {
    shared.k_rings[kFirstHalf].release(v_state, mine.elected);
    v_state.advance();
  };
  const auto write_factors = [&](const float (&factors)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (lane % 4 == 0) shared.row_factors[warp_row + acc_row(lane, half)] = factors[half];
    }
  };
  const auto hand_over_weights = [&](const float (&rescale)[2]) {
    mine.meet(LatentBarrier::kWeightsUsed);
    const uint32_t rows = shared_address(shared.weights) + warp_row * kSlabRowBytes;
#pragma unroll
    for (int pair = 0; pair < Config::kBlockN / 16; ++pair) {
      uint32_t words[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = staging_source(pair, r);
        words[r] = pack_pair<Element>(acc_s[i], acc_s[i + 1]);
      }
      stage_16_columns(rows, lane, pair, words);
    }
    write_factors(rescale);
    fence_async_proxy();
    mine.meet(LatentBarrier::kWeightsWritten);
  };

  for_each_item<Config>(params, lane, [&](const QueryTile& queries, const KeyTiles& tiles) {
    mine.begin(queries);
    const Sequence& sequence = queries.sequence;
    OnlineSoftmax softmax(softmax_scale);
    // Of the thread's rows, less the column of its first accumulator.
    int visible_begin[2], visible_end[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = queries.position(warp_row + acc_row(lane, half));
      visible_begin[half] = mask.visible_begin(position, sequence) - acc_first_col(lane);
      visible_end[half] = mask.visible_end(position, sequence) - acc_first_col(lane);
    }
    const auto masked_tile = [&](int i) {
      const int first_key = tiles.n_block(i) * Config::kBlockN;
      MaskedTile<kNumAccS> tile;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tile.hidden[half] =
            HiddenBits<kNumAccS>::outside(visible_begin[half] - first_key, visible_end[half] - first_key);
      }
      return tile;
    };

    shared.q_ring.wait_full(mine.q_state);
    if (tiles.num_tiles > 0) {
      if (scale.changes_q()) {
        rewrite_q<Config::kBlockM, num_slabs(Config::kHeadDim)>(shared_address(shared.q[0]), 0,
                                                                threadIdx.x % kThreadsPerWarpgroup, scale.q_keep_bits,
                                                                scale.q_flip_bits);
      }
      float rescale[2];
      issue_scores();
      wgmma_wait<0>();
      pin_registers(acc_s);
      release_scores();
      masked_tile(0).hide(acc_s);
      softmax.update(acc_s, softmax_scale, rescale);
      hand_over_weights(rescale);

      const auto step = [&](const auto& tile) {
        issue_scores();
        mine.issue_output(v_state.stage);
        wgmma_wait<1>();
        pin_registers(acc_s);
        release_scores();
        tile.hide(acc_s);
        softmax.update(acc_s, softmax_scale, rescale);
        complete_before_wait(softmax.row_sum[0] + softmax.row_sum[1]);
        wgmma_wait<0>();
        pin_registers(mine.acc_o);
        pin_registers(acc_s);
        release_output();
        hand_over_weights(rescale);
        mine.multiply(rescale);
      };
      int i = 1;
      // Masked, unmasked, masked; the code of the masked loop stands once.
      for (int end = tiles.num_masked;; end = tiles.num_tiles) {
        for (; i < end; ++i) step(masked_tile(i));
        if (i >= tiles.num_tiles) break;
        for (; i < tiles.full_end; ++i) step(UnmaskedTile{});
      }
      mine.issue_output(v_state.stage);
      wgmma_wait<0>();
      pin_registers(mine.acc_o);
      release_output();
    }

    // All warps of both consumers meet here: nobody reads Q or the weights any more.
    mine.meet(LatentBarrier::kWeightsUsed);
    float normalise[2], lse[2], largest[2], sinks[2] = {-INFINITY, -INFINITY};
    const QueryTile& done = mine.kept();
    if (params.sinks != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sinks[half] = params.sinks[done.existing_head(warp_row + acc_row(lane, half))];
    }
    softmax.finish(sinks, normalise, lse, largest);
    write_factors(normalise);
    mine.meet(LatentBarrier::kWeightsWritten);
    typename Config::Output(params, done, warp_row).store_lse(lse, lane);
    mine.finish(normalise);
  });
  mine.meet(LatentBarrier::kWeightsUsed);  // takes the last signal, so that every arrival has met its wait
}

// The second half of O.
template <class Config>
__device__ __forceinline__ void consume_values(const FwdCacheParams& params, SharedStorage<Config>& shared) {
  LatentHalf<Config> mine(params, shared, 1);
  const int lane = mine.lane;

  RingState<Config::kStages> state;

  const auto wait_for_factors = [&](float (&factors)[2]) {
    mine.meet(LatentBarrier::kWeightsWritten);
#pragma unroll
    for (int half = 0; half < 2; ++half) factors[half] = shared.row_factors[mine.warp_row() + acc_row(lane, half)];
  };
  const auto hand_back = [&] {
    named_barrier_arrive(static_cast<int>(LatentBarrier::kWeightsUsed), 2 * kThreadsPerWarpgroup);
  };

  hand_back();  // nothing to be used yet
  for_each_item<Config>(params, lane, [&](const QueryTile& queries, const KeyTiles& tiles) {
    mine.begin(queries);
    float factors[2];
    for (int i = 0; i < tiles.num_tiles; ++i) {
      wait_for_factors(factors);
      mine.multiply(factors);
      shared.k_rings[kSecondHalf].wait_full(state);
      mine.issue_output(state.stage);
      wgmma_wait<0>();
      pin_registers(mine.acc_o);
      shared.k_rings[kSecondHalf].release(state, mine.elected);
      hand_back();
      state.advance();
    }
    wait_for_factors(factors);
    hand_back();
    mine.finish(factors);
  });
}

template <class Config>
__device__ __forceinline__ void flash_fwd_mla(const FwdCacheParams& params) {
  using Producer = typename Config::Producer;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedStorage<Config>& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  if (warp == 0 && elect_one()) {
    prefetch_tensor_map(params.q_tma.map);
    if (Producer::kArrivals == 1 && params.seqlens_k.num_rows > 0) prefetch_tensor_map(params.k_tma.map);
    shared.q_ring.init(1, 8);
    shared.k_rings[kFirstHalf].init(Producer::kArrivals, 4);   // the first consumer's warps
    shared.k_rings[kSecondHalf].init(Producer::kArrivals, 8);  // both consumers'
    shared.k_rings[kPosition].init(Producer::kArrivals, 4);    // the first consumer's
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    decrease_registers<Config::kProducerRegisters>();
    Producer::template run<Config>(params, shared, warp);
  } else {
    increase_registers<Config::kConsumerRegisters>();
    if (warp < 8) {
      consume_scores<Config>(params, shared);
    } else {
      consume_values<Config>(params, shared);
    }
  }
}

// kernel: the variant's entry, an instance of flash_fwd_mla<Config>. Sizes, dtype and alignment have been checked, and that v
// is the first columns of k.
template <class Config, class Kernel>
cudaError_t launch_fwd_mla(Kernel* kernel, FwdCacheParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");

  params.by_items = make_divisor(params.items_per_part);
  params.by_m_blocks = make_divisor(params.num_m_blocks);
  cudaError_t status = encode_tma_queries(&params.q_tma,
                                          {params.q, params.q_strides, params.batch, params.seqlens_q.num_rows,
                                           params.num_heads, params.head_dim, Config::kBlockM},
                                          params.num_heads / params.num_heads_kv, params.heads_per_tile);
  // Without keys nothing is copied, and the maps of empty tensors do not exist.
  if (status == cudaSuccess && Config::Producer::kArrivals == 1 && params.seqlens_k.num_rows > 0) {
    const KvPlaces& places = params.places;
    const int box = places.page_table != nullptr ? min_of(Config::kBlockN, places.rows) : Config::kBlockN;
    status = encode_tma_rows(&params.k_tma, {params.k, params.k_strides, places.num_blocks, places.rows, params.num_heads_kv,
                                             params.head_dim, box},
                             true);
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
