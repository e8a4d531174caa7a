// PTX of Ampere: asynchronous 16-byte copies, matrix loads and mma.sync, and the addresses that matrix loads take. All of
// it but the product of E4m3, which begins with 8.9, runs on every compute capability from 8.0 up.
#pragma once

#include <cstdint>

#include "common/math.cuh"
#include "common/swizzle.cuh"

namespace flash_ext::sm80 {

// A matrix load of four 8x8 matrices: lane l gives the address of row l % 8 of matrix l / 8.
//   tall: matrices 0 and 1 lie below each other, 2 and 3 to their right. A operand of 16 rows x 16 columns; with .trans the
//         B operand of 16 rows of contraction and two blocks of eight columns.
//   wide: matrices 0 and 1 lie side by side, 2 and 3 below them. B operand (K-major) of two blocks of eight rows.
FX_HOST_DEVICE constexpr int tall_row(int lane) { return lane % 16; }
FX_HOST_DEVICE constexpr int tall_chunk(int lane) { return lane / 16; }
FX_HOST_DEVICE constexpr int wide_row(int lane) { return lane % 8 + lane / 16 * 8; }
FX_HOST_DEVICE constexpr int wide_chunk(int lane) { return lane / 8 % 2; }

// Byte offset of a lane's row for the first 16 columns of a slab; those of the 16 columns `step` are at
// (offset ^ step * 32), since the swizzle acts on the same bits by exclusive or.
FX_HOST_DEVICE constexpr uint32_t tall_offset(int lane) {
  return swizzle_128b(tall_row(lane) * kSlabRowBytes + tall_chunk(lane) * 16);
}
FX_HOST_DEVICE constexpr uint32_t wide_offset(int lane) {
  return swizzle_128b(wide_row(lane) * kSlabRowBytes + wide_chunk(lane) * 16);
}
constexpr int kStepsPerSlab = kSlabColumns / 16;
FX_HOST_DEVICE constexpr uint32_t step_bits(int step) { return step % kStepsPerSlab * 32; }

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Read anew: what is computed from them occupies no registers in between.
__device__ __forceinline__ int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
}
__device__ __forceinline__ int read_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  __builtin_assume(lane >= 0 && lane < 32);
  return lane;
}
__device__ __forceinline__ int read_block() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// Keeps ptxas from computing x later than here: a store that is never executed. x is not negative.
__device__ __forceinline__ void complete_here(float x) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 nowhere;\nmov.b32 nowhere, 0;\nsetp.lt.f32 p, %0, 0f00000000;\n"
      "@p st.shared.f32 [nowhere], %0;\n}" ::"f"(x)
      : "memory");
}

// 16 bytes past L1, or zeros: with `inside` false nothing is read.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending groups of this thread are still running.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d[0..3] += A B of m16n8k16, float32 accumulators. A and B: 16-bit pairs in registers. Of E4m3: m16n8k32, where a pair is
// taken by two neighbours of the contraction.
struct E4m3 {};
template <class Element>
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<__half>(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<E4m3>(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace flash_ext::sm80
