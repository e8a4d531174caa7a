// Arithmetic shared by every kernel. Index arithmetic is constexpr on host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FX_HOST_DEVICE inline
#endif

namespace flash_ext {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <class T>
FX_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return a / b + (a % b != 0);  // a + b could overflow
}
template <class T>
FX_HOST_DEVICE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FX_HOST_DEVICE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

// Division by a number known before the launch: a multiplication and a shift, exact for numerators below 2^31.
struct Divisor {
  uint32_t multiplier;  // 0 for the divisor 1
  uint32_t shift;

  FX_HOST_DEVICE constexpr int divide(int n) const {
    return multiplier == 0 ? n : static_cast<int>((uint64_t(uint32_t(n)) * multiplier >> 32) >> shift);
  }
};

// divisor > 0. With 2^bits the least power of two not below it, n / divisor = n * ceil(2^(31 + bits) / divisor) >>
// (31 + bits): the rounded-up factor is off by less than 2^-31 relative.
constexpr Divisor make_divisor(int divisor) {
  uint32_t bits = 0;
  while ((uint64_t(1) << bits) < uint64_t(divisor)) ++bits;
  if (bits == 0) return {0, 0};
  return {static_cast<uint32_t>(ceil_div<uint64_t>(uint64_t(1) << (31 + bits), divisor)), bits - 1};
}

#ifdef __CUDACC__
// 2^x in one MUFU; subnormal results become 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest and packed, `low` in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// The reverse.
template <class Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t packed);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t packed) {
  return __half22float2(reinterpret_cast<const __half2&>(packed));
}
#endif

}  // namespace flash_ext
