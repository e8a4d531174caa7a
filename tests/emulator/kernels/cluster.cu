// Clusters: ranks, distributed shared memory, remote mbarriers, cluster barriers.
#include <cstdint>

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ uint32_t special(int which) {
  uint32_t v;
  if (which == 0) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  if (which == 1) asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  if (which == 2) asm("mov.u32 %0, %%clusterid.x;" : "=r"(v));
  if (which == 3) asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(v));
  return v;
}
__device__ uint32_t map_rank(uint32_t local, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  return remote;
}
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

extern "C" __global__ void ranks(int4* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = make_int4(special(0), special(1), special(2), special(3));
}

// Each CTA reads its right neighbour's box and adds to its left neighbour's.
extern "C" __global__ void neighbours(int* out) {
  __shared__ int box[32], sum[32];
  const uint32_t rank = special(0), n = special(1), i = threadIdx.x;
  box[i] = blockIdx.x * 100 + i;
  sum[i] = 0;
  cluster_sync();
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];"
               : "=r"(v)
               : "r"(map_rank(address(&box[i]), (rank + 1) % n))
               : "memory");
  asm volatile("red.relaxed.cluster.shared::cluster.add.s32 [%0], %1;" ::"r"(
                   map_rank(address(&sum[(i + 1) % 32]), (rank + n - 1) % n)),
               "r"(static_cast<int>(rank + 1))
               : "memory");
  cluster_sync();
  out[blockIdx.x * 64 + i] = v;
  out[blockIdx.x * 64 + 32 + i] = sum[i];
}

// The same through generic pointers.
extern "C" __global__ void generic_pointers(int* out) {
  __shared__ int box[32];
  const uint32_t rank = special(0), n = special(1);
  box[threadIdx.x] = 10 * rank + threadIdx.x;
  cluster_sync();
  int* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(&box[threadIdx.x]), "r"((rank + 1) % n));
  uint32_t owner;
  asm("getctarank.u64 %0, %1;" : "=r"(owner) : "l"(remote));
  const int v = *remote;
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = v * 10 + owner;
}

__device__ void wait(uint64_t* bar, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address(bar)), "r"(parity)
        : "memory");
  }
}

// A token goes round the ring of CTAs: a remote store, then a remote arrival on the next one's mbarrier.
extern "C" __global__ void ring(int* out, int rounds) {
  __shared__ alignas(8) uint64_t bar;
  __shared__ int token;
  const uint32_t rank = special(0), n = special(1);
  if (threadIdx.x == 0) {
    token = 0;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&bar)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    for (int r = 0; r < rounds; ++r) {
      if (rank > 0 || r > 0) wait(&bar, rank > 0 ? r & 1 : (r - 1) & 1);
      const uint32_t next = (rank + 1) % n;
      asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(map_rank(address(&token), next)), "r"(token + 1)
                   : "memory");
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(map_rank(address(&bar), next))
                   : "memory");
    }
    if (rank == 0) wait(&bar, (rounds - 1) & 1);
  }
  cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = token;
}

// Asynchronous remote stores that count bytes on the receiver's mbarrier.
extern "C" __global__ void async_store(int* out) {
  __shared__ alignas(8) uint64_t bar;
  __shared__ alignas(16) int box[32];
  const uint32_t rank = special(0), n = special(1), i = threadIdx.x;
  if (i == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&bar)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;" ::"r"(address(&bar)) : "memory");
  }
  cluster_sync();
  const uint32_t next = (rank + 1) % n;
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(
                   map_rank(address(&box[i]), next)),
               "r"(static_cast<int>(1000 * rank + i)), "r"(map_rank(address(&bar), next))
               : "memory");
  wait(&bar, 0);
  out[blockIdx.x * 32 + i] = box[i];
  cluster_sync();
}

// Shared memory to shared memory of another CTA by a bulk copy.
extern "C" __global__ void bulk_to_peer(int* out) {
  __shared__ alignas(8) uint64_t bar;
  __shared__ alignas(16) int from[64], to[64];
  const uint32_t rank = special(0), n = special(1), i = threadIdx.x;
  from[i] = rank * 500 + i;
  from[i + 32] = rank * 500 + i + 32;
  if (i == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&bar)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(address(&bar)) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  cluster_sync();
  if (i == 0) {
    const uint32_t next = (rank + 1) % n;
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(
                     map_rank(address(to), next)),
                 "r"(address(from)), "r"(map_rank(address(&bar), next))
                 : "memory");
  }
  wait(&bar, 0);
  out[blockIdx.x * 64 + i] = to[i];
  out[blockIdx.x * 64 + 32 + i] = to[i + 32];
  cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) fixed_cluster(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = special(1) * 10 + special(0);
}
