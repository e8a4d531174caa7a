// The Hopper forward over a KV cache: fwd.cuh's consumers, with 64 rows of queries (decoding has few; the heads that share
// a KV head fill them), more stages, and policies of their own for what an item is, where keys come from, where results go.
//
// Items: every part of every sequence's keys, as append_kv.cuh has written them down, for every KV head; nothing but the
// grid is decided on the host. Parts leave as float32 for combine.cuh.
// Keys: CacheTmaProducer, one warp. A dense cache is one copy a slab; pages whose rows divide a tile are a copy each, and
// larger ones are multiples of it; lane i looks up and copies page i of the tile. CacheGatherProducer, four warps: any page
// size, 16 bytes a cp.async, each warp a quarter of the rows.
#pragma once

#include "common/cache_work.cuh"
#include "common/dependent_launch.cuh"
#include "common/kvcache_params.h"
#include "sm90/fwd.cuh"

namespace flash_ext::sm90 {

// Keys of a tile: the largest number that leaves room for three stages and the registers for O.
template <int kHeadDim>
struct CacheTile;
template <>
struct CacheTile<64> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 5, kStagesQ = 2;
};
template <>
struct CacheTile<128> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 3, kStagesQ = 1;
};
template <>
struct CacheTile<256> {
  static constexpr int kBlockM = 64, kBlockN = 64, kStages = 3, kStagesQ = 1;
};

// The order of copies that every producer keeps, as `produce` in fwd.cuh: K0 Q K1 V0 K2 V1 ... V(n-1). Loader: see below.
// By whole warps, which all call it alike; warp 0 copies Q.
template <class Config, class Shared, class Loader>
__device__ __forceinline__ void produce_cache(const typename Config::Params& params, Shared& shared, int warp,
                                              Loader&& loader) {
  const bool elected = warp == 0 && elect_one();
  RingState<Config::kStagesQ> q_state;
  for_each_item<Config>(params, read_lane(), [&](const QueryTile& queries, const KeyTiles& tiles) {
    if (tiles.num_tiles == 0) {
      if constexpr (Config::kStagesInQuery) {  // the buffer without a copy, for the zeros that leave through it
        if (warp == 0) loader.before_waiting_for(&shared.q_ring.empty[q_state.stage], q_state.phase ^ 1);
        if (elected) shared.q_ring.begin_fill(q_state, 0);
        __syncwarp();
        q_state.advance();
      }
      return;
    }
    loader.load_k(queries, tiles.n_block(0));
    if (warp == 0) loader.before_waiting_for(&shared.q_ring.empty[q_state.stage], q_state.phase ^ 1);
    if (elected) {
      shared.q_ring.begin_fill(q_state, Config::kQueryTileBytes);
      load_queries<Config::kBlockM, Config::kColumns>(params.q_tma, &shared.q_ring.full[q_state.stage],
                                                      shared.q[q_state.stage], queries, CacheHint::kEvictFirst);
    }
    __syncwarp();
    q_state.advance();
    for (int i = 1; i < tiles.num_tiles; ++i) {
      loader.load_k(queries, tiles.n_block(i));
      loader.load_v(queries, tiles.n_block(i - 1));
    }
    loader.load_v(queries, tiles.n_block(tiles.num_tiles - 1));
  });
  loader.finish();
}

// ---- by TMA ----

template <class Config, class Shared>
struct CacheTmaLoader {
  const FwdCacheParams& params;
  Shared& shared;
  int lane;
  bool elected;
  RingState<Config::kStages> k_state, v_state;

