// CTA barriers: all threads, some warps, arrival without waiting, reductions.

extern "C" __global__ void rotate(int* out, int rounds) {
  extern __shared__ int box[];
  const int n = blockDim.x, i = threadIdx.x;
  box[i] = i;
  for (int r = 0; r < rounds; ++r) {
    __syncthreads();
    const int v = box[(i + 1) % n];
    __syncthreads();
    box[i] = v;
  }
  out[i] = box[i];
}

extern "C" __global__ void counts(int* out, const int* in) {
  const int v = in[threadIdx.x];
  out[threadIdx.x] = __syncthreads_count(v > 3) * 100 + __syncthreads_or(v == 7) * 10 + __syncthreads_and(v >= 0);
}

__device__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Warp 0 produces, warps 1 and 2 consume: "full" and "empty" barriers, several rounds.
extern "C" __global__ void producer_consumer(int* out, int rounds) {
  __shared__ int box[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kFull = 1, kEmpty = 2, kThreads = 96;
  if (warp == 0) {
    for (int r = 0; r < rounds; ++r) {
      if (r > 0) named_sync(kEmpty, kThreads);
      box[lane] = r * 100 + lane;
      named_arrive(kFull, kThreads);
    }
  } else {
    int sum = 0;
    for (int r = 0; r < rounds; ++r) {
      named_sync(kFull, kThreads);
      sum += box[31 - lane] * warp;
      if (r + 1 < rounds) named_arrive(kEmpty, kThreads);
    }
    out[threadIdx.x - 32] = sum;
  }
}

// Two pairs of warps, each pair with a barrier of its own, at different speeds.
extern "C" __global__ void two_pairs(int* out) {
  __shared__ int box[4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = warp / 2;
  int v = warp;
  for (int r = 0; r < 3 + 4 * pair; ++r) {
    box[warp][lane] = v;
    named_sync(pair + 1, 64);
    v += box[warp ^ 1][lane];
    named_sync(pair + 1, 64);
  }
  out[threadIdx.x] = v;
}

// Warps that have left count as arrived.
extern "C" __global__ void some_leave(int* out) {
  __shared__ int box[128];
  if (threadIdx.x >= 64) return;
  box[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = box[63 - threadIdx.x];
}

extern "C" __global__ void barrier_reduce(int* out, const int* in) {
  int count;
  asm volatile("{ .reg .pred p; setp.gt.s32 p, %1, 3; barrier.cta.red.popc.u32 %0, 3, 64, p; }"
               : "=r"(count)
               : "r"(in[threadIdx.x])
               : "memory");
  out[threadIdx.x] = count;
}
