// Atomic operations on global and shared memory, their vector forms, and what they order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#define ATOMIC(name, type, call)                                                       \
  extern "C" __global__ void global_##name(type* cell, type* before, const type* in) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                               \
    type* const at = cell + i % 4;                                                     \
    const type v = in[i];                                                              \
    before[i] = call;                                                                  \
  }                                                                                    \
  extern "C" __global__ void shared_##name(type* cell, type* before, const type* in) { \
    __shared__ type cells[4];                                                          \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                               \
    if (threadIdx.x < 4) cells[threadIdx.x] = cell[threadIdx.x];                       \
    __syncthreads();                                                                   \
    type* const at = cells + i % 4;                                                    \
    const type v = in[i];                                                              \
    before[i] = call;                                                                  \
    __syncthreads();                                                                   \
    if (threadIdx.x < 4) cell[threadIdx.x] = cells[threadIdx.x];                       \
  }

ATOMIC(add_s32, int, atomicAdd(at, v))
ATOMIC(add_u64, unsigned long long, atomicAdd(at, v))
ATOMIC(add_f32, float, atomicAdd(at, v))
ATOMIC(add_f64, double, atomicAdd(at, v))
ATOMIC(sub_s32, int, atomicSub(at, v))
ATOMIC(min_s32, int, atomicMin(at, v))
ATOMIC(max_u32, unsigned, atomicMax(at, v))
ATOMIC(min_s64, long long, atomicMin(at, v))
ATOMIC(max_u64, unsigned long long, atomicMax(at, v))
ATOMIC(and_u32, unsigned, atomicAnd(at, v))
ATOMIC(or_u32, unsigned, atomicOr(at, v))
ATOMIC(xor_u64, unsigned long long, atomicXor(at, v))
ATOMIC(inc_u32, unsigned, atomicInc(at, 9u))
ATOMIC(dec_u32, unsigned, atomicDec(at, 9u))
ATOMIC(exch_u32, unsigned, atomicExch(at, v))
ATOMIC(cas_u32, unsigned, atomicCAS(at, v, v + 1))
ATOMIC(cas_u64, unsigned long long, atomicCAS(at, v, v + 1))
ATOMIC(cas_u16, unsigned short, atomicCAS(at, v, static_cast<unsigned short>(v + 1)))

extern "C" __global__ void add_halves(__half2* h, __nv_bfloat162* b, __half* h1) {
  atomicAdd(h, __floats2half2_rn(1.0f, 0.25f));
  atomicAdd(b, __floats2bfloat162_rn(0.5f, 2.0f));
  atomicAdd(h1, __float2half(0.5f));
}

// Reductions without a result, scalar and vector (sm_90).
extern "C" __global__ void reductions(float* f, unsigned* u, unsigned* packed) {
  const float x = static_cast<float>(threadIdx.x);
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(f), "f"(x) : "memory");
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(f + 4), "f"(x), "f"(2 * x), "f"(1.0f), "f"(-x)
               : "memory");
  asm volatile("red.global.add.v2.f32 [%0], {%1, %1};" ::"l"(f + 8), "f"(x) : "memory");
  asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(u), "r"(threadIdx.x * 5 % 37) : "memory");
  asm volatile("red.release.gpu.global.add.u32 [%0], 3;" ::"l"(u + 1) : "memory");
  const unsigned two = 0x3f803f80u;  // bf16 1, 1
  asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %1, %1, %1};" ::"l"(packed), "r"(two) : "memory");
}

// The value of a vector atomic is what stood there before.
extern "C" __global__ void vector_atomic(float* f, float4* before) {
  float4 old;
  asm volatile("atom.global.add.v4.f32 {%0, %1, %2, %3}, [%4], {%5, %6, %7, %8};"
               : "=f"(old.x), "=f"(old.y), "=f"(old.z), "=f"(old.w)
               : "l"(f), "f"(1.0f), "f"(2.0f), "f"(3.0f), "f"(4.0f)
               : "memory");
  before[threadIdx.x] = old;
}

// The last CTA to arrive sums what the others left. One thread speaks for its CTA: barrier, fence,
// atomic on the way out; atomic, fence, barrier on the way in.
extern "C" __global__ void last_block(int* total, int* partial, unsigned* ticket) {
  __shared__ bool last;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + threadIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  int sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += partial[i];
  atomicAdd(total, sum);
}

// CTA b waits for CTA b - 1: a chain through acquire loads and release stores.
extern "C" __global__ void chain(int* values, int* flags) {
  if (threadIdx.x != 0) return;
  int v = 1;
  if (blockIdx.x > 0) {
    int ready = 0;
    while (!ready)
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(flags + blockIdx.x - 1) : "memory");
    v = 2 * values[blockIdx.x - 1] + 1;
  }
  values[blockIdx.x] = v;
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flags + blockIdx.x) : "memory");
}