  __device__ __forceinline__ void load_k(const QueryTile& queries, int n_block) {
    load<Config::kColumns>(params.k_tma, shared.k_ring, k_state, shared.k[k_state.stage], Config::kKeyTileBytes, queries,
                           n_block * Config::kBlockN);
  }
  __device__ __forceinline__ void load_v(const QueryTile& queries, int n_block) {
    load<Config::kColumnsV>(params.v_tma, shared.v_ring, v_state, shared.v[v_state.stage], Config::kValueTileBytes, queries,
                            n_block * Config::kBlockN);
  }
  // Every copy that was issued is waited for by a consumer, and says itself when it is done.
  __device__ __forceinline__ void before_waiting_for(uint64_t*, uint32_t) {}
  __device__ __forceinline__ void finish() {}

 protected:
  template <int kColumns>
  __device__ __forceinline__ void load(const TmaTensor& tensor, RingBarriers<Config::kStages>& ring,
                                       RingState<Config::kStages>& state, uint8_t* tile, uint32_t bytes,
                                       const QueryTile& queries, int first_row, int first_column = 0) {
    uint64_t* full = &ring.full[state.stage];
    const RowRange& range = queries.sequence.k;
    if (elected) ring.begin_fill(state, bytes);
    __syncwarp();
    // Long contexts do not stay in L2, and nobody else reads a decoding step's keys.
    constexpr CacheHint kHint = CacheHint::kEvictFirst;
    if (params.places.page_table == nullptr) {
      if (elected) {
        load_rows<Config::kBlockN, kColumns>(tensor, full, tile, range, first_row, queries.head_kv, kHint, first_column);
      }
    } else {
      const int box = tensor.ragged_rows;  // rows of a copy: they lie in one page
      const int row = first_row + lane * box;
      if (lane * box < Config::kBlockN) {
        const int inside = clamp(range.num_rows - row, 0, box);
        const KvPlace place = place_of(params.places, queries.index, range.first_row + row);
#pragma unroll
        for (int slab = 0; slab < num_slabs(kColumns); ++slab) {
          tma_load(tensor.map, full, tile + (slab * Config::kBlockN + lane * box) * kSlabRowBytes,
                   {first_column + slab * kSlabColumns, box - inside, queries.head_kv * tensor.head_step,
                    place.block * tensor.batch_step, place.row + inside},
                   kHint);
        }
      }
      __syncwarp();
    }
    state.advance();
  }
};

struct CacheTmaProducer {
  static constexpr int kArrivals = 1;
  template <class Config, class Shared>
  __device__ __forceinline__ static void run(const typename Config::Params& params, Shared& shared, int warp) {
    if (warp == 0) {
      produce_cache<Config>(params, shared, warp,
                            CacheTmaLoader<Config, Shared>{params, shared, read_lane(), elect_one(), {}, {}});
    }
  }
};

// ---- by cp.async ----

// A thread's copies become visible to wgmma when it has waited for them, fenced and arrived on the full barrier. It does
// that kLag tiles later, so that several tiles are under way; but never waits for a free buffer before it has, since the
// consumers may be waiting for just those tiles.
template <class Config, class Shared>
struct CacheGatherLoader {
  static constexpr int kLag = max_of(3, Config::kStages);
  static constexpr int kRowsOfWarp = Config::kBlockN / Config::kGatheringWarps;
  static constexpr int kRowsAtOnce = min_of(32, kRowsOfWarp);  // a lane looks up one row at a time
  const FwdCacheParams& params;
  Shared& shared;
  int warp, lane;
  RingState<Config::kStages> k_state, v_state;
  uint32_t unsignalled[kLag] = {};  // full barriers, oldest first; 0: none

  __device__ __forceinline__ void load_k(const QueryTile& queries, int n_block) {
    before_waiting_for(&shared.k_ring.empty[k_state.stage], k_state.phase ^ 1);
    load<Config::kColumns>(static_cast<const typename Config::Element*>(params.k), params.k_strides,
                           params.head_dim / Config::kElementsPerColumn, shared.k_ring, k_state, shared.k[k_state.stage],
                           queries, n_block);
  }
  __device__ __forceinline__ void load_v(const QueryTile& queries, int n_block) {
    before_waiting_for(&shared.v_ring.empty[v_state.stage], v_state.phase ^ 1);
    load<Config::kColumnsV>(static_cast<const typename Config::Element*>(params.v), params.v_strides,
                            params.head_dim_v / Config::kElementsPerColumn,
                            shared.v_ring, v_state, shared.v[v_state.stage], queries, n_block);
  }
  __device__ __forceinline__ void before_waiting_for(uint64_t* barrier, uint32_t parity) {
    if (!mbarrier_test(barrier, parity)) signal_all();
  }
  __device__ __forceinline__ void finish() { signal_all(); }

