// An e4m3 copy of a tensor with its scales, flash_ext::quantize_fp8. The definition, to the bit: flash_ext/quantize.py.
//
// A CTA owns 64 rows of one head: it reads them once (16 bytes a thread at a time, kept in registers), rotates them, finds
// their largest element and, for block scales, writes the copy at once. Scales of a head or of the tensor take two
// launches: kFindAmax, then kWrite. Bound by memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <climits>

#include "common/math.cuh"
#include "common/quantize_params.h"
#include "common/seqlens.cuh"

namespace flash_ext {

template <class Element_, int kHeadDim_>
struct QuantizeFp8Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // the largest; smaller multiples of 8 are predicated
  static constexpr int kNumThreads = 256;
  static constexpr int kMinBlocksPerSm = kHeadDim > 128 ? 2 : 4;
  static constexpr int kBlockM = kScaleRows;
  static constexpr int kPerLoad = 16 / sizeof(Element);
  static constexpr int kLoads = kBlockM * kHeadDim / kPerLoad / kNumThreads;  // of a thread
  static_assert(sizeof(Element) == 2 && kLoads >= 1, "a thread loads at least 16 bytes");
};

__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
template <class Element>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// x times M, for the eight columns from `column` on. All lanes of the warp take part.
__device__ __forceinline__ void rotate_columns(float (&x)[8], const Hadamard& hadamard, int column, int lane) {
  const uint32_t flips = hadamard.flips[column / 32] >> column % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = flips >> i & 1 ? -x[i] : x[i];
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const float a = x[i], b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    }
  }
  for (int lanes = 1; lanes < hadamard.block / 8; lanes *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], lanes);
      x[i] = lane & lanes ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], hadamard.factor);
}

// The largest of all threads of the CTA, known to all of them.
template <int kNumThreads>
__device__ __forceinline__ float max_of_cta(float x) {
  __shared__ float warps[kNumThreads / 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
#pragma unroll
  for (int warp = 1; warp < kNumThreads / 32; ++warp) x = fmaxf(x, warps[warp]);
  return x;
}

// Rounded to nearest even; finite numbers saturate, others become NaN. `low` in the low byte.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
  low = is_finite(low) ? low : NAN;
  high = is_finite(high) ? high : NAN;
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class Config>
__device__ __forceinline__ void quantize_fp8(const QuantizeFp8Params& params) {
  using Element = typename Config::Element;
  using Pair = typename PairOf<Element>::Type;
  const int thread = threadIdx.x, lane = thread % 32;

  // Which rows, and where their scale stands.
  int number = blockIdx.x;
  const int slot = number % params.num_slots;
  number /= params.num_slots;
  const int head = number % params.num_heads, batch = number / params.num_heads;
  SequenceBlock place{batch, slot};
  int begin = 0, end = params.seqlens.num_rows;  // of the sequence
  if (params.seqlens.cu_seqlens != nullptr) {
    place = block_at_slot(params.seqlens, params.num_sequences, kScaleRows, slot);
    begin = clamp(params.seqlens.cu_seqlens[place.index], 0, end);
    end = clamp(params.seqlens.cu_seqlens[place.index + 1], begin, end);
  }
  const int num_rows = clamp(end - begin - place.block * kScaleRows, 0, kScaleRows);
  const int first_row = begin + place.block * kScaleRows;
  int scale_index = 0;
  if (params.scale == ScaleOf::kBlock) scale_index = (batch * params.num_heads + head) * params.num_slots + slot;
  if (params.scale == ScaleOf::kHead) scale_index = place.index * params.num_heads + head;

  const int chunks_per_row = params.head_dim / Config::kPerLoad;
  const Element* x = static_cast<const Element*>(params.x) + batch * params.x_strides.batch +
                     head * params.x_strides.head;
  // Eight columns of one row for each load. Threads take neighbouring columns, so that the threads of one butterfly block
  // are neighbouring lanes of one warp.
  float values[Config::kLoads][8];
  float amax = 0.f;
#pragma unroll
  for (int load = 0; load < Config::kLoads; ++load) {
    const int chunk = load * Config::kNumThreads + thread;
    const int row = chunk / chunks_per_row, column = chunk % chunks_per_row * Config::kPerLoad;
    uint4 words{};
    if (row < num_rows) {
      words = __ldg(reinterpret_cast<const uint4*>(x + (first_row + row) * params.x_strides.row + column));
    }
    const Pair* pairs = reinterpret_cast<const Pair*>(&words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(pairs[i]);
      values[load][2 * i] = pair.x;
      values[load][2 * i + 1] = pair.y;
    }
    if (params.rotates) rotate_columns(values[load], params.hadamard, column, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) amax = fmaxf(amax, is_finite(values[load][i]) ? fabsf(values[load][i]) : 0.f);
  }

  if (params.stage != QuantizeStage::kWrite) amax = max_of_cta<Config::kNumThreads>(amax);
  if (params.stage == QuantizeStage::kFindAmax) {
    // Floats that are not negative are ordered as their bits are.
    if (thread == 0 && amax > 0.f) atomicMax(&params.amax[scale_index], __float_as_int(amax));
    return;
  }
  if (params.stage == QuantizeStage::kWrite) amax = __int_as_float(params.amax[scale_index]);
  const float bounded = fmaxf(amax, kSmallestAmax);
  const float factor = __fdiv_rn(kE4m3Max, bounded);
  // One CTA of those that share a scale writes it.
  const bool first = params.scale == ScaleOf::kBlock || (params.scale == ScaleOf::kHead && place.block == 0) ||
                     blockIdx.x == 0;
  if (thread == 0 && first) params.descale[scale_index] = __fdiv_rn(bounded, kE4m3Max);

  uint8_t* out = static_cast<uint8_t*>(params.out) + (int64_t(batch) * params.seqlens.num_rows + first_row) *
                                                         params.num_heads * params.head_dim +
                 head * params.head_dim;
#pragma unroll
  for (int load = 0; load < Config::kLoads; ++load) {
    const int chunk = load * Config::kNumThreads + thread;
    const int row = chunk / chunks_per_row, column = chunk % chunks_per_row * Config::kPerLoad;
    float(&y)[8] = values[load];
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = __fmul_rn(y[i], factor);
    const uint2 words{e4m3_pair(y[0], y[1]) | e4m3_pair(y[2], y[3]) << 16,
                      e4m3_pair(y[4], y[5]) | e4m3_pair(y[6], y[7]) << 16};
    if (row < num_rows) {
      *reinterpret_cast<uint2*>(out + int64_t(row) * params.num_heads * params.head_dim + column) = words;
    }
  }
}

// kernel: the variant's entry. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_quantize_fp8(Kernel* kernel, QuantizeFp8Params params, cudaStream_t stream) {
  const int64_t num_ctas = int64_t(params.num_slots) * params.num_heads * params.batch;
  if (num_ctas == 0) return cudaSuccess;
  if (num_ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto launch = [&](QuantizeStage stage) {
    params.stage = stage;
    void* arguments[] = {&params};
    // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_ctas)),
                            dim3(Config::kNumThreads), arguments, 0, stream);
  };
  if (params.scale == ScaleOf::kBlock) return launch(QuantizeStage::kBoth);
  const cudaError_t status = launch(QuantizeStage::kFindAmax);
  return status == cudaSuccess ? launch(QuantizeStage::kWrite) : status;
}

}  // namespace flash_ext
