// What belongs to scales in the FP8 forward: those of heads or blocks, weights rounded to e4m3, finished rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/fp8_layout.cuh"
#include "common/fp8_params.h"
#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/outputs.cuh"
#include "common/seqlens.cuh"
#include "common/work.cuh"

namespace flash_ext::sm80::fp8 {

constexpr int kRowsPerScale = 64;

// One scale for a head's keys and values, or one for every 64 of them.
struct HeadScales {
  static constexpr bool kPerBlock = false;
};
struct BlockScales {
  static constexpr bool kPerBlock = true;
};

// The scales of one head of a sequence. kBlocks: there may be one for each 64 rows.
template <bool kBlocks>
struct Scale {
  const float* first;  // null: 1
  int last;            // block of 64 rows that exists
  int step;

  // first_block: where the rows begin, for parts of the keys.
  __device__ __forceinline__ Scale(const Descale& descale, const SeqlenParams& seqlens, int sequence, int head, int num_rows,
                                   int first_block = 0)
      : first(descale.data), last(max_of(0, num_rows - 1) / kRowsPerScale), step(kBlocks ? descale.block_step : 0) {
    if (first == nullptr) return;
    // Blocks of packed sequences stand on their line of slots.
    const bool on_slots = step != 0 && seqlens.cu_seqlens != nullptr;
    first += (on_slots ? first_slot(seqlens, sequence, kRowsPerScale) : sequence * descale.batch_stride) +
             head / descale.heads_per_scale * descale.head_stride + first_block * step;
  }
  __device__ __forceinline__ float at(int block) const {
    return first == nullptr ? 1.f : __ldg(first + (kBlocks ? min_of(block, last) * step : 0));
  }
};

// Four weights rounded to e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// The scales of one KV head of a sequence.
template <class Scales>
struct KeyScales {
  Scale<Scales::kPerBlock> of_keys, of_values;

  __device__ __forceinline__ KeyScales(const FwdFp8Params& params, const QueryTile& queries)
      : KeyScales(params, queries,
                  // Parts of the keys begin with a block where there is more than one.
                  params.num_splits > 1 ? params.split_boundaries[queries.part] / kRowsPerScale : 0) {}

 private:
  __device__ __forceinline__ KeyScales(const FwdFp8Params& params, const QueryTile& queries, int first_block)
      : of_keys(params.k_descale, params.seqlens_k, queries.index, queries.head_kv, queries.sequence.k.num_rows, first_block),
        of_values(params.v_descale, params.seqlens_k, queries.index, queries.head_kv, queries.sequence.k.num_rows, first_block) {}
};

// That of a tile's queries from first_row on, which share one.
__device__ __forceinline__ float query_scale(const FwdFp8Params& params, const QueryTile& queries, int first_row) {
  const Scale<true> scale(params.q_descale, params.seqlens_q, queries.index, queries.head(0), queries.sequence.q.num_rows);
  return scale.at((queries.first_position + first_row) / kRowsPerScale);
}

// The scales that one thread's rows meet, tile by tile of kBlockN keys.
template <class Scales, int kBlockN>
struct TileScales {
  static constexpr bool kPerBlock = Scales::kPerBlock;
  static constexpr int kSegments = kPerBlock ? kBlockN / kRowsPerScale : 1;  // columns of S with one scale
  static_assert(!kPerBlock || kBlockN % kRowsPerScale == 0, "a tile begins with a block of scales");

  float q_scale;
  float scores[kSegments];   // of q.k; log2 units where the score is plain
  float weights[kSegments];  // kPerBlock: V's scale relative to v_scale
  float v_scale = 0.f;       // what the output is in units of; kPerBlock: the largest so far

  // q_scale: all that q.k is multiplied with, but for K's scale.
  __device__ __forceinline__ TileScales(const KeyScales<Scales>& from, float q_scale) : q_scale(q_scale) {
    if constexpr (!kPerBlock) {
      scores[0] = q_scale * from.of_keys.at(0);
      v_scale = from.of_values.at(0);
    }
  }

  // Reads the scales of a tile; returns what the output is to be multiplied with because v_scale has grown.
  __device__ __forceinline__ float load_tile(const KeyScales<Scales>& from, int n_block) {
    if constexpr (kPerBlock) {
      const float before = v_scale;
#pragma unroll
      for (int segment = 0; segment < kSegments; ++segment) {
        scores[segment] = q_scale * from.of_keys.at(n_block * kSegments + segment);
        weights[segment] = from.of_values.at(n_block * kSegments + segment);
        v_scale = fmaxf(v_scale, weights[segment]);
      }
      const float inverse = __fdividef(1.f, v_scale);
#pragma unroll
      for (float& weight : weights) weight *= inverse;
      return before * inverse;
    } else {
      return 1.f;
    }
  }

  // Weights as the A operand of P V: fp8_layout.cuh.
  template <int kNumAcc>
  __device__ __forceinline__ void round_weights(float (&acc_s)[kNumAcc], uint32_t (&p_regs)[kNumAcc / 4]) const {
    if constexpr (kPerBlock) {
#pragma unroll
      for (int i = 0; i < kNumAcc; ++i) acc_s[i] *= weights[i / (kNumAcc / kSegments)];
    }
#pragma unroll
    for (int i = 0; i < kNumAcc / 4; ++i) {
      const int a = fp8_operand_source(i / 4, i % 4, 0), b = fp8_operand_source(i / 4, i % 4, 1);
      p_regs[i] = pack_e4m3(acc_s[a], acc_s[a + 1], acc_s[b], acc_s[b + 1]);
    }
  }
};

// The thread's two finished rows of a tile, 32 bytes of four neighbouring threads at a time: acc_o times `normalise`, where
// column pairs lie as fp8_output_source says.
template <int kNumAcc>
__device__ __forceinline__ void store_fp8_rows(const FwdFp8Params& params, const DenseOutput<uint16_t>& output,
                                               const QueryTile& queries, const int (&rows)[2], const float (&acc_o)[kNumAcc],
                                               const float (&normalise)[2], float v_scale, int lane) {
  const auto pack = [&](const float (&x)[4]) {
    if (params.out_is_fp16) return uint2{pack_pair<__half>(x[0], x[1]), pack_pair<__half>(x[2], x[3])};
    return uint2{pack_pair<__nv_bfloat16>(x[0], x[1]), pack_pair<__nv_bfloat16>(x[2], x[3])};
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!queries.holds(rows[half])) continue;
    const bool empty = normalise[half] == 0.f;  // the hidden values that met its zero weights may have been NaN
    const float factor = normalise[half] * v_scale;
    uint16_t* out = output.out + queries.position(rows[half]) * output.row_stride +
                    queries.head_in_group(rows[half]) * output.head_stride + 4 * (lane % 4);
#pragma unroll
    for (int group = 0; group < kNumAcc / 8; ++group) {
      if (group * 16 >= params.head_dim_v) break;
      float x[4];
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        x[column] = empty ? 0.f : acc_o[fp8_output_source(group, half, column)] * factor;
      }
      *reinterpret_cast<uint2*>(out + group * 16) = pack(x);
    }
  }
}

}  // namespace flash_ext::sm80::fp8
