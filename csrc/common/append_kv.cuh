// First step of a call over a KV cache: new rows of k and v go to their places, k and q are rotated on the way, and the
// lengths after the call and the parts of every sequence's keys are written down for the kernels that follow.
//
// CTA 0 decides the parts. The others move pieces of 16 bytes, one a thread, in the order of memory. Rotation (RoFormer, Su
// et al. 2021, equation 34) pairs neighbours, or columns half of rotary_dim apart: then a thread also reads the piece that
// holds its partners, which a neighbour reads at the same time. Bound by memory; no shared memory but for the decision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#include "common/dependent_launch.cuh"
#include "common/kvcache_params.h"

namespace flash_ext {

template <class Element_>
struct AppendKvConfig {
  using Element = Element_;
  static constexpr int kNumThreads = 256;
  static constexpr int kMinBlocksPerSm = 4;
  static constexpr int kBlockM = kNumThreads;  // pieces of a CTA
};

constexpr int kPieceElements = 8;

__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

template <class Element>
struct Piece {
  alignas(16) Element values[kPieceElements];
};

template <class Element>
__device__ __forceinline__ Piece<Element> load_piece(const Element* address) {
  Piece<Element> piece;
  *reinterpret_cast<uint4*>(&piece) = *reinterpret_cast<const uint4*>(address);
  return piece;
}
template <class Element>
__device__ __forceinline__ void store_piece(Element* address, const Piece<Element>& piece) {
  *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(&piece);
}

// kCount neighbours of a rotary table, by 16- or 8-byte loads.
template <int kCount, class Value>
__device__ __forceinline__ void load_values(const Value* address, float (&out)[kCount]) {
  constexpr int kBytes = kCount * sizeof(Value) < 16 ? 8 : 16, kEach = kBytes / sizeof(Value);
  using Word = typename std::conditional<kBytes == 16, uint4, uint2>::type;
#pragma unroll
  for (int first = 0; first < kCount; first += kEach) {
    const Word word = __ldg(reinterpret_cast<const Word*>(address + first));
    const Value* values = reinterpret_cast<const Value*>(&word);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if constexpr (sizeof(Value) == 4) {
        out[first + i] = values[i];
      } else {
        out[first + i] = as_float(values[i]);
      }
    }
  }
}

template <int kCount, class Element>
__device__ __forceinline__ void load_table(const AppendKvParams& params, const void* table, int position, int pair,
                                           float (&out)[kCount]) {
  const int64_t offset = int64_t(position) * (params.rotary_dim / 2) + pair;
  if (params.rotary_is_float) {
    load_values<kCount>(static_cast<const float*>(table) + offset, out);
  } else {
    load_values<kCount>(static_cast<const Element*>(table) + offset, out);
  }
}

// The piece at `column` of a row, turned by the angles of `position`.
template <class Element>
__device__ __forceinline__ Piece<Element> rotated_piece(const AppendKvParams& params, const Element* row, int column,
                                                        int position) {
  Piece<Element> piece = load_piece(row + column);
  if (params.rotary_cos == nullptr || column >= params.rotary_dim) return piece;
  position = clamp(position, 0, params.num_positions - 1);
  if (params.rotary_interleaved) {
    float c[4], s[4];
    load_table<4, Element>(params, params.rotary_cos, position, column / 2, c);
    load_table<4, Element>(params, params.rotary_sin, position, column / 2, s);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = as_float(piece.values[2 * i]), y = as_float(piece.values[2 * i + 1]);
      piece.values[2 * i] = Element(x * c[i] - y * s[i]);
      piece.values[2 * i + 1] = Element(x * s[i] + y * c[i]);
    }
  } else {
    const int half = params.rotary_dim / 2;
    const bool second = column >= half;
    const Piece<Element> partner = load_piece(row + (second ? column - half : column + half));
    float c[8], s[8];
    load_table<8, Element>(params, params.rotary_cos, position, second ? column - half : column, c);
    load_table<8, Element>(params, params.rotary_sin, position, second ? column - half : column, s);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float mine = as_float(piece.values[i]), other = as_float(partner.values[i]);
      piece.values[i] = Element(second ? other * s[i] + mine * c[i] : mine * c[i] - other * s[i]);
    }
  }
  return piece;
}

FX_HOST_DEVICE constexpr int length_before(const AppendKvParams& params, int sequence) {
  return clamp(params.cache_seqlens[sequence], 0, params.places.capacity);
}

// Reduction over the CTA; every thread gets the result.
template <int kNumThreads, class Combine>
__device__ __forceinline__ int64_t reduce_over_cta(int64_t value, int64_t* shared, const Combine& combine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kNumThreads / 32; ++warp) value = combine(value, shared[warp]);
  return value;
}

