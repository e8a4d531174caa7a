// The FP8 forward over a KV cache of e4m3 keys and values: fwd_fp8.cuh's consumer and transposing warps with 64 rows of queries,
// and the items, loaders and parts of fwd_cache.cuh. docs/fp8.md.
//
// The heads that share a tile's rows may each have a scale of q, so every row carries its own. Scales of blocks of keys stand
// where the keys stand: with a page, or with an entry of a dense cache.
#pragma once

#include "sm90/fwd_cache.cuh"
#include "sm90/fwd_fp8.cuh"

namespace flash_ext::sm90::fp8 {

// Stages that shared memory holds, of K, V and transposed V.
template <int kHeadDim, int kBlockN>
constexpr int num_cache_stages() {
  constexpr int kBytes = 2 * kBlockN * num_byte_slabs(kHeadDim) * kSlabBytes + num_byte_slabs(kBlockN) * kHeadDim * kSlabBytes;
  constexpr int kQueryBytes = kRowsPerWarpgroup * num_byte_slabs(kHeadDim) * kSlabBytes;
  return (kMaxSharedBytes - kSwizzleGroupBytes - kQueryBytes) / kBytes;  // a kilobyte for the barriers
}

// Scales of k or v, for the tile's head: one of the sequence, or one for every 64 rows of the cache.
struct CacheScale {
  const float* first;  // of the head; null: 1
  int64_t block_stride;
  const KvPlaces& places;
  const QueryTile& queries;
  bool blocks;

  __device__ __forceinline__ CacheScale(const Descale& descale, const FwdFp8CacheParams& params, const QueryTile& queries)
      : first(descale.data),
        block_stride(descale.batch_stride),
        places(params.places),
        queries(queries),
        blocks(descale.block_step != 0) {
    if (first == nullptr) return;
    first += queries.head_kv * descale.head_stride + (blocks ? 0 : queries.index * descale.batch_stride);
  }
  // Of the sequence's block-th 64 keys; of its last ones beyond them.
  __device__ __forceinline__ float at(int block) const {
    if (first == nullptr || !blocks) return first == nullptr ? 1.f : __ldg(first);
    const RowRange& keys = queries.sequence.k;
    const KvPlace place = place_of(places, queries.index, keys.first_row + min_of(block * kRowsPerScale, keys.num_rows - 1));
    return __ldg(first + place.block * block_stride + place.row / kRowsPerScale);
  }
};

// Output policy: float32 parts, or what Fp8DenseOutput writes.
struct Fp8CacheOutput {
  CacheOutput<uint16_t> parts;
  Fp8DenseOutput whole;
  float* part = nullptr;

  __device__ __forceinline__ Fp8CacheOutput(const FwdFp8CacheParams& params, const QueryTile& tile, int first_row)
      : parts(params, tile, first_row), whole(params, params.out_is_fp16, tile, first_row) {}

  __device__ __forceinline__ void store_lse(const float (&values)[2], int lane) { parts.store_lse(values, lane); }
  __device__ __forceinline__ void begin_row(const QueryTile& tile, int row) {
    whole.begin_row(tile, row);
    if (parts.params.out_partial != nullptr) {
      part = parts.params.out_partial + parts.partial_row(row) * parts.params.head_dim_v;
    }
  }
  __device__ __forceinline__ void store(int column, const float (&x)[4]) const {
    if (part == nullptr) {
      whole.store(column, x);
    } else {
      *reinterpret_cast<float4*>(part + column) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
};

// Producers: warp 0 copies, by TMA or gathering; the others transpose.
struct Fp8CacheTmaProducer {
  static constexpr int kArrivals = CacheTmaProducer::kArrivals;
  template <class Config, class Shared>
  __device__ __forceinline__ static void run(const FwdFp8CacheParams& params, Shared& shared) {
    CacheTmaProducer::run<Config>(params, shared, 0);
  }
};
struct Fp8CacheGatherProducer {
  static constexpr int kArrivals = 32;
  template <class Config, class Shared>
  __device__ __forceinline__ static void run(const FwdFp8CacheParams& params, Shared& shared) {
    CacheGatherProducer::run<Config>(params, shared, 0);
  }
};

// A kernel for every head_dim and head_dim_v up to kHeadDim, and every kind of scales.
template <int kHeadDim_, class Mask_, class Score_, class Producer_>
struct FwdFp8CacheConfig : Tile<kHeadDim_, Score_, Flushed>, BlockScales {
  using Mask = Mask_;
  using Score = Score_;
  using Tiles = RangeTiles<Mask>;
  using Params = FwdFp8CacheParams;
  using Work = CacheWork;
  using Producer = Producer_;
  using Output = Fp8CacheOutput;
  using KeyScale = CacheScale;
  using Element = uint16_t;  // a pair of e4m3: as the maps and the gathering warp count
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kColumns = kHeadDim / 2, kColumnsV = kHeadDim / 2, kElementsPerColumn = 2;
  static constexpr int kBlockN = min_of(128, Tile<kHeadDim_, Score_, Flushed>::kBlockN);  // usual pages divide it
  static constexpr int kGatheringWarps = 1;
  static constexpr int kBlockM = kRowsPerWarpgroup;
  static constexpr int kNumConsumers = 1;
  static constexpr int kNumThreads = 2 * kThreadsPerWarpgroup;
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr bool kMovesRegisters = false;  // 255 for every thread
  static constexpr int kRowScales = 2;
  static constexpr bool kAlignsKeys = false;
  static constexpr int kStages = num_cache_stages<kHeadDim, kBlockN>();
  static constexpr int kStagesQ = 1;
  static constexpr bool kStagesInQuery = false;
  static constexpr int kTileRowBytes = num_byte_slabs(kHeadDim) * kSlabBytes;
  static constexpr int kQueryTileBytes = kBlockM * kTileRowBytes;
  static constexpr int kKeyTileBytes = kBlockN * kTileRowBytes;
  static constexpr int kValueTileBytes = kKeyTileBytes;
  static constexpr int kTransposedTileBytes = num_byte_slabs(kBlockN) * kHeadDim * kSlabBytes;
  static constexpr int kSegments = kBlockN / kRowsPerScale;
};

template <class Config>
__device__ __forceinline__ void flash_fwd_fp8_cache(const FwdFp8CacheParams& params) {
  flash_fwd_fp8_sm90<Config>(params);
}

// kernel: the variant's entry, an instance of flash_fwd_fp8_cache<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd_fp8_cache(Kernel* kernel, FwdFp8CacheParams params, cudaStream_t stream) {
  // Maps and the gathering warp move pairs of e4m3.
  const auto in_pairs = [](const RowStrides& s) { return RowStrides{s.batch / 2, s.row / 2, s.head / 2}; };
  params.q_strides = in_pairs(params.q_strides);
  params.k_strides = in_pairs(params.k_strides);
  params.v_strides = in_pairs(params.v_strides);
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");
  return launch_cache_kernel<Config>(kernel, params, kSharedBytes, stream);
}

}  // namespace flash_ext::sm90::fp8
