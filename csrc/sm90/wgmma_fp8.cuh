// wgmma m64nNk32 on e4m3 operands with float32 accumulators, both K-major (there is no other form for 8-bit types).
//   ss: A and B in shared memory.   rs: A in registers.   d = A B + (accumulate ? d : 0)
#pragma once

#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

#define FX_TEXT_80 FX_TEXT_60 ", " FX_TEXT10(6) ", " FX_TEXT10(7)
#define FX_REGS_80 FX_REGS_60, FX_REGS10(6), FX_REGS10(7)
#define FX_TEXT_112 FX_TEXT_90 ", " FX_TEXT10(9) ", " FX_TEXT10(10) ", %110, %111"
#define FX_REGS_112 FX_REGS_90, FX_REGS10(9), FX_REGS10(10), "+f"(d[110]), "+f"(d[111])

template <int kN>
struct WgmmaFp8;

// R = N / 2 accumulators; A to F are the numbers R to R + 5.
#define FX_DEFINE_WGMMA_FP8(N, R, A, B, C, D, E, F)                                                       \
  template <>                                                                                             \
  struct WgmmaFp8<N> {                                                                                    \
    __device__ __forceinline__ static void ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\n"                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" FX_TEXT_##R               \
                   "}, %" #A ", %" #B ", p, 1, 1;\n}"                                                     \
                   : FX_REGS_##R                                                                          \
                   : "l"(a), "l"(b), "r"(int(accumulate)));                                               \
    }                                                                                                     \
    __device__ __forceinline__ static void rs(float (&d)[R], const uint32_t* a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #F ", 0;\n"                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" FX_TEXT_##R               \
                   "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", p, 1, 1;\n}"                        \
                   : FX_REGS_##R                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));           \
    }                                                                                                     \
  };
FX_DEFINE_WGMMA_FP8(64, 32, 32, 33, 34, 35, 36, 37)
FX_DEFINE_WGMMA_FP8(96, 48, 48, 49, 50, 51, 52, 53)
FX_DEFINE_WGMMA_FP8(128, 64, 64, 65, 66, 67, 68, 69)
FX_DEFINE_WGMMA_FP8(160, 80, 80, 81, 82, 83, 84, 85)
FX_DEFINE_WGMMA_FP8(192, 96, 96, 97, 98, 99, 100, 101)
FX_DEFINE_WGMMA_FP8(224, 112, 112, 113, 114, 115, 116, 117)
FX_DEFINE_WGMMA_FP8(256, 128, 128, 129, 130, 131, 132, 133)

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Four weights rounded to e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

}  // namespace flash_ext::sm90