// Lengths after the call, and the parts of every sequence's keys.
template <class Config>
__device__ __forceinline__ void decide(const AppendKvParams& params) {
  constexpr int kThreads = Config::kNumThreads;
  __shared__ int64_t shared[kThreads / 32];
  const auto length = [&](int b) { return min_of(params.places.capacity, length_before(params, b) + params.seqlen_new); };
  const auto tiles = [&](int b) {
    const int padding = params.leftpad != nullptr ? max_of(0, params.leftpad[b]) : 0;
    return visible_tiles(params.split, length(b) - padding);
  };
  for (int b = threadIdx.x; b < params.batch; b += kThreads) params.lengths[b] = length(b);
  if (params.part_begin == nullptr) return;

  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  const auto larger = [](int64_t a, int64_t b) { return max_of(a, b); };
  const auto over_batch = [&](const auto& function, const auto& combine) {
    int64_t value = 0;
    for (int b = threadIdx.x; b < params.batch; b += kThreads) value = combine(value, function(tiles(b)));
    return reduce_over_cta<kThreads>(value, shared, combine);
  };
  const int target = params.split.num_splits > 0
                         ? 1
                         : choose_target(
                               params.split, [&](const auto& f) { return over_batch(f, plus); },
                               [&](const auto& f) { return over_batch(f, larger); });

  // Prefix sums, a CTA's width of sequences at a time.
  __shared__ int warp_sums[kThreads / 32];
  int total = 0;
  for (int first = 0; first < params.batch; first += kThreads) {
    const int b = first + threadIdx.x;
    const int mine = b < params.batch ? num_parts(params.split, tiles(b), target) : 0;
    int sum = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (threadIdx.x % 32 >= offset) sum += other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    int before = total;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      if (warp < int(threadIdx.x) / 32) before += warp_sums[warp];
      total += warp_sums[warp];
    }
    if (b < params.batch) params.part_begin[b] = before + sum - mine;
  }
  if (threadIdx.x == 0) params.part_begin[params.batch] = total;
}

template <class Config>
__device__ __forceinline__ void append_kv(const AppendKvParams& params) {
  using Element = typename Config::Element;
  allow_next_kernel();
  if (blockIdx.x == 0) {
    decide<Config>(params);
    return;
  }
  const int cta = blockIdx.x;
  const int which = cta < params.first_cta[1] ? 0 : cta < params.first_cta[2] ? 1 : 2;  // k, v, q
  const int index = (cta - params.first_cta[which]) * Config::kNumThreads + threadIdx.x;
  if (index >= params.num_pieces[which]) return;

  // piece < head < row < batch
  const int pieces = (which == 1 ? params.head_dim_v : params.head_dim) / kPieceElements;
  const int heads = which == 2 ? params.num_heads : params.num_heads_kv;
  const int rows = which == 2 ? params.seqlen_q : params.seqlen_new;
  const int of_heads = params.by_pieces[which].divide(index), column = (index - of_heads * pieces) * kPieceElements;
  const int of_rows = params.by_heads[which].divide(of_heads), head = of_heads - of_rows * heads;
  const int batch = params.by_rows[which].divide(of_rows), row = of_rows - batch * rows;

  const RowStrides& strides = which == 0 ? params.k_strides : which == 1 ? params.v_strides : params.q_strides;
  const Element* source = static_cast<const Element*>(which == 0 ? params.k : which == 1 ? params.v : params.q) +
                          batch * strides.batch + row * strides.row + head * strides.head;
  const int length = length_before(params, batch);
  if (which == 2) {
    const int position = length + (params.q_positions_move ? row : 0);
    store_piece(static_cast<Element*>(params.q_out) + int64_t(index) * kPieceElements,
                rotated_piece(params, source, column, position));
    return;
  }
  const KvPlace place = place_of(params.places, batch, length + row);
  if (!place.exists || (which == 0 && column < params.k_first_column)) return;
  const RowStrides& cache = which == 0 ? params.k_cache_strides : params.v_cache_strides;
  Element* target = static_cast<Element*>(which == 0 ? params.k_cache : params.v_cache) + place.block * cache.batch +
                    place.row * cache.row + head * cache.head + column;
  store_piece(target, which == 0 ? rotated_piece(params, source, column, length + row) : load_piece(source + column));
}

// kernel: the variant's entry, an instance of append_kv<Config>. Sizes, strides and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_append_kv(Kernel* kernel, AppendKvParams params, cudaStream_t stream) {
  const bool moves = params.k != nullptr && params.places.capacity > 0 && params.places.num_blocks > 0;
  const int rows[] = {moves ? params.seqlen_new : 0, moves && params.v != nullptr ? params.seqlen_new : 0,
                      params.q_out != nullptr ? params.seqlen_q : 0};
  const int heads[] = {params.num_heads_kv, params.num_heads_kv, params.num_heads};
  const int pieces[] = {params.head_dim / kPieceElements, params.head_dim_v / kPieceElements,
                        params.head_dim / kPieceElements};
  int64_t ctas = 1;
  for (int i = 0; i < 3; ++i) {
    const int64_t number = int64_t(params.batch) * rows[i] * heads[i] * pieces[i];
    params.first_cta[i] = static_cast<int>(ctas);
    ctas += ceil_div(number, int64_t(Config::kNumThreads));
    if (number > INT_MAX - Config::kNumThreads || ctas > INT_MAX) return cudaErrorInvalidConfiguration;
    params.num_pieces[i] = static_cast<int>(number);
    params.by_pieces[i] = make_divisor(max_of(1, pieces[i]));
    params.by_heads[i] = make_divisor(max_of(1, heads[i]));
    params.by_rows[i] = make_divisor(max_of(1, rows[i]));
  }
  params.first_cta[3] = static_cast<int>(ctas);
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(ctas)),
                          dim3(Config::kNumThreads), arguments, 0, stream);
}

}  // namespace flash_ext