 protected:
  __device__ __forceinline__ void signal_all() {
    cp_async_wait<0>();
    fence_async_proxy();
#pragma unroll
    for (uint32_t& barrier : unsignalled) {
      if (barrier != 0) mbarrier_arrive(barrier);
      barrier = 0;
    }
  }

  template <int kColumns>
  __device__ __forceinline__ void load(const typename Config::Element* cache, const RowStrides& strides, int columns,
                                       RingBarriers<Config::kStages>& ring, RingState<Config::kStages>& state, uint8_t* tile,
                                       const QueryTile& queries, int n_block) {
    constexpr int kPieces = kColumns / 8, kRowsOfPass = 32 / kPieces;
    static_assert(32 % kPieces == 0, "a pass of a warp covers whole rows");
    mbarrier_wait(&ring.empty[state.stage], state.phase ^ 1);
    const RowRange& range = queries.sequence.k;
    const int column = lane % kPieces * 8;
    const typename Config::Element* source = cache + queries.head_kv * strides.head + column;
    const uint32_t target = shared_address(tile);
#pragma unroll 1
    for (int group = 0; group < kRowsOfWarp / kRowsAtOnce; ++group) {
      // Lane i finds the place of the i-th of the rows; those beyond the sequence become zeros.
      const int first_row = warp * kRowsOfWarp + group * kRowsAtOnce;
      const int row = n_block * Config::kBlockN + first_row + lane % kRowsAtOnce;
      const KvPlace place = place_of(params.places, queries.index, range.first_row + row);
      const int64_t offset = row < range.num_rows ? place.block * strides.batch + place.row * strides.row : -1;
#pragma unroll 4
      for (int pass = 0; pass < kRowsAtOnce / kRowsOfPass; ++pass) {
        const int row_of_group = pass * kRowsOfPass + lane / kPieces;
        const int64_t row_offset = __shfl_sync(0xffffffffu, offset, row_of_group);
        const bool read = row_offset >= 0 && column < columns;
        cp_async_16_bytes(target + tile_offset(Config::kBlockN, first_row + row_of_group, column),
                          read ? source + row_offset : static_cast<const typename Config::Element*>(cache), read);
      }
    }
    cp_async_commit();
    const uint32_t oldest = unsignalled[0];
#pragma unroll
    for (int i = 0; i + 1 < kLag; ++i) unsignalled[i] = unsignalled[i + 1];
    unsignalled[kLag - 1] = shared_address(&ring.full[state.stage]);
    if (oldest != 0) {
      cp_async_wait<kLag>();
      fence_async_proxy();
      mbarrier_arrive(oldest);
    }
    state.advance();
  }
};

struct CacheGatherProducer {
  static constexpr int kArrivals = kThreadsPerWarpgroup;
  template <class Config, class Shared>
  __device__ __forceinline__ static void run(const typename Config::Params& params, Shared& shared, int warp) {
    produce_cache<Config>(params, shared, warp, CacheGatherLoader<Config, Shared>{params, shared, warp, read_lane(), {}, {}});
  }
};

