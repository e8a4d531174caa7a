// mbarriers: phases, parities, transactions, bulk copies that complete them.
#include <cstdint>

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count) : "memory");
}
__device__ void arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}
__device__ void expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)), "r"(bytes) : "memory");
}
__device__ bool try_wait(uint64_t* bar, int parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(address(bar)), "r"(parity)
               : "memory");
  return done;
}
__device__ bool test_wait(uint64_t* bar, int parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(address(bar)), "r"(parity)
               : "memory");
  return done;
}
__device__ void wait(uint64_t* bar, int parity) {
  while (!try_wait(bar, parity)) {
  }
}
__device__ void bulk_load(void* to, const void* from, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
      "l"(from), "r"(bytes), "r"(address(bar))
      : "memory");
}

// One thread watches phases come and go.
extern "C" __global__ void phases(int* out) {
  __shared__ alignas(8) uint64_t bar;
  if (threadIdx.x != 0) return;
  init(&bar, 2);
  int n = 0;
  out[n++] = test_wait(&bar, 1);  // the phase before the first counts as complete
  out[n++] = test_wait(&bar, 0);
  arrive(&bar);
  out[n++] = test_wait(&bar, 0);
  arrive(&bar);
  out[n++] = test_wait(&bar, 0);
  out[n++] = test_wait(&bar, 1);
  uint64_t token;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(token) : "r"(address(&bar)) : "memory");
  uint32_t pending, done;
  asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(pending) : "l"(token));
  out[n++] = pending;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(address(&bar)), "l"(token)
               : "memory");
  out[n++] = done;
  arrive(&bar);
  asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(address(&bar)), "l"(token)
               : "memory");
  out[n++] = done;
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(address(&bar)) : "memory");
}

// Every thread of the CTA meets at an mbarrier, several times.
extern "C" __global__ void as_barrier(int* out, int rounds) {
  __shared__ alignas(8) uint64_t bar;
  extern __shared__ int box[];
  const int n = blockDim.x, i = threadIdx.x;
  if (i == 0) init(&bar, n);
  __syncthreads();
  box[i] = i;
  int parity = 0;
  for (int r = 0; r < rounds; ++r) {
    arrive(&bar);
    wait(&bar, parity);
    parity ^= 1;
    const int v = box[(i + 33) % n];
    arrive(&bar);
    wait(&bar, parity);
    parity ^= 1;
    box[i] = v;
  }
  out[i] = box[i];
}

// Warp 0 loads chunks of 128 ints by bulk copies through a ring of stages, the others double them.
extern "C" __global__ void pipeline(int* out, const int* in, int chunks) {
  constexpr int kStages = 3, kChunk = 128;
  __shared__ alignas(16) int ring[kStages][kChunk];
  __shared__ alignas(8) uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init(&full[s], 1);
      init(&empty[s], kChunk);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      for (int c = 0; c < chunks; ++c) {
        const int s = c % kStages;
        wait(&empty[s], (c / kStages & 1) ^ 1);
        expect(&full[s], sizeof(ring[s]));
        bulk_load(ring[s], in + c * kChunk, sizeof(ring[s]), &full[s]);
      }
    }
  } else {
    const int i = threadIdx.x - 32;
    for (int c = 0; c < chunks; ++c) {
      const int s = c % kStages;
      wait(&full[s], c / kStages & 1);
      out[c * kChunk + i] = 2 * ring[s][i];
      arrive(&empty[s]);
    }
  }
}

// Bulk stores: the source may be overwritten after wait_group.read.
extern "C" __global__ void bulk_store(int* out, int chunks) {
  __shared__ alignas(16) int box[256];
  for (int c = 0; c < chunks; ++c) {
    box[threadIdx.x] = c * 1000 + threadIdx.x;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + c * 256),
                   "r"(address(box)), "r"(1024)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// expect_tx alone, more than one arrival at once, and arrivals that do not count.
extern "C" __global__ void transactions(int* out, const int* in) {
  __shared__ alignas(16) int box[64];
  __shared__ alignas(8) uint64_t bar;
  if (threadIdx.x == 0) {
    init(&bar, 33);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_load(box, in, 128, &bar);  // may complete before it is expected
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], 256;" ::"r"(address(&bar)) : "memory");
    bulk_load(box + 32, in + 32, 128, &bar);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 1;" ::"r"(address(&bar)) : "memory");
  }
  if (threadIdx.x < 32) arrive(&bar);
  wait(&bar, 0);
  out[threadIdx.x] = box[threadIdx.x] + 1;
}
