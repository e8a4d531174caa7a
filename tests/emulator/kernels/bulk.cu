// Bulk copies of plain bytes, to and from global memory and between CTAs, and bulk reductions.
#include "ptx.cuh"

// Shared memory: two mbarriers, then from byte 128 on the data.
constexpr uint32_t kData = 128;

__device__ inline uint32_t prepare_barrier() {
  const uint32_t barrier = shared_address(dynamic_shared);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  return barrier;
}

__device__ inline uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

extern "C" __global__ void bulk_load(uint8_t* out, const uint8_t* in, int bytes) {
  const uint32_t barrier = prepare_barrier();
  if (threadIdx.x == 0) {
    // Two copies, announced together.
    const int first = bytes / 32 * 16;
    mbarrier_expect(barrier, bytes);
    for (int i = 0; i < 2; ++i) {
      const int at = i * first, length = i ? bytes - first : first;
      if (length == 0) continue;
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       barrier + kData + at),
                   "l"(in + at), "r"(length), "r"(barrier)
                   : "memory");
    }
  }
  mbarrier_wait(barrier, 0);
  copy16(out, dynamic_shared + kData, bytes);
}

extern "C" __global__ void bulk_store(uint8_t* out, const uint8_t* in, int bytes) {
  copy16(dynamic_shared + kData, in, bytes);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out),
                 "r"(shared_address(dynamic_shared) + kData), "r"(bytes)
                 : "memory");
    bulk_commit();
    bulk_wait_read();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) dynamic_shared[kData + i] = 0x99;
  if (threadIdx.x == 0) bulk_wait();
}

// Rank 0 sends its data to rank 1, whose barrier counts the bytes.
extern "C" __global__ void __cluster_dims__(2, 1, 1) bulk_to_peer(uint8_t* out, const uint8_t* in, int bytes) {
  const uint32_t barrier = prepare_barrier();
  const uint32_t rank = cluster_rank();
  copy16(dynamic_shared + kData, in + rank * bytes, bytes);
  fence_proxy_async();
  __syncthreads();
  if (rank == 1 && threadIdx.x == 0) mbarrier_expect(barrier, bytes);
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(peer_address(barrier + kData, 1)),
        "r"(barrier + kData), "r"(bytes), "r"(peer_address(barrier, 1))
        : "memory");
  }
  if (rank == 1) mbarrier_wait(barrier, 0);
  copy16(out + rank * bytes, dynamic_shared + kData, bytes);
  cluster_sync();  // rank 0's memory is the source until the copy is done
}

// Each CTA sends half of the input to both.
extern "C" __global__ void __cluster_dims__(2, 1, 1) bulk_multicast(uint8_t* out, const uint8_t* in, int bytes) {
  const uint32_t barrier = prepare_barrier();
  const uint32_t rank = cluster_rank();
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, bytes);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(barrier + kData + rank * bytes / 2),
        "l"(in + rank * bytes / 2), "r"(bytes / 2), "r"(barrier), "h"(static_cast<uint16_t>(3))
        : "memory");
  }
  mbarrier_wait(barrier, 0);
  copy16(out + rank * bytes, dynamic_shared + kData, bytes);
  cluster_sync();
}

#define REDUCE(NAME, OP)                                                                                     \
  extern "C" __global__ void NAME(uint8_t* inout, const uint8_t* in, int bytes) {                            \
    copy16(dynamic_shared + kData, in, bytes);                                                               \
    fence_proxy_async();                                                                                     \
    __syncthreads();                                                                                         \
    if (threadIdx.x == 0) {                                                                                  \
      asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group." OP " [%0], [%1], %2;" ::"l"(inout), \
                   "r"(shared_address(dynamic_shared) + kData), "r"(bytes)                                   \
                   : "memory");                                                                              \
      bulk_commit();                                                                                         \
      bulk_wait();                                                                                           \
    }                                                                                                        \
  }

REDUCE(add_f32, "add.f32")
REDUCE(add_f64, "add.f64")
REDUCE(add_f16, "add.noftz.f16")
REDUCE(add_bf16, "add.noftz.bf16")
REDUCE(min_f16, "min.f16")
REDUCE(max_bf16, "max.bf16")
REDUCE(add_u32, "add.u32")
REDUCE(add_s32, "add.s32")
REDUCE(add_u64, "add.u64")
REDUCE(min_s32, "min.s32")
REDUCE(max_u32, "max.u32")
REDUCE(min_s64, "min.s64")
REDUCE(max_u64, "max.u64")
REDUCE(inc_u32, "inc.u32")
REDUCE(dec_u32, "dec.u32")
REDUCE(and_b32, "and.b32")
REDUCE(or_b64, "or.b64")
REDUCE(xor_b32, "xor.b32")

// Both CTAs add to rank 0's shared memory.
extern "C" __global__ void __cluster_dims__(2, 1, 1) reduce_to_peer(uint8_t* out, const uint8_t* in, int bytes) {
  const uint32_t barrier = prepare_barrier();
  const uint32_t rank = cluster_rank();
  const uint32_t sums = kData + bytes;
  copy16(dynamic_shared + kData, in + rank * bytes, bytes);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) dynamic_shared[sums + i] = 0;
  fence_proxy_async();
  __syncthreads();
  if (rank == 0 && threadIdx.x == 0) mbarrier_expect(barrier, 2 * bytes);
  cluster_sync();
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 "
        "[%0], [%1], %2, [%3];" ::"r"(peer_address(barrier + sums, 0)),
        "r"(barrier + kData), "r"(bytes), "r"(peer_address(barrier, 0))
        : "memory");
  }
  if (rank == 0) {
    mbarrier_wait(barrier, 0);
    copy16(out, dynamic_shared + sums, bytes);
  }
  cluster_sync();
}

extern "C" __global__ void bulk_prefetch(const uint8_t* in, int bytes) {
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(in), "r"(bytes) : "memory");
  }
}
