// Hopper's instructions as functions: mbarriers, TMA, wgmma, setmaxnreg, named barriers, fences. Plain PTX, so that the
// kernels compile in seconds; tests/layouts compares operand layouts with CUTLASS.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/params.h"

namespace flash_ext::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers ----

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to TMA; a __syncthreads must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One predicated instruction instead of a branch around it.
__device__ __forceinline__ void mbarrier_arrive_if(uint64_t* barrier, bool predicate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}"
      ::"r"(shared_address(barrier)), "r"(static_cast<int>(predicate))
      : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
// Does not wait at all.
__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Returns once the phase of this parity has completed. try_wait may time out, hence the loop.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- TMA ----

// L2 eviction priorities as TMA encodes them.
enum class CacheHint : uint64_t {
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Coordinates innermost first. Completes `bytes of the box` on the barrier.
__device__ __forceinline__ void tma_load(const TensorMap& map, uint64_t* barrier, void* destination,
                                         const int (&coordinates)[5], CacheHint hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
      ::"r"(shared_address(destination)), "l"(&map), "r"(shared_address(barrier)), "r"(coordinates[0]),
      "r"(coordinates[1]), "r"(coordinates[2]), "r"(coordinates[3]), "r"(coordinates[4]),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// Plain bytes by the copy engine; addresses and size are multiples of 16. A load completes `bytes` on the barrier.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(destination)), "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Adds float32 numbers in shared memory to those in global memory, as part of the thread's current bulk group.
__device__ __forceinline__ void bulk_reduce_add(float* destination, const void* source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(destination), "r"(shared_address(source)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All bulk groups of this thread have read their source.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// All bulk groups of this thread are complete: what they wrote is in memory.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Turns of CTAs at one place in memory: its number says whose turn it is. What the CTA before wrote there by the copy
// engine, and waited for, comes before what this one does.
__device__ __forceinline__ void wait_for_turn(const int* turns, int mine) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turns) : "memory");
  } while (now < mine);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void pass_turn(int* turns) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
}

// Generic-proxy writes to shared memory become visible to wgmma and TMA.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- cp.async ----

// 16 bytes, or zeros where `read` is false.
__device__ __forceinline__ void cp_async_16_bytes(uint32_t destination, const void* source, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(read ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- warps and registers ----

// Called by all threads of a converged warp; true for one of them.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// The lane, read anew: what is derived from it is computed there and not kept in registers from before.
__device__ __forceinline__ int read_lane() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return static_cast<int>(lane);
}

// The same number, of which the compiler knows nothing: what is derived from it is computed here, not kept from before.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- wgmma ----

// Orders register writes before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler may not move uses of these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// ptxas moves arithmetic across waits, here the exponentials that should run beside a product to after it. A store that
// is never executed, since `value` is never below zero, keeps all that `value` depends on before the next wait.
__device__ __forceinline__ void complete_before_wait(float value) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 nowhere;\nmov.b32 nowhere, 0;\nsetp.lt.f32 p, %0, 0f00000000;\n"
      "@p st.shared.f32 [nowhere], %0;\n}" ::"f"(value)
      : "memory");
}

// wgmma m64nNk16 with float32 accumulators `d`: d = A B + (accumulate ? d : 0).
//   ss: A and B in shared memory, each K-major, or MN-major where said (Major).
//   rs: A in registers, B MN-major in shared memory; always accumulates.
// The operand lists are spelled in tens: FX_TEXT10(3) is "%30, ... %39", FX_REGS10(3) the operands d[30] to d[39].
#define FX_TEXT10(t)                                                                                \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define FX_REGS4(t, a, b, c, e) "+f"(d[t##a]), "+f"(d[t##b]), "+f"(d[t##c]), "+f"(d[t##e])
#define FX_REGS8(t) FX_REGS4(t, 0, 1, 2, 3), FX_REGS4(t, 4, 5, 6, 7)
#define FX_REGS10(t) FX_REGS8(t), "+f"(d[t##8]), "+f"(d[t##9])

