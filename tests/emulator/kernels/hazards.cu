// A small correct pipeline (TMA -> wgmma -> TMA) and the same with one thing wrong each.
//
// D[64, 64] = A[64, 64 * tiles] B[64, 64 * tiles]^T in bf16; warps 0-3 consume, warp 4 produces into
// a ring of 2 stages. full[s]: 1 arrival (producer) and the bytes of both boxes, consumers wait.
// empty[s]: 4 arrivals (a lane of each consumer warp), the producer waits.
#include "ptx.cuh"

enum Bug {
  kCorrect,
  kNoFullWait,
  kNoEmptyWait,
  kEarlyRelease,
  kNoRelease,
  kWrongParity,
  kWrongStage,
  kExpectMore,
  kExpectLess,
  kNoInitSync,
  kEmptyCount,
  kMisalignedBox,
  kSwappedCoords,
  kNoWgmmaFence,
  kTouchedAccumulator,
  kNoWgmmaWait,
  kWrongSwizzle,
  kNoProxyFence,
  kNoEpilogueBarrier,
  kNoStoreWait,
  kSourceReused,
};

struct alignas(64) TensorMap {
  uint8_t opaque[128];
};

constexpr int kStages = 2;
constexpr uint32_t kTileBytes = 64 * 128;  // 64 rows of 64 bf16
constexpr uint64_t kSwizzle128 = 1ull << 62, kSwizzle64 = 2ull << 62;

struct Shared {
  uint8_t a[kStages][kTileBytes];
  uint8_t b[kStages][kTileBytes];
  float d[64][64];
  uint64_t full[kStages], empty[kStages];
};

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void load_box(uint32_t to, const TensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2,%3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

__device__ inline void wgmma_64x64(float (&d)[32], uint64_t a, uint64_t b, int scale_d) {
  asm volatile(
      "{\n\t"
      ".reg .pred scale;\n\t"
      "setp.ne.b32 scale, %34, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, scale, 1, 1, 0, 0;\n\t"
      "}"
      : F16(0), F16(16)
      : "l"(a), "l"(b), "r"(scale_d)
      : "memory");
}

template <Bug kBug>
__device__ void produce(Shared& shared, const TensorMap& map_a, const TensorMap& map_b, int tiles) {
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, phase = tile / kStages & 1;
    const uint32_t full = shared_address(&shared.full[stage]);
    if (kBug != kNoEmptyWait) mbarrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
    mbarrier_expect(full, 2 * kTileBytes + (kBug == kExpectMore) * 16 - (kBug == kExpectLess) * 16);
    const uint32_t a = shared_address(shared.a[stage]) + (kBug == kMisalignedBox) * 64;
    if (kBug == kSwappedCoords) {
      load_box(a, &map_a, 0, 64 * tile, full);
    } else {
      load_box(a, &map_a, 64 * tile, 0, full);
    }
    load_box(shared_address(shared.b[stage]), &map_b, 64 * tile, 0, full);
  }
}

template <Bug kBug>
__device__ void consume(Shared& shared, const TensorMap& map_d, int tiles) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t layout = (kBug == kWrongSwizzle ? kSwizzle64 : kSwizzle128) | 64ull << 32 | 1ull << 16;
  float d[32];
  for (int tile = 0; tile < tiles; ++tile) {
    int stage = tile % kStages;
    const int phase = tile / kStages & 1;
    const uint32_t empty = shared_address(&shared.empty[stage]);
    if (kBug != kNoFullWait) {
      mbarrier_wait(shared_address(&shared.full[stage]), phase ^ (kBug == kWrongParity));
    }
    if (kBug == kWrongStage && tile == 1) stage = 0;
    if (kBug != kNoWgmmaFence) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      const uint64_t a = layout | (shared_address(shared.a[stage]) + 32 * k) >> 4;
      const uint64_t b = layout | (shared_address(shared.b[stage]) + 32 * k) >> 4;
      wgmma_64x64(d, a, b, tile | k);
      if (kBug == kTouchedAccumulator && k == 1) {
        wgmma_commit();
        wgmma_wait();
        for (float& x : d) x += 0.0f * lane + 1.0f;
      }
    }
    wgmma_commit();
    if (kBug == kEarlyRelease && lane == 0) mbarrier_arrive(empty);
    if (kBug != kNoWgmmaWait) wgmma_wait();
    if (kBug != kEarlyRelease && kBug != kNoRelease && lane == 0) mbarrier_arrive(empty);
  }
  for (int i = 0; i < 32; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i >> 1 & 1);
    shared.d[row][8 * (i >> 2) + 2 * (lane % 4) + (i & 1)] = d[i];
  }
  if (kBug != kNoProxyFence) fence_proxy_async();
  if (kBug != kNoEpilogueBarrier) asm volatile("bar.sync 1, 128;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2,%2}], [%0];" ::"r"(shared_address(shared.d)),
        "l"(&map_d), "r"(0)
        : "memory");
    bulk_commit();
    if (kBug == kSourceReused) {
      *static_cast<volatile float*>(&shared.d[63][63]) = 0;
    }
    if (kBug != kNoStoreWait) bulk_wait();
  }
}

template <Bug kBug>
__device__ void pipeline(const TensorMap& a, const TensorMap& b, const TensorMap& d, int tiles) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared_address(&shared.full[stage]), 1);
      mbarrier_init(shared_address(&shared.empty[stage]), kBug == kEmptyCount ? 5 : 4);
    }
    fence_mbarrier_init();
  }
  if (kBug != kNoInitSync) __syncthreads();
  if (threadIdx.x < 128) {
    consume<kBug>(shared, d, tiles);
  } else if (threadIdx.x == 128) {
    produce<kBug>(shared, a, b, tiles);
  }
}

#define KERNEL(NAME, BUG)                                                                                  \
  extern "C" __global__ void __launch_bounds__(160) NAME(const __grid_constant__ TensorMap a,              \
                                                         const __grid_constant__ TensorMap b,              \
                                                         const __grid_constant__ TensorMap d, int tiles) { \
    pipeline<BUG>(a, b, d, tiles);                                                                         \
  }

KERNEL(correct, kCorrect)
KERNEL(no_full_wait, kNoFullWait)
KERNEL(no_empty_wait, kNoEmptyWait)
KERNEL(early_release, kEarlyRelease)
KERNEL(no_release, kNoRelease)
KERNEL(wrong_parity, kWrongParity)
KERNEL(wrong_stage, kWrongStage)
KERNEL(expect_more, kExpectMore)
KERNEL(expect_less, kExpectLess)
KERNEL(no_init_sync, kNoInitSync)
KERNEL(empty_count, kEmptyCount)
KERNEL(misaligned_box, kMisalignedBox)
KERNEL(swapped_coords, kSwappedCoords)
KERNEL(no_wgmma_fence, kNoWgmmaFence)
KERNEL(touched_accumulator, kTouchedAccumulator)
KERNEL(no_wgmma_wait, kNoWgmmaWait)
KERNEL(wrong_swizzle, kWrongSwizzle)
KERNEL(no_proxy_fence, kNoProxyFence)
KERNEL(no_epilogue_barrier, kNoEpilogueBarrier)
KERNEL(no_store_wait, kNoStoreWait)
KERNEL(source_reused, kSourceReused)
