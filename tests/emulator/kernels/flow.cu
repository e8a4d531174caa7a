// Control flow: lanes that part, meet again, call, leave, and wait for one another.

extern "C" __global__ void collatz(unsigned* steps, const unsigned* start) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned long long n = start[i];
  unsigned count = 0;
  while (n != 1) {
    n = n % 2 ? 3 * n + 1 : n / 2;
    ++count;
  }
  steps[i] = count;
}

extern "C" __global__ void nested(int* out, const int* in) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int x = in[i];
  int sum = 0;
  for (int a = 0; a < x % 7; ++a) {
    if (a == x % 3) continue;
    for (int b = 0; b < x % 5; ++b) {
      if (a * b > 6) break;
      sum += a ^ b;
      if (sum > 40) goto done;
    }
    sum += 1000;
  }
done:
  out[i] = sum;
}

extern "C" __global__ void cases(int* out, const int* in) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int y = in[i];
  switch (y) {
    case 0:
      y = 11;
      break;
    case 1:
      y = 7 * i;
    case 2:
      y += 5;
      break;
    case 3:
      out[i] = -1;
      return;
    case 4:
      y = __popc(i);
      break;
    case 5:
      y = ~i;
      break;
    case 6:
      y = i << 3;
      break;
    default:
      y = y * y;
  }
  out[i] = y;
}

// One bit mask per lane: who is here with me. Reconvergence after the branch is what is checked.
extern "C" __global__ void masks(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane < 10) {
    out[lane] = __activemask();
    if (lane % 2) out[32 + lane] = __activemask();
  } else {
    out[lane] = __activemask();
  }
  __syncwarp();
  out[64 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
}

// Lanes leave one after the other; those that stay must still vote and shuffle.
extern "C" __global__ void early_exit(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane >= 20) return;
  const unsigned mask = (1u << 20) - 1;
  out[lane] = __shfl_sync(mask, lane * 3, 19 - lane);
}

__noinline__ __device__ int power(int base, int exponent) {
  int result = 1;
  for (int i = 0; i < exponent; ++i) result *= base;
  return result;
}

__noinline__ __device__ float4 scaled(float4 v, float s) { return make_float4(v.x * s, v.y * s, v.z * s, v.w * s); }

// Some lanes call, some do not; arguments and results are scalars and structs.
extern "C" __global__ void calls(int* out, float4* vectors) {
  const int i = threadIdx.x;
  if (i % 3 != 1) out[i] = power(i % 5, i % 4) + (i % 2 ? power(2, i % 6) : 0);
  vectors[i] = scaled(vectors[i], 0.5f * i);
}

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

extern "C" __global__ void recursion(int* out) { out[threadIdx.x] = fibonacci(threadIdx.x % 11); }

typedef int (*Operation)(int, int);
__device__ __noinline__ int op_add(int a, int b) { return a + b; }
__device__ __noinline__ int op_sub(int a, int b) { return a - b; }
__device__ __noinline__ int op_mul(int a, int b) { return a * b; }
__device__ Operation const kOperations[3] = {op_add, op_sub, op_mul};

extern "C" __global__ void indirect(int* out, const int* which) {
  const int i = threadIdx.x;
  out[i] = kOperations[which[i]](i, 7);
}

// Lane 31 waits for lane 0, which comes later in program order of the if.
extern "C" __global__ void lane_waits_for_lane(int* out) {
  __shared__ volatile int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncwarp();
  if (threadIdx.x == 31) {
    while (flag == 0) {
    }
    out[1] = 2;
  } else if (threadIdx.x == 0) {
    out[0] = 1;
    __threadfence_block();
    flag = 1;
  }
}

// A lock that the lanes of many warps take in turn.
extern "C" __global__ void spin_lock(int* lock, int* counter) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      __threadfence();
      *reinterpret_cast<volatile int*>(counter) = *reinterpret_cast<volatile int*>(counter) + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

// Trip counts differ per lane; __syncwarp inside the loop gathers those that are left.
extern "C" __global__ void loop_with_sync(int* out) {
  const int lane = threadIdx.x;
  __shared__ int box[32];
  box[lane] = 0;
  __syncwarp();
  int sum = 0;
  for (int i = 0; i < lane; ++i) {
    const unsigned stay = 0xffffffffu << (i + 1);
    __syncwarp(stay);
    box[lane] = i + lane;
    __syncwarp(stay);
    sum += box[lane == 31 ? lane : lane + 1];
    __syncwarp(stay);
  }
  out[lane] = sum;
}
