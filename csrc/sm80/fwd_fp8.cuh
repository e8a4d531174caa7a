// FP8 forward for compute capability 8.9 and later without wgmma: out = softmax(scale * Q K^T) V of e4m3 operands with
// scales, and its log-sum-exp, by mma.sync m16n8k32. docs/fp8.md.
//
// As sm80/fwd.cuh, a warp owning 16 rows of Q. Pairs of e4m3 are copied and loaded as 16-bit numbers: the operands of S lie
// in registers as they should. What differs: V's 8-bit B operand needs four keys in a register, which ldmatrix.trans on
// pairs of columns and two byte permutations give (fp8_layout.cuh: the order of keys, and of O's columns); and each tile's
// P V starts at zero and is added to float32 registers, since the tensor cores' sums of 8-bit floats hold 14 bits.
#pragma once

#include "common/fp8_layout.cuh"
#include "common/fp8_params.h"
#include "common/masks.cuh"
#include "common/math.cuh"
#include "common/outputs.cuh"
#include "common/scheduler.cuh"
#include "common/scores.cuh"
#include "common/seqlens.cuh"
#include "common/softmax_fp8.cuh"
#include "common/swizzle.cuh"
#include "common/tiles.cuh"
#include "common/work.cuh"
#include "sm80/fp8_scales.cuh"
#include "sm80/limits.h"
#include "sm80/primitives.cuh"
#include "sm80/products.cuh"
#include "sm80/tile_copy.cuh"

namespace flash_ext::sm80::fp8 {

// CTAs of an SM share 100 KB of shared memory and the registers.
template <int kHeadDim, class Score>
struct Tile {
  static constexpr int kBlockM = 128, kBlockN = 64, kWarps = 8, kStages = 2;
  static constexpr int kMinBlocksPerSm = kHeadDim > (Score::kModifies ? 64 : 128) ? 1 : 2;
};

// A kernel for every head_dim and head_dim_v up to kHeadDim: copies fill the other columns with zeros.
template <int kHeadDim_, class Mask_, class Score_, class Scales_>
struct FwdFp8Config : Tile<kHeadDim_, Score_> {
  using Shape = Tile<kHeadDim_, Score_>;
  using Mask = Mask_;
  using Score = Score_;
  using Scales = Scales_;
  using Tiles = RangeTiles<Mask>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPairColumns = kHeadDim / 2;  // of pairs of e4m3
  static constexpr int kNumThreads = Shape::kWarps * 32;
  static constexpr int kQueryTileBytes = Shape::kBlockM * num_byte_slabs(kHeadDim) * kSlabBytes;
  static constexpr int kKeyTileBytes = Shape::kBlockN * num_byte_slabs(kHeadDim) * kSlabBytes;

  static_assert(Shape::kBlockM == Shape::kWarps * kRowsPerWarp, "a warp owns one row tile of mma.sync");
  static_assert(Shape::kBlockN % kKeysPerStep == 0 && kHeadDim % kKeysPerStep == 0, "products step through 32 bytes");
  static_assert(kRowsPerScale % kRowsPerWarp == 0, "a warp's queries share a scale");
};

template <class Config>
struct SharedStorage {
  // 128: within a line, the swizzle depends on the row alone.
  alignas(kSlabBytes) uint8_t q[Config::kQueryTileBytes];
  alignas(kSlabBytes) uint8_t k[Config::kStages][Config::kKeyTileBytes];
  alignas(kSlabBytes) uint8_t v[Config::kStages][Config::kKeyTileBytes];
  // What the CTA works on: here, since the main loop has no registers for it.
  QueryTile queries;
  KeyTiles tiles;
  const uint8_t *k_rows, *v_rows;  // the sequence's first, of this head
  KeyScales<typename Config::Scales> key_scales;
};

// acc_o = acc_o * factors + P V for the first num_columns, 16 columns of V after the other: their sums over the tile begin
// at zero.
template <class Config>
__device__ __forceinline__ void add_output(float (&acc_o)[Config::kHeadDim / 2], const uint32_t (&p_regs)[Config::kBlockN / 8],
                                           const float (&factors)[2], uint32_t v_tile, int num_columns, int lane) {
  constexpr int kUnits = Config::kHeadDim / 16, kUnitsPerGroup = 4;
  const uint32_t lane_address = v_tile + transpose_read_offset(Config::kBlockN, 0, 0, lane);
#pragma unroll
  for (int group = 0; group < kUnits; group += kUnitsPerGroup) {
    // A branch that also bounds what ptxas interleaves: else it keeps the sums of all columns before it adds one.
    if (group * 16 >= num_columns) break;
#pragma unroll
    for (int unit = group; unit < group + kUnitsPerGroup; ++unit) {
      float sums[8] = {};
      const uint32_t columns = (lane_address + unit / 8 * Config::kBlockN * kSlabBytes) ^ (unit % 8 * 16);
#pragma unroll
      for (int step = 0; step < Config::kBlockN / kKeysPerStep; ++step) {
        uint32_t pairs[4];  // of columns: keys 2 q, 2 q + 1 of each eight
        load_matrices_transposed(pairs, columns + step * kKeysPerStep * kSlabBytes);
        const uint32_t even[2] = {__byte_perm(pairs[0], pairs[1], 0x6420), __byte_perm(pairs[2], pairs[3], 0x6420)};
        const uint32_t odd[2] = {__byte_perm(pairs[0], pairs[1], 0x7531), __byte_perm(pairs[2], pairs[3], 0x7531)};
        mma<E4m3>(sums, &p_regs[4 * step], even);
        mma<E4m3>(sums + 4, &p_regs[4 * step], odd);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) acc_o[8 * unit + i] = fmaf(acc_o[8 * unit + i], factors[acc_half(i)], sums[i]);
    }
  }
}

template <class Config>
__device__ __forceinline__ void flash_fwd_fp8_sm80(const FwdFp8Params& params) {
  using Score = typename Config::Score;
  constexpr int kNumAccS = Config::kBlockN / 2;
  constexpr int kNumAccO = Config::kHeadDim / 2;
  using KeyScales = fp8::KeyScales<typename Config::Scales>;
  using TileScales = fp8::TileScales<typename Config::Scales, Config::kBlockN>;
  using QueryCopy = TileCopy<Config::kBlockM, Config::kPairColumns, Config::kNumThreads>;
  using KeyCopy = TileCopy<Config::kBlockN, Config::kPairColumns, Config::kNumThreads>;  // and of V
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  SharedStorage<Config>& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);

