// Output policy: how a warp's 16 finished rows reach global memory.
#pragma once

#include "common/fragment.cuh"
#include "common/params.h"
#include "common/swizzle.cuh"
#include "common/work.cuh"

namespace flash_ext {

// Staging area of one warp: one slab of 16 rows.
constexpr int kRowsPerWarp = 16;
constexpr int kStagingBytesPerWarp = kRowsPerWarp * kSlabRowBytes;

// stmatrix.x4 of the accumulator's column blocks 2 * pair and 2 * pair + 1: register r holds column block r / 2 and row
// half r % 2, and lane l gives the address of row l % 8 of register l / 8.
FX_HOST_DEVICE constexpr int staging_source(int pair, int r) {
  return 8 * pair + 4 * (r >> 1) + 2 * (r & 1);
}
FX_HOST_DEVICE constexpr uint32_t staging_write_offset(int lane, int pair) {
  return swizzle_128b((lane % 8 + 8 * (lane / 8 % 2)) * kSlabRowBytes + (2 * pair + lane / 16) * 16);
}
// The same without stmatrix: where register r's pair of columns goes.
FX_HOST_DEVICE constexpr uint32_t staging_word_offset(int lane, int pair, int r) {
  return swizzle_128b((lane / 4 + 8 * (r & 1)) * kSlabRowBytes + (2 * pair + (r >> 1)) * 16) + lane % 4 * 4;
}
// Then eight lanes read a row of 128 bytes; pass p covers rows 4p to 4p + 3.
FX_HOST_DEVICE constexpr int staging_read_row(int lane, int pass) { return 4 * pass + lane / 8; }
FX_HOST_DEVICE constexpr uint32_t staging_read_offset(int lane, int pass) {
  return swizzle_128b(staging_read_row(lane, pass) * kSlabRowBytes + lane % 8 * 16);
}

#ifdef __CUDACC__
// The 16 columns `pair` of a slab go to the staging area: one stmatrix, or four stores where there is none.
__device__ __forceinline__ void stage_16_columns(uint32_t staging, int lane, int pair, const uint32_t (&words)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(staging + staging_write_offset(lane, pair)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(staging + staging_word_offset(lane, pair, r)), "r"(words[r]) : "memory");
  }
#endif
}

// One predicated 16-byte store: from an assignment in a branch the compiler has made four stores.
__device__ __forceinline__ void store_16_bytes_if(bool predicate, void* address, const uint32_t (&words)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}"
      ::"r"(static_cast<int>(predicate)), "l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// A warp's 16 finished rows leave through `staging`, shared memory that belongs to the warp, in whole 128-byte lines.
// address(row): where row 0..15 of the warp begins in memory, or null for a row that is dropped; asked by the lane that
// writes a piece of it. num_columns: a multiple of 8, at most those of the accumulators.
template <class Element, int kNumAcc, class Address>
__device__ __forceinline__ void store_warp_rows(const float (&acc)[kNumAcc], uint32_t staging, int lane, int num_columns,
                                                Address&& address) {
  constexpr int kAccPerSlab = kSlabColumns / 2;
  constexpr int kPasses = kRowsPerWarp / staging_read_row(0, 1);
  const int columns_left = num_columns - lane % 8 * 8;  // a lane's 16 bytes are in or out
  Element* rows[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) rows[pass] = address(staging_read_row(lane, pass));
#pragma unroll
  for (int slab = 0; slab < ceil_div(kNumAcc, kAccPerSlab); ++slab) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t words[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = kAccPerSlab * slab + staging_source(pair, r);
        words[r] = i < kNumAcc ? pack_pair<Element>(acc[i], acc[i + 1]) : 0;
      }
      stage_16_columns(staging, lane, pair, words);
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      uint32_t words[4];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(staging + staging_read_offset(lane, pass))
                   : "memory");
      store_16_bytes_if(rows[pass] != nullptr && slab * kSlabColumns < columns_left,
                        rows[pass] + slab * kSlabColumns + lane % 8 * 8, words);
    }
    __syncwarp();
  }
}

// out and lse as rows of (batch, seqlen, heads, dim) and (batch, heads, seqlen), or packed.
template <class Element>
struct DenseOutput {
  Element* out;  // position 0 of the sequence, first head of the group
  float* lse;
  int64_t row_stride, head_stride, lse_head_stride;
  const QueryTile& tile;
  int first_row;    // of the warp, in the tile
  int num_columns;  // head_dim_v

  __device__ __forceinline__ DenseOutput(const FwdParams& params, const QueryTile& tile, int first_row)
      : row_stride(params.out_strides.row),
        head_stride(params.out_strides.head),
        lse_head_stride(params.lse_strides.head),
        tile(tile),
        first_row(first_row),
        num_columns(params.head_dim_v) {
    const RowRange& q = tile.sequence.q;
    const int first_head = tile.head_kv * tile.group;
    out = static_cast<Element*>(params.out) + tile.part * params.out_split_stride + q.batch * params.out_strides.batch +
          q.first_row * row_stride + first_head * head_stride;
    lse = params.lse + tile.part * params.lse_split_stride + q.batch * params.lse_strides.batch +
          first_head * lse_head_stride + q.first_row;
  }

  template <int kNumAcc>
  __device__ __forceinline__ void store_rows(const float (&acc_o)[kNumAcc], uint32_t staging, int lane) {
    store_warp_rows<Element>(acc_o, staging, lane, num_columns, [&](int row_of_warp) -> Element* {
      const int row = first_row + row_of_warp;
      if (!tile.holds(row)) return nullptr;
      return out + tile.position(row) * row_stride + tile.head_in_group(row) * head_stride;
    });
  }

  // The four threads of a row hold the same two values.
  __device__ __forceinline__ void store_lse(const float (&values)[2], int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + acc_row(lane, half);
      if (lane % 4 == 0 && tile.holds(row)) lse[tile.head_in_group(row) * lse_head_stride + tile.position(row)] = values[half];
    }
  }
};

// A maximum of floats in memory by integer atomics: those of one sign are ordered as integers. NaN stays.
__device__ __forceinline__ void atomic_max(float* address, float value) {
  value += 0.f;  // -0 becomes 0
  if (value >= 0.f || value != value) {
    atomicMax(reinterpret_cast<int*>(address), value == value ? __float_as_int(value) : 0x7fffffff);
  } else {
    atomicMin(reinterpret_cast<unsigned*>(address), __float_as_uint(value));
  }
}

// Largest score of each head: `largest` of the thread's two rows, the same in the four threads of a row.
__device__ __forceinline__ void store_max_logit(float* max_logit, const QueryTile& tile, int first_row,
                                                const float (&largest)[2], int lane) {
  float of_rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    of_rows[half] = tile.holds(first_row + acc_row(lane, half)) ? largest[half] : -INFINITY;
  }
  if (tile.log2_heads == 0) {  // one head: combined over the warp first
    float largest_of_warp = fmaxf(of_rows[0], of_rows[1]);
    bool invalid = of_rows[0] != of_rows[0] || of_rows[1] != of_rows[1];
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      largest_of_warp = fmaxf(largest_of_warp, __shfl_xor_sync(0xffffffffu, largest_of_warp, offset));
    }
    invalid = __any_sync(0xffffffffu, invalid);
    if (lane == 0) atomic_max(max_logit + tile.head(0), invalid ? NAN : largest_of_warp);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + acc_row(lane, half);
    if (lane % 4 == 0 && tile.holds(row)) atomic_max(max_logit + tile.head(row), of_rows[half]);
  }
}
#endif

}  // namespace flash_ext
