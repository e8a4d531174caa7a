// cp.async: sizes, zero fill, groups and mbarriers.
// arch: sm_80
#include "ptx.cuh"

#define COPY_KERNEL(NAME, SUFFIX, BYTES)                                                            \
  extern "C" __global__ void NAME(uint8_t* out, const uint8_t* in) {                                \
    const int at = threadIdx.x * BYTES;                                                             \
    const uint32_t to = shared_address(dynamic_shared) + at;                                        \
    asm volatile("cp.async." SUFFIX " [%0], [%1], " #BYTES ";" ::"r"(to), "l"(in + at) : "memory"); \
    asm volatile("cp.async.commit_group;" ::: "memory");                                            \
    asm volatile("cp.async.wait_group 0;" ::: "memory");                                            \
    __syncthreads();                                                                                \
    const int mirror = (blockDim.x - 1 - threadIdx.x) * BYTES;                                      \
    for (int i = 0; i < BYTES; ++i) out[at + i] = dynamic_shared[mirror + i];                       \
  }

COPY_KERNEL(copy_4, "ca.shared.global", 4)
COPY_KERNEL(copy_8, "ca.shared.global", 8)
COPY_KERNEL(copy_16, "ca.shared.global", 16)
COPY_KERNEL(copy_16_cg, "cg.shared.global", 16)
COPY_KERNEL(copy_16_l2, "cg.shared.global.L2::128B", 16)

// Thread t copies sizes[t] of 16 bytes; the rest becomes zero.
extern "C" __global__ void zero_fill(uint8_t* out, const uint8_t* in, const int* sizes) {
  const int at = threadIdx.x * 16;
  reinterpret_cast<uint4*>(dynamic_shared)[threadIdx.x] = make_uint4(~0u, ~0u, ~0u, ~0u);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dynamic_shared + at)), "l"(in + at),
               "r"(sizes[threadIdx.x])
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  copy16(out, dynamic_shared, blockDim.x * 16);
}

// A ring of 3 stages, two groups in flight: out[step] = in[step] + 1.
extern "C" __global__ void pipeline(uint32_t* out, const uint32_t* in, int steps) {
  const uint32_t base = shared_address(dynamic_shared);
  auto* stages = reinterpret_cast<uint32_t*>(dynamic_shared);
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t to = base + 4 * (step % 3 * blockDim.x + threadIdx.x);
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(in + step * blockDim.x + threadIdx.x)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");  // empty groups keep the count right
  };
  load(0);
  load(1);
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    const int other = threadIdx.x ^ 33;
    out[step * blockDim.x + threadIdx.x] = stages[step % 3 * blockDim.x + other] + 1;
    load(step + 2);  // the stage read one step ago: the barrier above has passed since
  }
}

// Every thread arrives twice on an mbarrier that expects both (noinc): itself and by its copy.
extern "C" __global__ void arrive(uint32_t* out, const uint32_t* in) {
  const uint32_t barrier = shared_address(dynamic_shared);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(2 * blockDim.x) : "memory");
  }
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(barrier + 16 + 4 * threadIdx.x), "l"(in + threadIdx.x)
               : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      ".reg .b64 token;\n\t"
      "mbarrier.arrive.shared.b64 token, [%0];\n\t"
      "wait:\n\t"
      "mbarrier.test_wait.shared.b64 done, [%0], token;\n\t"
      "@!done bra wait;\n\t"
      "}" ::"r"(barrier)
      : "memory");
  const auto* data = reinterpret_cast<const uint32_t*>(dynamic_shared + 16);
  out[threadIdx.x] = data[blockDim.x - 1 - threadIdx.x];
}