  const typename Config::Mask mask(params.mask);
  const auto read_warp_row = [] { return read_thread() / 32 * kRowsPerWarp; };  // within the tile of queries
  // K and V of the i-th tile visited; only the first one may reach beyond the sequence.
  const auto load_tile = [&](int i) {
    const int first = shared.tiles.n_block(i) * Config::kBlockN;
    const int num_rows = i == 0 ? shared.queries.sequence.k.num_rows - first : Config::kBlockN;
    const auto load = [&](uint8_t* stage, const uint8_t* rows, const RowStrides& strides, int num_columns) {
      KeyCopy::copy(shared_address(stage), num_rows, num_columns / 2, rows + first * strides.row, strides.row);
    };
    load(shared.k[i % Config::kStages], shared.k_rows, params.k_strides, params.head_dim);
    load(shared.v[i % Config::kStages], shared.v_rows, params.v_strides, params.head_dim_v);
  };

  const FoldedScale folded = fold_scale(params.score.softmax_scale);
  {
    const int thread = read_thread();
    const QueryTile queries = warp_query_tile<Config::kBlockM>(params, params.schedule.item(read_block()), read_lane());
    if (!queries.exists()) return;
    const Sequence& sequence = queries.sequence;
    const KeyTiles tiles = Config::Tiles::template key_tiles<Config::kBlockN>(mask, sequence, queries.first_position,
                                                                              queries.last_position(Config::kBlockM));
    if (thread == 0) {
      shared.queries = queries;
      shared.tiles = tiles;
      shared.k_rows = rows_of<1>(params.k, params.k_strides, sequence.k, queries.head_kv);
      shared.v_rows = rows_of<1>(params.v, params.v_strides, sequence.k, queries.head_kv);
      shared.key_scales = KeyScales(params, queries);
    }
    if (tiles.num_tiles > 0) {
      const uint8_t* first = rows_of<1>(params.q, params.q_strides, sequence.q, queries.head_kv * queries.group);
      QueryCopy::copy(shared_address(shared.q), params.head_dim / 2, [&](int row) {
        return queries.holds(row)
                   ? first + queries.position(row) * params.q_strides.row + queries.head_in_group(row) * params.q_strides.head
                   : nullptr;
      });
    }
    if (!Score::kModifies && tiles.num_tiles > 0 && folded.changes_q()) {
      // A scale that is not positive: each thread rewrites what it copied.
      commit_copies();
      wait_for_copies<0>();
      QueryCopy::rewrite(shared.q, folded.q_keep_bits, folded.q_flip_bits != 0 ? 0x80808080u : 0);
    }
  }
  __syncthreads();
  const QueryTile& queries = shared.queries;
  if (shared.tiles.num_tiles > 0) load_tile(0);
  commit_copies();