// A kernel for every head_dim and head_dim_v up to kHeadDim.
template <class Element_, int kHeadDim_, class Mask_, class Score_, class Producer_>
struct CacheConfig : CacheTile<kHeadDim_> {
  using Tile = CacheTile<kHeadDim_>;
  using Element = Element_;
  using Mask = Mask_;
  using Score = Score_;
  using Tiles = RangeTiles<Mask>;
  using Params = FwdCacheParams;
  using Work = CacheWork;
  using Producer = Producer_;
  using Output = CacheOutput<Element>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDim_;
  // For the loaders: of 16 bits, as the maps count.
  static constexpr int kColumns = kHeadDim, kColumnsV = kHeadDimV, kElementsPerColumn = 1;
  static constexpr int kGatheringWarps = 4;
  static constexpr int kNumConsumers = Tile::kBlockM / kRowsPerWarpgroup;
  static constexpr int kNumThreads = (1 + kNumConsumers) * kThreadsPerWarpgroup;
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr bool kMovesRegisters = false;  // 255 for every thread
  static constexpr int kQueryTileBytes = Tile::kBlockM * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kKeyTileBytes = Tile::kBlockN * num_slabs(kHeadDim) * kSlabRowBytes;
  static constexpr int kValueTileBytes = kKeyTileBytes;
  static constexpr int kRingBytes =
      Tile::kStagesQ * kQueryTileBytes + Tile::kStages * (kKeyTileBytes + kValueTileBytes);
  static constexpr int kStagingAreas = kNumConsumers * 4;
  static constexpr bool kStagesInQuery =
      kRingBytes + kStagingAreas * kStagingBytesPerWarp + kSwizzleGroupBytes > kMaxSharedBytes;

  static_assert(kNumConsumers == 1, "one consumer takes no turns and needs no more registers than there are");
  static_assert(!kStagesInQuery || Tile::kStagesQ == 1, "more stages of Q than there is room for");
};

template <class Config>
__device__ __forceinline__ void flash_fwd_cache(const FwdCacheParams& params) {
  wait_for_previous_kernel();
  flash_fwd_sm90<Config>(params);
}

// Params: FwdCacheParams or what has it as its base; strides and columns as the loaders count.
template <class Config, class Kernel, class Params>
cudaError_t launch_cache_kernel(Kernel* kernel, Params params, int shared_bytes, cudaStream_t stream) {
  const int columns = params.head_dim / Config::kElementsPerColumn, columns_v = params.head_dim_v / Config::kElementsPerColumn;
  params.by_items = make_divisor(params.items_per_part);
  params.by_m_blocks = make_divisor(params.num_m_blocks);
  cudaError_t status = encode_tma_queries(&params.q_tma,
                                          {params.q, params.q_strides, params.batch, params.seqlens_q.num_rows,
                                           params.num_heads, columns, Config::kBlockM},
                                          params.num_heads / params.num_heads_kv, params.heads_per_tile);
  // Without keys nothing is copied, and the maps of empty tensors do not exist.
  if (Config::Producer::kArrivals == 1 && params.seqlens_k.num_rows > 0) {
    const KvPlaces& places = params.places;
    const int box = places.page_table != nullptr ? min_of(Config::kBlockN, places.rows) : Config::kBlockN;
    if (status == cudaSuccess) {
      status = encode_tma_rows(&params.k_tma, {params.k, params.k_strides, places.num_blocks, places.rows,
                                               params.num_heads_kv, columns, box},
                               true);
    }
    if (status == cudaSuccess) {
      status = encode_tma_rows(&params.v_tma, {params.v, params.v_strides, places.num_blocks, places.rows,
                                               params.num_heads_kv, columns_v, box},
                               true);
    }
  }
  if (status != cudaSuccess) return status;

  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {&params};
  return launch_kernel(reinterpret_cast<const void*>(kernel), dim3(params.num_ctas), dim3(Config::kNumThreads), arguments,
                       shared_bytes, stream, params.dependent != 0);
}

// kernel: the variant's entry, an instance of flash_fwd_cache<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd_cache(Kernel* kernel, const FwdCacheParams& params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");
  return launch_cache_kernel<Config>(kernel, params, kSharedBytes, stream);
}

}  // namespace flash_ext::sm90