#define FX_TEXT_16 FX_TEXT10() ", %10, %11, %12, %13, %14, %15"
#define FX_REGS_16 FX_REGS10(), FX_REGS4(1, 0, 1, 2, 3), "+f"(d[14]), "+f"(d[15])
#define FX_TEXT_32 FX_TEXT10() ", " FX_TEXT10(1) ", " FX_TEXT10(2) ", %30, %31"
#define FX_REGS_32 FX_REGS10(), FX_REGS10(1), FX_REGS10(2), "+f"(d[30]), "+f"(d[31])
#define FX_TEXT_40 FX_TEXT10() ", " FX_TEXT10(1) ", " FX_TEXT10(2) ", " FX_TEXT10(3)
#define FX_REGS_40 FX_REGS10(), FX_REGS10(1), FX_REGS10(2), FX_REGS10(3)
#define FX_TEXT_48 FX_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FX_REGS_48 FX_REGS_40, FX_REGS8(4)
#define FX_TEXT_56 FX_TEXT_40 ", " FX_TEXT10(4) ", %50, %51, %52, %53, %54, %55"
#define FX_REGS_56 FX_REGS_40, FX_REGS10(4), FX_REGS4(5, 0, 1, 2, 3), "+f"(d[54]), "+f"(d[55])
#define FX_TEXT_60 FX_TEXT10() ", " FX_TEXT10(1) ", " FX_TEXT10(2) ", " FX_TEXT10(3) ", " FX_TEXT10(4) ", " FX_TEXT10(5)
#define FX_REGS_60 FX_REGS10(), FX_REGS10(1), FX_REGS10(2), FX_REGS10(3), FX_REGS10(4), FX_REGS10(5)
#define FX_TEXT_64 FX_TEXT_60 ", %60, %61, %62, %63"
#define FX_REGS_64 FX_REGS_60, FX_REGS4(6, 0, 1, 2, 3)
#define FX_TEXT_88 \
  FX_TEXT_60 ", " FX_TEXT10(6) ", " FX_TEXT10(7) ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FX_REGS_88 FX_REGS_60, FX_REGS10(6), FX_REGS10(7), FX_REGS8(8)
#define FX_TEXT_90 FX_TEXT_60 ", " FX_TEXT10(6) ", " FX_TEXT10(7) ", " FX_TEXT10(8)
#define FX_REGS_90 FX_REGS_60, FX_REGS10(6), FX_REGS10(7), FX_REGS10(8)
#define FX_TEXT_96 FX_TEXT_90 ", %90, %91, %92, %93, %94, %95"
#define FX_REGS_96 FX_REGS_90, FX_REGS4(9, 0, 1, 2, 3), "+f"(d[94]), "+f"(d[95])
#define FX_TEXT_128                                                                \
  FX_TEXT_90 ", " FX_TEXT10(9) ", " FX_TEXT10(10) ", " FX_TEXT10(11) ", %120, %121, " \
             "%122, %123, %124, %125, %126, %127"
#define FX_REGS_128 FX_REGS_90, FX_REGS10(9), FX_REGS10(10), FX_REGS10(11), FX_REGS8(12)

// Which index of a matrix in shared memory runs along its rows: k, as in A's rows and B's columns, or the other.
enum class Major { kK, kMn };

template <class Element, int kN>
struct Wgmma;

// R = N / 2 accumulators; A to F are the numbers R to R + 5.
#define FX_DEFINE_WGMMA(ELEMENT, TYPE, N, R, A, B, C, D, E, F)                                       \
  template <>                                                                                        \
  struct Wgmma<ELEMENT, N> {                                                                         \
    template <Major kMajorA = Major::kK, Major kMajorB = Major::kK>                                  \
    __device__ __forceinline__ static void ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\n"                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FX_TEXT_##R  \
                   "}, %" #A ", %" #B ", p, 1, 1, %" #D ", %" #E ";\n}"                              \
                   : FX_REGS_##R                                                                     \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMajorA)), "n"(int(kMajorB)));    \
    }                                                                                                \
    __device__ __forceinline__ static void rs(float (&d)[R], const uint32_t* a, uint64_t b) {        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #F ", 0;\n"                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FX_TEXT_##R  \
                   "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", p, 1, 1, 1;\n}"                \
                   : FX_REGS_##R                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));                    \
    }                                                                                                \
  };
#define FX_DEFINE_WGMMA_BOTH(N, R, A, B, C, D, E, F)                  \
  FX_DEFINE_WGMMA(__nv_bfloat16, "bf16", N, R, A, B, C, D, E, F)      \
  FX_DEFINE_WGMMA(__half, "f16", N, R, A, B, C, D, E, F)
FX_DEFINE_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
FX_DEFINE_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
FX_DEFINE_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45)
FX_DEFINE_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
FX_DEFINE_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61)
FX_DEFINE_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
FX_DEFINE_WGMMA_BOTH(176, 88, 88, 89, 90, 91, 92, 93)
FX_DEFINE_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
FX_DEFINE_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133)

}  // namespace flash_ext::sm90