  const auto read_row = [&](int half) { return read_warp_row() + acc_row(read_lane(), half); };
  float acc_s[1][kNumAccS], acc_o[kNumAccO];
#pragma unroll
  for (float& x : acc_o) x = 0.f;
  OnlineSoftmaxFp8 softmax;
  TileScales scales(shared.key_scales,
                    (Score::kModifies ? 1.f : folded.log2_scale) * query_scale(params, queries, read_warp_row()));
  const Score score(params.score, queries.sequence.k, queries.index, queries.head_kv,
                    {queries.existing_head(read_row(0)), queries.existing_head(read_row(1))});

  const auto hide = [&](int n_block) {
    const int first_key = n_block * Config::kBlockN + acc_first_col(read_lane());
    typename HiddenBits<kNumAccS>::Word hidden[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = queries.position(read_row(half));
      const int end = mask.visible_end(position, queries.sequence) - first_key;
      hidden[half] = Config::Tiles::kMaskedLeft
                         ? HiddenBits<kNumAccS>::outside(mask.visible_begin(position, queries.sequence) - first_key, end)
                         : HiddenBits<kNumAccS>::from(end);
    }
    hide_keys(acc_s[0], hidden);
  };

  // One tile of keys; the copies of the next K and V run during the whole step.
  const auto step = [&](int i) {
    wait_for_copies<0>();
    __syncthreads();
    const int lane = read_lane(), n_block = shared.tiles.n_block(i);
    const auto biases = score.template load_tile<Config::kBlockN>(queries.sequence.k, n_block, lane);
    const float growth = scales.load_tile(shared.key_scales, n_block);
    if (i + 1 < shared.tiles.num_tiles) load_tile(i + 1);
    commit_copies();

    const RowsA<Config::kBlockM> q(shared_address(shared.q), read_warp_row(), 0, lane);
    const RowsB<Config::kBlockN> keys(shared_address(shared.k[i % Config::kStages]), 0, 0, lane);
    clear(acc_s);
    multiply<E4m3, Config::kHeadDim / kKeysPerStep, Config::kBlockN / 16>(
        acc_s, [&](auto& registers, int r, int step) { q.load(registers, r, step); },
        [&](auto& registers, int step, int pair) { keys.load(registers, pair, step); });

    if constexpr (Score::kModifies) {
#pragma unroll
      for (int n = 0; n < kNumAccS; ++n) acc_s[0][n] *= scales.scores[n / (kNumAccS / TileScales::kSegments)];
      const int from = queries.sequence.diagonal - n_block * Config::kBlockN - acc_first_col(lane);
      score.template modify<Config::kBlockN>(acc_s[0], biases,
                                             {queries.position(read_row(0)) + from, queries.position(read_row(1)) + from}, lane);
    }
    // A branch, not loops of their own: the tile's code then stands once.
    bool masked = i < shared.tiles.num_masked;
    if constexpr (Config::Tiles::kMaskedLeft) masked |= i >= shared.tiles.full_end;
    if (masked) hide(n_block);
    float factors[2];
    if constexpr (Score::kModifies) {
      const float one[1] = {1.f};
      softmax.update(acc_s[0], one, factors);
    } else {
      softmax.update(acc_s[0], scales.scores, factors);
    }
    if constexpr (TileScales::kPerBlock) {
      factors[0] *= growth;
      factors[1] *= growth;
    }
    uint32_t p_regs[kNumAccS / 4];
    scales.round_weights(acc_s[0], p_regs);
    add_output<Config>(acc_o, p_regs, factors, shared_address(shared.v[i % Config::kStages]), params.head_dim_v,
                       read_lane());
  };

#pragma unroll 1
  for (int i = 0; i < shared.tiles.num_tiles; ++i) step(i);

  const int lane = read_lane(), warp_row = read_warp_row();
  const int rows[2] = {warp_row + acc_row(lane, 0), warp_row + acc_row(lane, 1)};
  float normalise[2], lse[2], largest[2], sinks[2] = {-INFINITY, -INFINITY};
  if (params.sinks != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) sinks[half] = params.sinks[queries.existing_head(rows[half])];
  }
  softmax.finish(sinks, normalise, lse, largest);
  if (params.max_logit != nullptr) store_max_logit(params.max_logit, queries, warp_row, largest, lane);
  DenseOutput<uint16_t> output(params, queries, warp_row);
  output.store_lse(lse, lane);
  store_fp8_rows(params, output, queries, rows, acc_o, normalise, scales.v_scale, lane);
}

// kernel: the variant's entry, an instance of flash_fwd_fp8_sm80<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd_fp8(Kernel* kernel, FwdFp8Params params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= bytes_of(SharedLimit::k99), "the tile does not fit the devices that it is made for");

  if (params.batch == 0 || params.num_heads == 0 || params.seqlens_q.num_rows == 0) return cudaSuccess;
  params.schedule = make_fwd_schedule(params, Config::kBlockM);

  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(params.schedule.num_items())),
                          dim3(Config::kNumThreads), arguments, kSharedBytes, stream);
}

}  // namespace flash_ext::sm80::fp8
