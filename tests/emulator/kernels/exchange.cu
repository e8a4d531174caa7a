// Two CTAs that stream tiles to each other through distributed shared memory, as the Hopper backward on pairs does: right, and
// with one thing wrong at a time.
#include <cstdint>

enum class Bug { kNone, kNoEmptyWait, kNoFullWait, kEarlyRelease, kOwnRelease, kNoProxyFence, kNoExitBarrier, kWrongBytes };

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ uint32_t in_cta(uint32_t local, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(local), "r"(rank));
  return mapped;
}
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ void init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address(barrier)), "r"(parity)
        : "memory");
  }
}

// Warp 0 sends, warp 1 receives: out[64 * cta + 32 + lane] is the sum of what came.
template <Bug kBug>
__device__ void exchange(int* out, int rounds) {
  __shared__ alignas(16) int outgoing[32], incoming[32];
  __shared__ alignas(8) uint64_t full, empty;
  const uint32_t rank = blockIdx.x % 2, peer = rank ^ 1;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init(&full);
    init(&empty);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  int sum = 0;
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      if (kBug != Bug::kNoEmptyWait) wait(&empty, (round & 1) ^ 1);
      outgoing[lane] = 1000 * rank + 32 * round + lane;
      if (kBug != Bug::kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane == 0) {
        asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(
                         in_cta(address(incoming), peer)),
                     "r"(address(outgoing)), "r"(in_cta(address(&full), peer))
                     : "memory");
      }
      __syncwarp();
    }
  } else {
    for (int round = 0; round < rounds; ++round) {
      if (lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&full)),
                     "r"(kBug == Bug::kWrongBytes ? 112 : 128)
                     : "memory");
      }
      __syncwarp();
      if (kBug != Bug::kNoFullWait) wait(&full, round & 1);
      const auto release = [&] {
        __syncwarp();
        if (lane == 0) {
          const uint32_t whose = kBug == Bug::kOwnRelease ? rank : peer;
          asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_cta(address(&empty), whose))
                       : "memory");
        }
        __syncwarp();
      };
      if (kBug == Bug::kEarlyRelease) release();
      sum += *static_cast<volatile int*>(&incoming[lane]);
      if (kBug != Bug::kEarlyRelease) release();
    }
  }
  out[64 * blockIdx.x + threadIdx.x] = sum;
  if (kBug != Bug::kNoExitBarrier) cluster_sync();
}

#define EXCHANGE(NAME, BUG) \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) NAME(int* out, int rounds) { exchange<Bug::BUG>(out, rounds); }
EXCHANGE(correct, kNone)
EXCHANGE(no_empty_wait, kNoEmptyWait)
EXCHANGE(no_full_wait, kNoFullWait)
EXCHANGE(early_release, kEarlyRelease)
EXCHANGE(own_release, kOwnRelease)
EXCHANGE(no_proxy_fence, kNoProxyFence)
EXCHANGE(no_exit_barrier, kNoExitBarrier)
EXCHANGE(wrong_bytes, kWrongBytes)
