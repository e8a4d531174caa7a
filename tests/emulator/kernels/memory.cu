// Loads, stores and address spaces.
#include <cstdint>

struct alignas(16) Mixed {
  uint8_t bytes[3];
  int16_t half;
  int32_t word;
  double real;
  uint64_t big;
};

extern "C" __global__ void copy_mixed(Mixed* out, const Mixed* in) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  Mixed m = in[i];
  m.bytes[1] += 1;
  m.half = static_cast<int16_t>(-m.half);
  m.word ^= m.bytes[0];
  m.real *= 2;
  m.big += static_cast<uint64_t>(m.word);
  out[i] = m;
}

template <class T>
__device__ void copy(void* out, const void* in, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) static_cast<T*>(out)[i] = static_cast<const T*>(in)[i];
}
extern "C" __global__ void copy_u8(void* out, const void* in, int n) { copy<uint8_t>(out, in, n); }
extern "C" __global__ void copy_u16(void* out, const void* in, int n) { copy<uint16_t>(out, in, n); }
extern "C" __global__ void copy_u64(void* out, const void* in, int n) { copy<uint64_t>(out, in, n); }
extern "C" __global__ void copy_int2(void* out, const void* in, int n) { copy<int2>(out, in, n); }
extern "C" __global__ void copy_int4(void* out, const void* in, int n) { copy<int4>(out, in, n); }

// Sign and zero extension of narrow loads.
extern "C" __global__ void widen(long long* out, const int8_t* s8, const uint8_t* u8, const int16_t* s16,
                                 const uint16_t* u16) {
  const int i = threadIdx.x;
  out[4 * i] = s8[i];
  out[4 * i + 1] = u8[i];
  out[4 * i + 2] = s16[i];
  out[4 * i + 3] = u16[i];
}

// Static and dynamic shared memory; a transposition through both.
extern "C" __global__ void transpose(float* out, const float* in) {
  __shared__ float tile[32][33];
  extern __shared__ float dynamic[];
  for (int row = threadIdx.y; row < 32; row += blockDim.y) {
    tile[row][threadIdx.x] = in[row * 32 + threadIdx.x];
  }
  __syncthreads();
  for (int row = threadIdx.y; row < 32; row += blockDim.y) {
    dynamic[row * 32 + threadIdx.x] = tile[threadIdx.x][row];
  }
  __syncthreads();
  for (int row = threadIdx.y; row < 32; row += blockDim.y) {
    out[row * 32 + threadIdx.x] = dynamic[row * 32 + threadIdx.x];
  }
}

// An array that is indexed at run time lives in local memory.
extern "C" __global__ void local_array(int* out, const int* order) {
  int values[16];
  for (int i = 0; i < 16; ++i) values[i] = i * i + threadIdx.x;
  for (int i = 0; i < 16; ++i) values[order[i]] += values[(order[i] + 1) % 16];
  int hash = 0;
  for (int i = 0; i < 16; ++i) hash = hash * 31 + values[i];
  out[threadIdx.x] = hash;
}

// One pointer variable, three address spaces.
extern "C" __global__ void generic(int* out, int* global) {
  __shared__ int shared[32];
  int local[2] = {static_cast<int>(threadIdx.x) * 3, 5};
  shared[threadIdx.x] = threadIdx.x * 7;
  __syncwarp();
  int* where = threadIdx.x % 3 == 0 ? &global[threadIdx.x] : threadIdx.x % 3 == 1 ? &shared[threadIdx.x] : &local[0];
  const int before = *where;
  *where = before + 1;
  __syncwarp();
  out[threadIdx.x] = before * 1000 + (threadIdx.x % 3 == 1 ? shared[threadIdx.x] : *where) +
                     (__isShared(where) ? 100000 : 0) + (__isGlobal(where) ? 200000 : 0) +
                     (__isLocal(where) ? 300000 : 0);
}

__constant__ float kTable[4] = {0.5f, -2.0f, 8.0f, 1e-3f};
__device__ int device_counter = 41;
__device__ const int* device_pointer = &device_counter;

extern "C" __global__ void variables(float* table, int* counter) {
  table[threadIdx.x] = kTable[threadIdx.x % 4];
  if (threadIdx.x == 0) {
    counter[0] = *device_pointer;
    device_counter += 1;
    counter[1] = device_counter;
  }
}

struct Params {
  int offset[3];
  float scale;
  const float* data;
};

// A struct argument; one member is addressed at run time.
extern "C" __global__ void struct_argument(float* out, const __grid_constant__ Params params, short extra) {
  out[threadIdx.x] = params.data[threadIdx.x] * params.scale + params.offset[threadIdx.x % 3] + extra;
}

// Cache operators, volatile, L2 hints, and their vector forms.
extern "C" __global__ void hints(float* out, const float* in) {
  const int i = threadIdx.x;
  float a, b, x, y, z, w;
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(a) : "l"(in + i));
  asm volatile("ld.global.L2::cache_hint.f32 %0, [%1], %2;" : "=f"(b) : "l"(in + i), "l"(policy));
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
               : "l"(in + i / 4 * 4));
  const float c = __ldcg(in + i) + __ldcs(in + i) + __ldg(in + i) + *static_cast<const volatile float*>(in + i);
  __stwt(out + i, a + b + c + (i % 4 == 0 ? x : i % 4 == 1 ? y : i % 4 == 2 ? z : w));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(in));
}

// Byte-wise stores of different lanes into one word, and 16-bit ones.
extern "C" __global__ void narrow_shared(unsigned* out) {
  __shared__ unsigned words[32];
  words[threadIdx.x] = 0xffffffffu;
  __syncthreads();
  reinterpret_cast<uint8_t*>(words)[threadIdx.x * 3 % 128] = static_cast<uint8_t>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = words[threadIdx.x];
}

extern "C" __global__ void indices(int4* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned lane, warp, lt, smid, nsmid, dynamic;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(warp));
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lt));
  asm volatile("mov.u32 %0, %%smid;" : "=r"(smid));
  asm("mov.u32 %0, %%nsmid;" : "=r"(nsmid));
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(dynamic));
  const bool consistent = __popc(lt) == lane && smid < nsmid && warp < 32;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      make_int4(block, thread, consistent ? static_cast<int>(lane) : -1, static_cast<int>(dynamic));
}

// Time goes forward, and sleeping is allowed.
extern "C" __global__ void clocks(int* out) {
  const long long start = clock64();
  unsigned long long before, after;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(before));
  __nanosleep(100);
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(after));
  out[threadIdx.x] = clock64() > start && after >= before;
}
