// What a kernel says and asks: printf, assert, trap, registers, programmatic launch.
#include <cassert>
#include <cstdio>

extern "C" __global__ void print(const float* in) {
  if (threadIdx.x < 2) {
    printf("thread %d of %u: %5.2f %s %c %%|%-6d|%06x|%lld|%e\n", threadIdx.x, blockDim.x, in[threadIdx.x], "text", 'z',
           42, 0xbeef, 123456789012345ll, 1.5e10);
  }
  if (threadIdx.x == 0) printf("no arguments\n");
}

extern "C" __global__ void asserts(const int* in) { assert(in[threadIdx.x] < 31 && "value too large"); }

extern "C" __global__ void traps(int* out) {
  if (threadIdx.x == 5) __trap();
  out[threadIdx.x] = 1;
}

// One warpgroup gives registers, two take them: 40 + 2 * 232 <= 3 * 168.
extern "C" __global__ void __launch_bounds__(384, 1) registers(int* out) {
  int v = threadIdx.x;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    v += 1;
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    v += 2;
  }
  out[threadIdx.x] = v;
}

extern "C" __global__ void dependent(int* out) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  out[threadIdx.x] = threadIdx.x;
  asm volatile("griddepcontrol.launch_dependents;");
}
