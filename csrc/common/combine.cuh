// Last step of split-KV: the results of the parts of a sequence's keys become one.
//
//   m = max(lse_p, sink)   sum = sum_p exp(lse_p - m) + exp(sink - m)
//   out = sum_p exp(lse_p - m) / sum * out_p               lse = m + log(sum)
//
// A part that saw nothing has lse -inf and weighs nothing; its out is not read. A row that no part saw gives out 0 and the
// sink (-inf without). The order of the sums is fixed, so results are bitwise reproducible. Bound by memory: the threads
// of a row read whole lines of its parts, four float32 each, and no shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#include "common/dependent_launch.cuh"
#include "common/kvcache_params.h"

namespace flash_ext {

template <class Element_, int kHeadDimV_>
struct CombineConfig {
  using Element = Element_;
  static constexpr int kHeadDimV = kHeadDimV_;  // head_dim_v rounded up; narrower rows are predicated
  static constexpr int kColumns = 4;            // of a thread in one access
  static constexpr int kThreadsPerRow = kHeadDimV / kColumns < 32 ? kHeadDimV / kColumns : 32;
  static constexpr int kAccesses = kHeadDimV / (kColumns * kThreadsPerRow);
  static constexpr int kNumThreads = 128;
  static constexpr int kMinBlocksPerSm = kAccesses > 2 ? 4 : 8;
  static constexpr int kBlockM = kNumThreads / kThreadsPerRow;  // rows of a CTA
  static_assert(kAccesses * kColumns * kThreadsPerRow == kHeadDimV, "the threads of a row cover it evenly");
};

// One predicated 16-byte load, zeros otherwise: no branch, so that the loads of several parts are under way together.
__device__ __forceinline__ float4 load_4_floats_if(bool predicate, const float* address) {
  float4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\nmov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\n"
      "mov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;\n@p ld.global.v4.f32 {%0, %1, %2, %3}, [%5];\n}"
      : "=&f"(x.x), "=&f"(x.y), "=&f"(x.z), "=&f"(x.w)
      : "r"(static_cast<int>(predicate)), "l"(address));
  return x;
}
// One store: from an assignment in a branch the compiler has made two.
__device__ __forceinline__ void store_8_bytes_if(bool predicate, void* address, uint32_t low, uint32_t high) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.u32 [%1], {%2, %3};\n}" ::"r"(
                   static_cast<int>(predicate)),
               "l"(address), "r"(low), "r"(high)
               : "memory");
}

template <class Config>
__device__ __forceinline__ void combine(const CombineParams& params) {
  using Element = typename Config::Element;
  constexpr int kThreads = Config::kThreadsPerRow, kAccesses = Config::kAccesses;
  wait_for_previous_kernel();
  const int thread = threadIdx.x % kThreads;
  const int rows_of_sequence = params.num_heads * params.seqlen_q;
  // Rows beyond the last work on it again, and store nothing: the shuffles need every lane.
  const int wanted = blockIdx.x * Config::kBlockM + threadIdx.x / kThreads;
  const int row = min_of(wanted, params.batch * rows_of_sequence - 1);
  const int batch = params.by_rows.divide(row), within = row - batch * rows_of_sequence;
  const int head = params.by_seqlen_q.divide(within), query = within - head * params.seqlen_q;

  const int first = clamp(params.part_begin[batch], 0, params.max_parts);
  const int parts = clamp(params.part_begin[batch + 1], first, params.max_parts) - first;
  const float* lses = params.lse_partial + int64_t(first) * rows_of_sequence + within;
  const float sink = params.sinks != nullptr ? params.sinks[head] : -INFINITY;

  float largest = sink;
  for (int p = thread; p < parts; p += kThreads) largest = fmaxf(largest, lses[int64_t(p) * rows_of_sequence]);
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  const float base = largest == -INFINITY ? 0.f : largest;
  const auto weight = [&](float lse) { return fast_exp2((lse - base) * kLog2e); };
  float sum = 0.f;
  for (int p = thread; p < parts; p += kThreads) sum += weight(lses[int64_t(p) * rows_of_sequence]);
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  sum += weight(sink);
  const float normalise = sum == 0.f ? 0.f : fast_reciprocal(sum);  // NaN stays NaN

  float acc[kAccesses][4] = {};
  const float* source = params.out_partial + (int64_t(first) * rows_of_sequence + within) * params.head_dim_v;
#pragma unroll 4
  for (int p = 0; p < parts; ++p) {
    const float lse = lses[int64_t(p) * rows_of_sequence];
    const float share = weight(lse) * normalise;
    const float* row_of_part = source + int64_t(p) * rows_of_sequence * params.head_dim_v;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      const int column = (i * kThreads + thread) * Config::kColumns;
      const bool read = column < params.head_dim_v && lse != -INFINITY;
      const float4 values = load_4_floats_if(read, row_of_part + column);
      acc[i][0] = fmaf(share, values.x, acc[i][0]);
      acc[i][1] = fmaf(share, values.y, acc[i][1]);
      acc[i][2] = fmaf(share, values.z, acc[i][2]);
      acc[i][3] = fmaf(share, values.w, acc[i][3]);
    }
  }
  if (row != wanted) return;

  Element* out = static_cast<Element*>(params.out) + batch * params.out_strides.batch +
                 query * params.out_strides.row + head * params.out_strides.head;
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const int column = (i * kThreads + thread) * Config::kColumns;
    store_8_bytes_if(column < params.head_dim_v, out + column, pack_pair<Element>(acc[i][0], acc[i][1]),
                     pack_pair<Element>(acc[i][2], acc[i][3]));
  }
  if (thread == 0) params.lse[row] = sum == 0.f ? -INFINITY : base + kLn2 * fast_log2(sum);
}

// kernel: the variant's entry, an instance of combine<Config>. Sizes and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_combine(Kernel* kernel, CombineParams params, cudaStream_t stream) {
  const int64_t rows = int64_t(params.batch) * params.num_heads * params.seqlen_q;
  if (rows > INT_MAX - Config::kBlockM) return cudaErrorInvalidConfiguration;
  params.by_rows = make_divisor(params.num_heads * params.seqlen_q);
  params.by_seqlen_q = make_divisor(params.seqlen_q);
  void* arguments[] = {&params};
  return launch_kernel(reinterpret_cast<const void*>(kernel),
                       dim3(static_cast<unsigned>(ceil_div(rows, int64_t(Config::kBlockM)))), dim3(Config::kNumThreads),
                       arguments, 0, stream, params.dependent != 0);
}

}  // namespace flash_ext
