// TMA tensor copies and reductions of 1 to 5 dimensions, with the swizzle left in place: the test
// reads and writes shared memory as bytes.
#include "ptx.cuh"

struct alignas(64) TensorMap {
  uint8_t opaque[128];
};

struct Coords {
  int c[5];
};

// Shared memory: the mbarrier, then from byte 1024 on the box, `skew` bytes later.
constexpr uint32_t kBoxOffset = 1024;

#define COORDS_1 "{%2}"
#define COORDS_2 "{%2,%3}"
#define COORDS_3 "{%2,%3,%4}"
#define COORDS_4 "{%2,%3,%4,%5}"
#define COORDS_5 "{%2,%3,%4,%5,%6}"
#define COORD_INPUTS "r"(at.c[0]), "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]), "r"(at.c[4])

__device__ inline uint32_t prepare_barrier(uint32_t arrivals) {
  const uint32_t barrier = shared_address(dynamic_shared);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, arrivals);
    fence_mbarrier_init();
  }
  return barrier;
}

// Fills the box's surroundings with a known byte; the fence orders this before TMA's writes.
__device__ inline void fill_shared(int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(dynamic_shared + kBoxOffset)[i] = 0xcdcdcdcdu;
  }
  fence_proxy_async();
}

// `area` bytes of shared memory around the box go to `out`; TMA announces `box` bytes.
#define LOAD_KERNEL(NAME, INSTRUCTION, DIM, SUFFIX, ...)                                                             \
  extern "C" __global__ void NAME(uint8_t* out, const __grid_constant__ TensorMap map, Coords at, int area, int box, \
                                  int skew) {                                                                        \
    const uint32_t barrier = prepare_barrier(1);                                                                     \
    fill_shared(area);                                                                                               \
    __syncthreads();                                                                                                 \
    if (threadIdx.x == 0) {                                                                                          \
      mbarrier_expect(barrier, box);                                                                                 \
      const uint32_t to = barrier + kBoxOffset + skew;                                                               \
      asm volatile(INSTRUCTION " [%0], [%1, " COORDS_##DIM "], [%7]" SUFFIX ";" ::"r"(to), "l"(&map), COORD_INPUTS,  \
                   "r"(barrier)__VA_ARGS__                                                                           \
                   : "memory");                                                                                      \
    }                                                                                                                \
    mbarrier_wait(barrier, 0);                                                                                       \
    copy16(out, dynamic_shared + kBoxOffset, area);                                                                  \
  }

#define LOAD(DIM)            \
  LOAD_KERNEL(load_##DIM##d, \
              "cp.async.bulk.tensor." #DIM "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes", DIM, "")
LOAD(1)
LOAD(2)
LOAD(3)
LOAD(4)
LOAD(5)

constexpr uint64_t kEvictFirst = 0x12f0000000000000;
#define HINT , "l"(kEvictFirst)
LOAD_KERNEL(load_2d_hint,
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
            ".L2::cache_hint",
            2, ", %8", HINT)

// Two boxes on one barrier and two phases: the second pair waits for the other parity.
extern "C" __global__ void load_2d_phases(uint8_t* out, const __grid_constant__ TensorMap map, Coords at, int box,
                                          int rounds) {
  const uint32_t barrier = prepare_barrier(1);
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) {
      mbarrier_expect(barrier, 2 * box);
      for (int i = 0; i < 2; ++i) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%2,%3}], [%4];" ::"r"(barrier + kBoxOffset + i * box),
            "l"(&map), "r"(at.c[0]), "r"(at.c[1] + 2 * round + i), "r"(barrier)
            : "memory");
      }
    }
    mbarrier_wait(barrier, round & 1);
    copy16(out + 2 * round * box, dynamic_shared + kBoxOffset, 2 * box);
    __syncthreads();  // the buffer is free for the next round
  }
}

// Each CTA of a cluster of 2 loads one half and sends it to both; out[rank] holds both halves.
extern "C" __global__ void __cluster_dims__(2, 1, 1)
    load_2d_multicast(uint8_t* out, const __grid_constant__ TensorMap map, Coords at, int box) {
  const uint32_t barrier = prepare_barrier(1);
  const uint32_t rank = cluster_rank();
  __syncthreads();
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 2 * box);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2,%3}], [%4], %5;" ::"r"(barrier + kBoxOffset + rank * box),
        "l"(&map), "r"(at.c[0]), "r"(at.c[1] + static_cast<int>(rank)), "r"(barrier), "h"(static_cast<uint16_t>(3))
        : "memory");
  }
  mbarrier_wait(barrier, 0);
  copy16(out + 2 * rank * box, dynamic_shared + kBoxOffset, 2 * box);
  cluster_sync();  // nobody leaves while the other's copy may still write here
}

// Stores and reductions read `image` placed at the box; once the source is read it is overwritten.
#define STORE_KERNEL(NAME, INSTRUCTION, DIM, SUFFIX)                                                                 \
  extern "C" __global__ void NAME(const __grid_constant__ TensorMap map, const uint8_t* image, Coords at, int bytes, \
                                  int skew) {                                                                        \
    copy16(dynamic_shared + kBoxOffset, image, bytes);                                                               \
    fence_proxy_async();                                                                                             \
    __syncthreads();                                                                                                 \
    if (threadIdx.x == 0) {                                                                                          \
      const uint32_t from = shared_address(dynamic_shared) + kBoxOffset + skew;                                      \
      asm volatile("cp." INSTRUCTION "." #DIM "d.global.shared::cta" SUFFIX ".bulk_group [%1, " COORDS_##DIM         \
                   "], [%0];" ::"r"(from),                                                                           \
                   "l"(&map), COORD_INPUTS                                                                           \
                   : "memory");                                                                                      \
      bulk_commit();                                                                                                 \
      bulk_wait_read();                                                                                              \
    }                                                                                                                \
    __syncthreads();                                                                                                 \
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) dynamic_shared[kBoxOffset + i] = 0x99;                     \
    if (threadIdx.x == 0) bulk_wait();                                                                               \
  }

#define STORE(DIM) STORE_KERNEL(store_##DIM##d, "async.bulk.tensor", DIM, ".tile")
STORE(1)
STORE(2)
STORE(3)
STORE(4)
STORE(5)

#define REDUCE(OP, DIM) STORE_KERNEL(OP##_##DIM##d, "reduce.async.bulk.tensor", DIM, "." #OP)
REDUCE(add, 1)
REDUCE(add, 2)
REDUCE(add, 3)
REDUCE(add, 4)
REDUCE(add, 5)
REDUCE(min, 2)
REDUCE(max, 2)
REDUCE(inc, 2)
REDUCE(dec, 2)
STORE_KERNEL(and_2d, "reduce.async.bulk.tensor", 2, ".and")
STORE_KERNEL(or_2d, "reduce.async.bulk.tensor", 2, ".or")
STORE_KERNEL(xor_2d, "reduce.async.bulk.tensor", 2, ".xor")

// Prefetches change nothing.
extern "C" __global__ void prefetch_2d(const __grid_constant__ TensorMap map, Coords at) {
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1,%2}];" ::"l"(&map), "r"(at.c[0]),
                 "r"(at.c[1])
                 : "memory");
  }
}
