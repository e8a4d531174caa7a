// Kernels that are wrong, one way each. The line that is to blame carries a tag; tests look for it.
#include <cstdint>

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

extern "C" __global__ void store_beyond_end(int* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;  // @store_beyond_end
}

extern "C" __global__ void load_before_start(int* out, const int* in) {
  out[threadIdx.x] = in[static_cast<int>(threadIdx.x) - 1];  // @load_before_start
}

extern "C" __global__ void null_pointer(int* out, const int* in) {
  out[threadIdx.x] = *reinterpret_cast<const int*>(in == nullptr ? 16 : 0);  // @null_pointer
}

extern "C" __global__ void write_to_input(int* out, int* in) {
  out[threadIdx.x] = in[threadIdx.x];
  in[threadIdx.x] = 0;  // @write_to_input
}

extern "C" __global__ void misaligned(int* out, const char* in, int by) {
  out[threadIdx.x] = *reinterpret_cast<const int*>(in + by);  // @misaligned
}

extern "C" __global__ void misaligned_vector(float4* out, const float* in, int by) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + by);  // @misaligned_vector
}

extern "C" __global__ void shared_overrun(int* out, int i) {
  extern __shared__ int box[];
  box[threadIdx.x + i] = 1;  // @shared_overrun
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x];
}

extern "C" __global__ void shared_race(int* out) {
  __shared__ int box[64];
  box[threadIdx.x] = 0;
  __syncthreads();
  box[threadIdx.x] = threadIdx.x;            // @race_writes
  out[threadIdx.x] = box[63 - threadIdx.x];  // @race_reads
}

extern "C" __global__ void uninitialised_shared(int* out) {
  __shared__ int box[64];
  if (threadIdx.x < 63) box[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x];  // @uninitialised_shared
}

extern "C" __global__ void uninitialised_workspace(int* out, const int* workspace) {
  out[threadIdx.x] = workspace[threadIdx.x];  // @uninitialised_workspace
}

extern "C" __global__ void global_race(int* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;  // @global_race
}

extern "C" __global__ void barrier_deadlock(int* out) {
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");  // @barrier_deadlock
  } else {
    asm volatile("bar.sync 2, 64;" ::: "memory");
  }
  out[threadIdx.x] = 1;
}

extern "C" __global__ void mbarrier_deadlock(int* out) {
  __shared__ alignas(8) uint64_t bar;
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(address(&bar)) : "memory");
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&bar)) : "memory");
  uint32_t done = 0;
  while (!done) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address(&bar))
                 : "memory");  // @mbarrier_deadlock
  }
  out[threadIdx.x] = 1;
}

extern "C" __global__ void spin_forever(int* flag) {
  while (*static_cast<volatile int*>(flag) == 0) {  // @spin_forever
  }
}

extern "C" __global__ void missing_transaction(int* out, const int* in) {
  __shared__ alignas(16) int box[32];
  __shared__ alignas(8) uint64_t bar;
  uint32_t done = 0;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&bar)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 144;" ::"r"(address(&bar)) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(address(box)),
        "l"(in), "r"(address(&bar))
        : "memory");
  }
  __syncwarp();
  while (!done) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address(&bar))
                 : "memory");
  }
  out[threadIdx.x] = box[threadIdx.x];
}

extern "C" __global__ void no_wait_for_copy(int* out, const int* in) {
  __shared__ alignas(16) int box[32];
  __shared__ alignas(8) uint64_t bar;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&bar)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;" ::"r"(address(&bar)) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(address(box)),
        "l"(in), "r"(address(&bar))
        : "memory");
  }
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x];  // @no_wait_for_copy
}

extern "C" __global__ void no_proxy_fence(int* out) {
  __shared__ alignas(16) int box[32];
  box[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;" ::"l"(out), "r"(address(box))
                 : "memory");  // @no_proxy_fence
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

extern "C" __global__ void source_overwritten(int* out) {
  __shared__ alignas(16) int box[32];
  box[threadIdx.x] = threadIdx.x;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;" ::"l"(out), "r"(address(box))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
  box[threadIdx.x] = 0;  // @source_overwritten
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

extern "C" __global__ void peer_exits(int* out) {
  __shared__ int box[32];
  uint32_t rank, remote;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  box[threadIdx.x] = rank;
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  if (rank == 1) return;
  // Long enough for the other CTA to be gone.
  for (int i = 0; i < 2000; ++i) asm volatile("nanosleep.u32 20;");
  asm("mapa.shared::cluster.u32 %0, %1, 1;" : "=r"(remote) : "r"(address(&box[threadIdx.x])));
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(remote) : "memory");  // @peer_exits
  out[threadIdx.x] = v;
}

extern "C" __global__ void __launch_bounds__(384, 1) register_pool(int* out) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  out[threadIdx.x] = 1;
}
