// Output policy: how a warp's 16 finished rows reach global memory.
#pragma once

#include "common/fragment.cuh"
#include "common/params.h"
#include "common/seqlens.cuh"
#include "common/swizzle.cuh"

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
// Then eight lanes read a row of 128 bytes; pass p covers rows 4p to 4p + 3.
FX_HOST_DEVICE constexpr int staging_read_row(int lane, int pass) { return 4 * pass + lane / 8; }
FX_HOST_DEVICE constexpr uint32_t staging_read_offset(int lane, int pass) {
  return swizzle_128b(staging_read_row(lane, pass) * kSlabRowBytes + lane % 8 * 16);
}

#ifdef __CUDACC__
// One predicated 16-byte store: from an assignment in a branch the compiler has made four stores.
__device__ __forceinline__ void store_16_bytes_if(bool predicate, void* address, const uint32_t (&words)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}"
      ::"r"(static_cast<int>(predicate)), "l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// out and lse as rows of (batch, seqlen, heads, dim) and (batch, heads, seqlen).
template <class Element>
struct DenseOutput {
  Element* out;  // row 0 of this head
  float* lse;
  int64_t row_stride;
  int first_row;    // of the warp
  int num_rows;     // of the sequence
  int num_columns;  // head_dim_v, at most the columns of the accumulators

  __device__ __forceinline__ DenseOutput(const FwdParams& params, const Sequence& sequence, int head,
                                         int first_row)
      : row_stride(params.out_strides.row),
        first_row(first_row),
        num_rows(sequence.q.num_rows),
        num_columns(params.head_dim_v) {
    out = static_cast<Element*>(params.out) + sequence.q.batch * params.out_strides.batch +
          sequence.q.first_row * params.out_strides.row + head * params.out_strides.head;
    lse = params.lse + sequence.q.batch * params.lse_strides.batch + head * params.lse_strides.head +
          sequence.q.first_row;
  }

  // Whole 128-byte lines leave through `staging`, shared memory that belongs to the warp. acc_o holds finished rows.
  template <int kNumAcc>
  __device__ __forceinline__ void store_rows(const float (&acc_o)[kNumAcc], uint32_t staging, int lane) {
    constexpr int kAccPerSlab = kSlabColumns / 2;
    const int rows_left = num_rows - (first_row + staging_read_row(lane, 0));
    const int columns_left = num_columns - lane % 8 * 8;  // a multiple of 8: a lane's 16 bytes are in or out
    Element* row = out + (first_row + staging_read_row(lane, 0)) * row_stride + lane % 8 * 8;
    const int64_t pass_stride = (staging_read_row(0, 1) - staging_read_row(0, 0)) * row_stride;
#pragma unroll
    for (int slab = 0; slab < ceil_div(kNumAcc, kAccPerSlab); ++slab) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t words[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int i = kAccPerSlab * slab + staging_source(pair, r);
          words[r] = i < kNumAcc ? pack_pair<Element>(acc_o[i], acc_o[i + 1]) : 0;
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(staging + staging_write_offset(lane, pair)), "r"(words[0]), "r"(words[1]),
                     "r"(words[2]), "r"(words[3])
                     : "memory");
      }
      __syncwarp();
#pragma unroll
      for (int pass = 0; pass < 4; ++pass) {
        uint32_t words[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(staging + staging_read_offset(lane, pass))
                     : "memory");
        const bool inside = staging_read_row(0, pass) < rows_left && slab * kSlabColumns < columns_left;
        store_16_bytes_if(inside, row + pass * pass_stride + slab * kSlabColumns, words);
      }
      __syncwarp();
    }
  }

  // The four threads of a row hold the same two values.
  __device__ __forceinline__ void store_lse(const float (&values)[2], int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + acc_row(lane, half);
      if (lane % 4 == 0 && row < num_rows) lse[row] = values[half];
    }
  }
};
#endif

}  // namespace flash_ext
