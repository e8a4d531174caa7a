// Exchange and votes within a warp.

#define SHUFFLE(name, call)                                                    \
  extern "C" __global__ void shuffle_##name(int* out, const int* in, int by) { \
    const int v = in[threadIdx.x];                                             \
    out[threadIdx.x] = call;                                                   \
  }
SHUFFLE(up, __shfl_up_sync(0xffffffffu, v, by))
SHUFFLE(down, __shfl_down_sync(0xffffffffu, v, by))
SHUFFLE(xor, __shfl_xor_sync(0xffffffffu, v, by))
SHUFFLE(idx, __shfl_sync(0xffffffffu, v, by))
SHUFFLE(up8, __shfl_up_sync(0xffffffffu, v, by, 8))
SHUFFLE(down8, __shfl_down_sync(0xffffffffu, v, by, 8))
SHUFFLE(xor8, __shfl_xor_sync(0xffffffffu, v, by, 8))
SHUFFLE(idx8, __shfl_sync(0xffffffffu, v, by, 8))
SHUFFLE(varying, __shfl_sync(0xffffffffu, v, threadIdx.x* by))

// The predicate that tells whether the source lane was in range.
extern "C" __global__ void shuffle_predicate(int* out, const int* in) {
  int v = in[threadIdx.x], inside;
  asm volatile("{ .reg .pred p; shfl.sync.down.b32 %0|p, %0, 5, 0x1f, 0xffffffff; selp.b32 %1, 1, 0, p; }"
               : "+r"(v), "=r"(inside));
  out[threadIdx.x] = inside ? v : -1 - v;
}

extern "C" __global__ void shuffle_double(double* out, const double* in) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 3);
}

// Half of the lanes, each half on its own.
extern "C" __global__ void shuffle_halves(int* out, const int* in) {
  const unsigned lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000ffffu, in[lane], 1);
  } else {
    out[lane] = __shfl_xor_sync(0xffff0000u, in[lane], 2) + 1000;
  }
}

extern "C" __global__ void votes(unsigned* out, const int* in) {
  const unsigned lane = threadIdx.x;
  const int v = in[lane];
  out[lane] = __ballot_sync(0xffffffffu, v > 50);
  out[32 + lane] = __any_sync(0xffffffffu, v == 99) | __all_sync(0xffffffffu, v >= 0) << 1;
  unsigned uniform;
  asm volatile("{ .reg .pred p, q; setp.gt.s32 p, %1, 50; vote.sync.uni.pred q, p, 0xffffffff; selp.u32 %0, 1, 0, q; }"
               : "=r"(uniform)
               : "r"(v));
  out[64 + lane] = uniform;
}

extern "C" __global__ void matches(unsigned* out, const int* in) {
  const unsigned lane = threadIdx.x;
  int all;
  out[lane] = __match_any_sync(0xffffffffu, in[lane]);
  out[32 + lane] = __match_all_sync(0xffffffffu, in[lane] >> 10, &all);
  out[64 + lane] = all;
  out[96 + lane] = __match_any_sync(0xffffffffu, static_cast<long long>(in[lane]) << 32);
}

extern "C" __global__ void reductions(unsigned* out, const unsigned* in) {
  const unsigned lane = threadIdx.x, v = in[lane];
  const unsigned mask = 0xffffffffu;
  out[lane] = __reduce_add_sync(mask, v);
  out[32 + lane] = __reduce_min_sync(mask, v);
  out[64 + lane] = __reduce_max_sync(mask, v);
  out[96 + lane] = __reduce_and_sync(mask, v);
  out[128 + lane] = __reduce_or_sync(mask, v);
  out[160 + lane] = __reduce_xor_sync(mask, v);
  out[192 + lane] = __reduce_min_sync(mask, static_cast<int>(v));
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16) {
    out[224 + lane] = __reduce_add_sync(half, v);
  } else {
    out[224 + lane] = __reduce_max_sync(half, v);
  }
}

extern "C" __global__ void elect(unsigned* out) {
  unsigned leader, elected;
  asm volatile("{ .reg .pred p; elect.sync %0|p, 0xffffffff; selp.u32 %1, 1, 0, p; }" : "=r"(leader), "=r"(elected));
  out[threadIdx.x] = elected << 8 | leader;
  if (threadIdx.x >= 12) {
    asm volatile("{ .reg .pred p; elect.sync %0|p, 0xfffff000; selp.u32 %1, 1, 0, p; }" : "=r"(leader), "=r"(elected));
    out[32 + threadIdx.x] = elected << 8 | leader;
  }
}

// Inclusive sums over a CTA: shuffles inside warps, shared memory between them.
extern "C" __global__ void scan(int* out, const int* in) {
  __shared__ int totals[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int v = in[threadIdx.x];
  for (int by = 1; by < 32; by *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, v, by);
    if (lane >= by) v += left;
  }
  if (lane == 31) totals[warp] = v;
  __syncthreads();
  for (int w = 0; w < warp; ++w) v += totals[w];
  out[threadIdx.x] = v;
}
