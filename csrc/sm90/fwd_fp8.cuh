// Hopper FP8 forward: out = softmax(scale * Q K^T) V of e4m3 operands with scales, and its log-sum-exp. docs/fp8.md.
//
// As sm90/fwd.cuh: a persistent CTA, warpgroup 0 the producer, the others own 64 rows of Q each. What differs: wgmma takes
// 8-bit operands only K-major, so three warps of the producer transpose each tile of V in shared memory (fp8_layout.cuh);
// the weights are e4m3 too; and the tensor cores' sums hold 14 bits, so that with kFlushes the product P V of each tile is
// added to float32 registers. Where registers lack for S and P V in flight together (kOverlaps is false), only the two
// warpgroups overlap.
#pragma once

#include <cstddef>
#include <type_traits>

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
#include "host/tma.h"
#include "sm90/barriers.h"
#include "sm90/copies.cuh"
#include "sm90/fp8_scales.cuh"
#include "sm90/items.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/primitives.cuh"
#include "sm90/wgmma_fp8.cuh"

namespace flash_ext::sm90::fp8 {

// Where P V is summed up. Flushed: in the tensor cores within a tile, across tiles in float32 registers.
struct Flushed {
  static constexpr bool kFlushes = true;
};
struct Unflushed {
  static constexpr bool kFlushes = false;
};

// Keys of a tile; column parts of P V that are computed one after the other; whether S of the next tile is computed along
// with P V. Registers decide: S, P, and O once or, flushed, twice; modified scores need more of them.
template <int kHeadDim, class Score, class Sums>
struct Tile {
  static constexpr bool kFlushes = Sums::kFlushes, kScored = Score::kModifies;
  static constexpr int kParts = !kFlushes || kHeadDim <= 128 ? 1 : kHeadDim > 192 ? (kScored ? 4 : 2) : kScored ? 2 : 1;
  static constexpr bool kOverlaps = !kFlushes || (kHeadDim < 192 && !kScored);
  static constexpr int kBlockN = kHeadDim > 128 ? (kScored ? 64 : 128) : !kFlushes ? 224 : kHeadDim == 64 ? 192 : 128;
};

// Four neighbouring columns of a finished row.
__device__ __forceinline__ uint2 pack_output(const float (&x)[4], bool fp16) {
  if (fp16) return {pack_pair<__half>(x[0], x[1]), pack_pair<__half>(x[2], x[3])};
  return {pack_pair<__nv_bfloat16>(x[0], x[1]), pack_pair<__nv_bfloat16>(x[2], x[3])};
}

// Output policy: four neighbouring columns of a row at a time.
struct Fp8DenseOutput {
  DenseOutput<uint16_t> output;
  bool fp16;
  uint16_t* out = nullptr;

  __device__ __forceinline__ Fp8DenseOutput(const FwdFp8Params& params, const QueryTile& tile, int first_row)
      : Fp8DenseOutput(params, params.out_is_fp16, tile, first_row) {}
  __device__ __forceinline__ Fp8DenseOutput(const FwdParams& params, bool fp16, const QueryTile& tile, int first_row)
      : output(params, tile, first_row), fp16(fp16) {}

  __device__ __forceinline__ void store_lse(const float (&values)[2], int lane) { output.store_lse(values, lane); }
  // The row, which exists, that the next columns belong to.
  __device__ __forceinline__ void begin_row(const QueryTile& tile, int row) {
    out = output.out + tile.position(row) * output.row_stride + tile.head_in_group(row) * output.head_stride;
  }
  __device__ __forceinline__ void store(int column, const float (&x)[4]) const {
    *reinterpret_cast<uint2*>(out + column) = pack_output(x, fp16);
  }
};

// Producer policy: what warp 0 of the producer does; the others transpose.
struct Fp8TmaProducer {
  static constexpr int kArrivals = 1;  // on a full barrier of K or V, beside the bytes
  template <class Config, class Shared>
  __device__ __forceinline__ static void run(const FwdFp8Params& params, Shared& shared);
};

template <int kHeadDim_, class Mask_, class Score_, class Scales_, class Sums_>
struct FwdFp8Config : Tile<kHeadDim_, Score_, Sums_>, Scales_ {
  using Mask = Mask_;
  using Score = Score_;
  using Tiles = RangeTiles<Mask>;
  using Params = FwdFp8Params;
  using Work = std::conditional_t<Scales_::kPerBlock && Score::kModifies, AlignedWork, ScheduledWork>;
  static constexpr bool kAlignsKeys = std::is_same_v<Work, AlignedWork>;
  using Producer = Fp8TmaProducer;
  using Output = Fp8DenseOutput;
  using KeyScale = SequenceScale<Scales_, Work>;
  using Shape = Tile<kHeadDim_, Score_, Sums_>;
  static constexpr int kHeadDim = kHeadDim_;  // the largest of head_dim and head_dim_v: TMA fills other columns with zeros
  static constexpr int kBlockM = 128;
  static constexpr int kNumConsumers = kBlockM / kRowsPerWarpgroup;
  static constexpr int kNumThreads = (1 + kNumConsumers) * kThreadsPerWarpgroup;
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr bool kMovesRegisters = true;
  static constexpr int kProducerRegisters = kAlignsKeys ? 40 : 24, kConsumerRegisters = kAlignsKeys ? 232 : 240;
  static constexpr int kRowScales = kAlignsKeys ? 2 : 1;  // of q, among a thread's two rows
  static constexpr int kStages = 2;
  static constexpr int kTileRowBytes = num_byte_slabs(kHeadDim) * kSlabBytes;
  static constexpr int kQueryTileBytes = kBlockM * kTileRowBytes;
  static constexpr int kKeyTileBytes = Shape::kBlockN * kTileRowBytes;
  static constexpr int kTransposedTileBytes = num_byte_slabs(Shape::kBlockN) * kHeadDim * kSlabBytes;
  // Columns of S with one scale.
  static constexpr int kSegments = Scales_::kPerBlock ? Shape::kBlockN / kRowsPerScale : 1;

  static_assert(Shape::kBlockN % kKeysPerStep == 0 && kHeadDim % 32 == 0, "tiles are made of whole wgmma");
  static_assert(!Scales_::kPerBlock || Shape::kBlockN % kRowsPerScale == 0, "a tile begins with a block of scales");
};

template <class Config>
struct SharedStorage {
  alignas(kSwizzleGroupBytes) uint8_t q[1][Config::kQueryTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t k[Config::kStages][Config::kKeyTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t v[Config::kStages][Config::kKeyTileBytes];
  alignas(kSwizzleGroupBytes) uint8_t v_transposed[Config::kStages][Config::kTransposedTileBytes];
  // full: TMA. empty: all consumer warps (q, k), all transposing warps (v).
  RingBarriers<1> q_ring;
  RingBarriers<Config::kStages> k_ring;
  RingBarriers<Config::kStages> v_ring;
  // full: one arrival of each transposing warp. empty: one of each consumer warp.
  uint64_t transposed_full[Config::kStages];
  uint64_t transposed_empty[Config::kStages];
};

// ---- producer: a thread of warp 0 copies, warps 1 to 3 transpose ----

constexpr int kTransposingWarps = 3;

template <class Config, class Shared>
__device__ __forceinline__ void Fp8TmaProducer::run(const FwdFp8Params& params, Shared& shared) {
  const bool elected = elect_one();
  constexpr int kColumns = Config::kHeadDim / 2;  // as the maps count: pairs of e4m3
  RingState<1> q_state;
  RingState<Config::kStages> k_state, v_state;

  const auto copy_item = [&](const QueryTile& queries, const KeyTiles& tiles) {
    if (tiles.num_tiles == 0) return;
    const auto load = [&](auto& ring, auto& state, uint8_t* stages, const TmaTensor& tensor, int i) {
      ring.begin_fill(state, Config::kKeyTileBytes);
      load_rows<Config::kBlockN, kColumns>(tensor, &ring.full[state.stage], stages + state.stage * Config::kKeyTileBytes,
                                           queries.sequence.k, tiles.n_block(i) * Config::kBlockN, queries.head_kv,
                                           CacheHint::kEvictLast);
      state.advance();
    };
    load(shared.k_ring, k_state, shared.k[0], params.k_tma, 0);
    shared.q_ring.begin_fill(q_state, Config::kQueryTileBytes);
    load_queries<Config::kBlockM, kColumns>(params.q_tma, &shared.q_ring.full[0], shared.q[0], queries, CacheHint::kEvictFirst);
    q_state.advance();
    // V is transposed before it is used: its copy runs as far ahead as that of K.
    load(shared.v_ring, v_state, shared.v[0], params.v_tma, 0);
    for (int i = 1; i < tiles.num_tiles; ++i) {
      load(shared.k_ring, k_state, shared.k[0], params.k_tma, i);
      load(shared.v_ring, v_state, shared.v[0], params.v_tma, i);
    }
  };
  for_each_item<Config>(params, read_lane(), [&](const QueryTile& queries, const KeyTiles& tiles) {
    if (elected) copy_item(queries, tiles);
    __syncwarp();
  });
}

// V (keys x columns) to its transposed tile: this warp's share of the units of 32 keys and 16 columns.
// hidden: so many of the first keys, 0 to 63, become zeros, whatever stands there.
template <class Config>
__device__ __forceinline__ void transpose_values(uint32_t from, uint32_t to, int warp, int lane, int hidden) {
  constexpr int kColumnUnits = Config::kHeadDim / 16, kUnits = ceil_div(kColumnUnits, kTransposingWarps);
  // Tiles begin with a swizzle period: a unit of columns flips bits of the address that is read, a unit of keys of the one that is
  // written, and all else is an instruction's constant.
  const uint32_t source = from + transpose_read_offset(Config::kBlockN, 0, 0, lane);
  const uint32_t target = to + transpose_write_offset(Config::kHeadDim, 0, warp, lane);
#pragma unroll (Config::kPerBlock && kUnits > 4 ? 1 : kUnits)  // there the transposing warps are short of registers
  for (int n = 0; n < kUnits; ++n) {
    const int unit = warp + n * kTransposingWarps;
    if ((n + 1) * kTransposingWarps > kColumnUnits && unit >= kColumnUnits) break;
    const uint32_t column = (source ^ (unit % 8 << 4)) + unit / 8 * (Config::kBlockN * kSlabBytes);
#pragma unroll
    for (int key_unit = 0; key_unit < Config::kBlockN / 32; ++key_unit) {
      uint32_t pairs[4];  // of columns: keys 2 q, 2 q + 1 of each eight
      ldmatrix_transposed(pairs, column + key_unit * 32 * kSlabBytes);
      if (Config::kAlignsKeys && key_unit < kRowsPerScale / 32 && hidden > 0) {
#pragma unroll
        for (int eight = 0; eight < 4; ++eight) {
          const int key = key_unit * 32 + 8 * eight + 2 * (lane % 4);
          pairs[eight] &= (key < hidden ? 0 : 0xffffu) | (key + 1 < hidden ? 0 : 0xffff0000u);
        }
      }
      const uint32_t columns[4] = {__byte_perm(pairs[0], pairs[1], 0x6420), __byte_perm(pairs[0], pairs[1], 0x7531),
                                   __byte_perm(pairs[2], pairs[3], 0x6420), __byte_perm(pairs[2], pairs[3], 0x7531)};
      constexpr int kRowsApart = 16 * kTransposingWarps;
      stmatrix((target ^ (key_unit % 4 << 5)) + (key_unit / 4 * Config::kHeadDim + n * kRowsApart) * kSlabBytes, columns);
    }
  }
}

template <class Config>
__device__ __forceinline__ void transpose(const typename Config::Params& params, SharedStorage<Config>& shared, int warp) {
  const int lane = threadIdx.x % 32;
  RingState<Config::kStages> state;  // copies and transposed tiles have as many stages
  for_each_item<Config>(params, lane, [&](const QueryTile& queries, const KeyTiles& tiles) {
    int padding = 0;
    if constexpr (Config::kAlignsKeys) padding = Config::Work::hidden_keys(params, queries);
    for (int i = 0; i < tiles.num_tiles; ++i) {
      shared.v_ring.wait_full(state);
      mbarrier_wait(&shared.transposed_empty[state.stage], state.phase ^ 1);
      transpose_values<Config>(shared_address(shared.v[state.stage]), shared_address(shared.v_transposed[state.stage]), warp,
                               lane, tiles.n_block(i) == 0 ? padding : 0);
      fence_async_proxy();  // each lane its own stores, before wgmma reads them
      __syncwarp();
      mbarrier_arrive_if(&shared.transposed_full[state.stage], lane == 0);
      shared.v_ring.release(state, lane == 0);
      state.advance();
    }
  });
}

// ---- consumers: 64 rows each ----

template <class Config>
__device__ __forceinline__ void consume(const typename Config::Params& params, SharedStorage<Config>& shared,
                                        int warpgroup) {
  using Score = typename Config::Score;
  using Shared = SharedStorage<Config>;
  constexpr int kNumAccS = Config::kBlockN / 2;
  constexpr int kNumAccO = Config::kHeadDim / 2;
  constexpr int kAccPerSegment = kNumAccS / Config::kSegments;
  constexpr int kNumPartial = Config::kFlushes ? kNumAccO / Config::kParts : 1;
  constexpr int kTurnThreads = 2 * kThreadsPerWarpgroup;
  constexpr bool kTakesTurns = Config::kOverlaps && Config::kNumConsumers > 1;
  constexpr int kRowScales = Config::kRowScales;
  const int thread = threadIdx.x % kThreadsPerWarpgroup;
  const int lane = thread % 32;
  const bool elected = lane == 0;
  const int warp_row = warpgroup * kRowsPerWarpgroup + thread / 32 * 16;  // within the tile of queries
  // Shuffles whose results the compiler cannot derive again: see sm90/fwd.cuh.
  const int my_index = __shfl_sync(0xffffffffu, threadIdx.x / kThreadsPerWarpgroup - 1, lane);
  const int my_turn = turn_of(my_index);
  const int next_turn = turn_of(my_index + 1 == Config::kNumConsumers ? 0 : my_index + 1);

  const typename Config::Mask mask(params.mask);
  const FoldedScale folded = fold_scale(params.score.softmax_scale);
  constexpr uint32_t kQueries = offsetof(Shared, q) / 16;
  constexpr uint32_t kKeys = offsetof(Shared, k) / 16, kKeyStage = sizeof(shared.k[0]) / 16;
  constexpr uint32_t kValues = offsetof(Shared, v_transposed) / 16, kValueStage = sizeof(shared.v_transposed[0]) / 16;
  const uint32_t base = __shfl_sync(0xffffffffu, shared_address(&shared), 0);
  const uint32_t descriptor_high = kDescriptorHigh + (params.seqlens_k.num_rows >> 31);
  const WgmmaDescriptor q_major{k_major_descriptor(base), kDescriptorHigh};
  const WgmmaDescriptor kv_major{k_major_descriptor(base), descriptor_high};
  const uint32_t q_step = warpgroup * (kRowsPerWarpgroup * kSlabBytes >> 4) + kQueries;

  RingState<1> q_state;
  RingState<Config::kStages> k_state, v_state;
  float acc_s[kNumAccS];
  float acc_o[kNumAccO];         // across tiles
  float partial[kNumPartial];    // of one tile, where it is flushed
  uint32_t p_regs[kNumAccS / 4];

  // Asynchronous: accumulators and operands are taken until the matching wait.
  const auto issue_scores = [&] {
    const uint32_t k_step = kKeys + k_state.stage * kKeyStage;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / kKeysPerStep; ++step) {
      WgmmaFp8<Config::kBlockN>::ss(acc_s, q_major.at(q_step + k_major_step(Config::kBlockM, step)),
                                    kv_major.at(k_step + k_major_step(Config::kBlockN, step)), step > 0);
    }
    wgmma_commit();
  };
  const auto issue_output = [&](int part) {
    constexpr int kRows = Config::kHeadDim / Config::kParts;
    const uint32_t v_step = kValues + v_state.stage * kValueStage + part * (kRows * kSlabBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kBlockN / kKeysPerStep; ++step) {
      const uint64_t v = kv_major.at(v_step + k_major_step(Config::kHeadDim, step));
      if constexpr (Config::kFlushes) {
        WgmmaFp8<kRows>::rs(partial, &p_regs[4 * step], v, step > 0);
      } else {
        WgmmaFp8<kRows>::rs(acc_o, &p_regs[4 * step], v, true);
      }
    }
    wgmma_commit();
  };
  const auto wait_output = [&] {
    wgmma_wait<0>();
    if constexpr (Config::kFlushes) {
      pin_registers(partial);
    } else {
      pin_registers(acc_o);
    }
  };
  // acc_o of the columns of a part, times the rows' factors, plus the tile's product.
  const auto flush = [&](const float (&factors)[2], int part) {
#pragma unroll
    for (int i = 0; i < kNumPartial; ++i) {
      float& sum = acc_o[part * kNumPartial + i];
      sum = fmaf(sum, factors[acc_half(i)], partial[i]);
    }
  };
  const auto wait_transposed = [&] { mbarrier_wait(&shared.transposed_full[v_state.stage], v_state.phase); };
  const auto release_transposed = [&] {
    mbarrier_arrive_if(&shared.transposed_empty[v_state.stage], elected);
    v_state.advance();
  };

  // The first turn is warpgroup 0's.
  if (kTakesTurns && warpgroup == Config::kNumConsumers - 1) named_barrier_arrive(next_turn, kTurnThreads);

  for_each_item<Config>(params, lane, [&](const QueryTile& queries, const KeyTiles& tiles) {
    const Sequence& sequence = queries.sequence;
    OnlineSoftmaxFp8 softmax;
#pragma unroll
    for (float& x : acc_o) x = 0.f;
    const int rows[2] = {warp_row + acc_row(lane, 0), warp_row + acc_row(lane, 1)};
    const Score score(params.score, sequence.k, queries.index, queries.head_kv,
                      {queries.existing_head(rows[0]), queries.existing_head(rows[1])});

    const typename Config::KeyScale k_scales(params.k_descale, params, queries), v_scales(params.v_descale, params, queries);
    int hidden = 0, padding = 0;
    if constexpr (Config::kAlignsKeys) {
      hidden = Config::Work::hidden_keys(params, queries);
      if (params.q_descale.block_step != 0) padding = rows_before(params.seqlens_q, queries.index, sequence.q.first_row);
    }
    float q_scale[kRowScales];
#pragma unroll
    for (int row = 0; row < kRowScales; ++row) {
      // A warpgroup's queries share a scale, or each row has its own.
      const int first = kRowScales == 1 ? warpgroup * kRowsPerWarpgroup : rows[row];
      const SequenceScale<BlockScales> scale(params.q_descale, params.seqlens_q, queries,
                                      kRowScales == 1 ? queries.head(0) : queries.existing_head(first), padding);
      const int position = padding + (kRowScales == 1 ? queries.first_position + first : queries.position(first));
      q_scale[row] = (Score::kModifies ? 1.f : folded.log2_scale) * scale.at(position / kRowsPerScale);
    }
    float scales[kRowScales][Config::kSegments];  // of q.k; log2 units where the score is plain
    float weights[Config::kSegments];             // of weights, kPerBlock: V's scale relative to v_scale
    float v_scale = 0.f;                          // what acc_o is in units of; kPerBlock: the largest so far
    const auto scale_scores = [&](int segment, float k_scale) {
#pragma unroll
      for (int row = 0; row < kRowScales; ++row) scales[row][segment] = q_scale[row] * k_scale;
    };
    if constexpr (!Config::kPerBlock) {
      scale_scores(0, k_scales.at(0));
      v_scale = v_scales.at(0);
    }
    // Reads the scales of a tile; returns what acc_o is to be multiplied with because v_scale has grown.
    const auto load_scales = [&](int n_block) {
      if constexpr (Config::kPerBlock) {
        const float before = v_scale;
#pragma unroll
        for (int segment = 0; segment < Config::kSegments; ++segment) {
          scale_scores(segment, k_scales.at(n_block * Config::kSegments + segment));
          weights[segment] = v_scales.at(n_block * Config::kSegments + segment);
          v_scale = fmaxf(v_scale, weights[segment]);
        }
        const float inverse = __fdividef(1.f, v_scale);
#pragma unroll
        for (float& weight : weights) weight *= inverse;
        return before * inverse;
      } else {
        return 1.f;
      }
    };
    const auto round_weights = [&] {
      if constexpr (Config::kPerBlock) {
#pragma unroll
        for (int i = 0; i < kNumAccS; ++i) acc_s[i] *= weights[i / kAccPerSegment];
      }
#pragma unroll
      for (int i = 0; i < kNumAccS / 4; ++i) {
        const int a = fp8_operand_source(i / 4, i % 4, 0), b = fp8_operand_source(i / 4, i % 4, 1);
        p_regs[i] = pack_e4m3(acc_s[a], acc_s[a + 1], acc_s[b], acc_s[b + 1]);
      }
    };
    const auto masked_tile = [&](int n_block) {
      MaskedTile<kNumAccS> tile;
      const int first_key = n_block * Config::kBlockN + acc_first_col(lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = queries.position(rows[half]);
        const int end = mask.visible_end(position, sequence) - first_key;
        tile.hidden[half] = Config::Tiles::kMaskedLeft
                                ? HiddenBits<kNumAccS>::outside(mask.visible_begin(position, sequence) - first_key, end)
                                : HiddenBits<kNumAccS>::from(end);
      }
      return tile;
    };
    using Biases = typename Score::template Tile<Config::kBlockN>;

    float factors[2];  // of acc_o: what the softmax and V's scale of the latest tile ask for, not yet applied
    const auto take_scores = [&](const auto& tile, const Biases& biases, int n_block, float growth) {
      pin_registers(acc_s);
      shared.k_ring.release(k_state, elected);
      k_state.advance();
      float rescale[2];
      if constexpr (Score::kModifies) {
#pragma unroll
        for (int i = 0; i < kNumAccS; ++i) acc_s[i] *= scales[acc_half(i) % kRowScales][i / kAccPerSegment];
        const int from = sequence.diagonal - n_block * Config::kBlockN - acc_first_col(lane);
        score.template modify<Config::kBlockN>(
            acc_s, biases, {queries.position(rows[0]) + from, queries.position(rows[1]) + from}, lane);
        tile.hide(acc_s);
        if (Config::kAlignsKeys && n_block == 0 && hidden > 0) {
          const int behind = hidden - acc_first_col(lane);
#pragma unroll
          for (int i = 0; i < min_of(kNumAccS, kRowsPerScale / 2); ++i) {
            if (acc_col_offset(i) < behind) acc_s[i] = -INFINITY;
          }
        }
        const float one[1] = {1.f};
        softmax.update(acc_s, one, rescale);
      } else {
        tile.hide(acc_s);
        softmax.update(acc_s, scales, rescale);
      }
      if constexpr (Config::kPerBlock) {
        rescale[0] *= growth;
        rescale[1] *= growth;
      }
      return make_float2(rescale[0], rescale[1]);
    };
    // A tile's scores and softmax with nothing else in flight.
    const auto take_alone = [&](const auto& tile, int n_block) {
      const float growth = load_scales(n_block);
      const Biases biases = score.template load_tile<Config::kBlockN>(sequence.k, n_block, lane);
      shared.k_ring.wait_full(k_state);
      issue_scores();
      wgmma_wait<0>();
      const float2 rescale = take_scores(tile, biases, n_block, growth);
      factors[0] = rescale.x;
      factors[1] = rescale.y;
      round_weights();
    };
    // One tile of keys: its scores and softmax, while the previous tile's P V runs.
    const auto overlapped_step = [&](const auto& tile, int n_block) {
      const float growth = load_scales(n_block);
      const Biases biases = score.template load_tile<Config::kBlockN>(sequence.k, n_block, lane);
      shared.k_ring.wait_full(k_state);
      if constexpr (kTakesTurns) named_barrier_sync(my_turn, kTurnThreads);
      issue_scores();
      wait_transposed();
      issue_output(0);
      if constexpr (kTakesTurns) named_barrier_arrive(next_turn, kTurnThreads);
      wgmma_wait<1>();
      const float2 rescale = take_scores(tile, biases, n_block, growth);
      complete_before_wait(softmax.row_sum[0] + softmax.row_sum[1]);
      wait_output();
      pin_registers(acc_s);
      release_transposed();
      round_weights();
      if constexpr (Config::kFlushes) {
        flush(factors, 0);
        factors[0] = rescale.x;
        factors[1] = rescale.y;
      } else {
#pragma unroll
        for (int i = 0; i < kNumAccO; ++i) acc_o[i] *= acc_half(i) ? rescale.y : rescale.x;
      }
    };
    // One tile from its scores to P V, for kernels without room for two products.
    const auto whole_step = [&](const auto& tile, int n_block) {
      take_alone(tile, n_block);
      wait_transposed();
#pragma unroll
      for (int part = 0; part < Config::kParts; ++part) {
        issue_output(part);
        wait_output();
        flush(factors, part);
      }
      release_transposed();
    };
    const auto step = [&](const auto& tile, int n_block) {
      if constexpr (Config::kOverlaps) {
        overlapped_step(tile, n_block);
      } else {
        whole_step(tile, n_block);
      }
    };

    if (tiles.num_tiles > 0) {
      shared.q_ring.wait_full(q_state);
      if (!Score::kModifies && folded.changes_q()) {
        rewrite_q<Config::kBlockM, num_byte_slabs(Config::kHeadDim)>(shared_address(shared.q[0]), warpgroup, thread, folded.q_keep_bits,
                          folded.q_flip_bits != 0 ? 0x80808080u : 0);
      }
      if constexpr (Config::kOverlaps) {
        take_alone(masked_tile(tiles.n_block(0)), tiles.n_block(0));
      } else {
        step(masked_tile(tiles.n_block(0)), tiles.n_block(0));
      }
      int i = 1;
      const auto masked_until = [&](int end) {
        for (; i < end; ++i) step(masked_tile(tiles.n_block(i)), tiles.n_block(i));
      };
      const auto unmasked_until = [&](int end) {
        for (; i < end; ++i) step(UnmaskedTile{}, tiles.n_block(i));
      };
      if constexpr (Config::Tiles::kMaskedLeft) {
        // Masked, unmasked, masked; the code of the masked loop stands once.
        for (int end = tiles.num_masked;; end = tiles.num_tiles) {
          masked_until(end);
          if (i >= tiles.num_tiles) break;
          unmasked_until(tiles.full_end);
        }
      } else {
        if constexpr (Config::Tiles::kManyMasked) masked_until(tiles.num_masked);
        unmasked_until(tiles.num_tiles);
      }
      shared.q_ring.release(q_state, elected);
      q_state.advance();
      if constexpr (Config::kOverlaps) {
        wait_transposed();
        issue_output(0);
        wait_output();
        release_transposed();
        if constexpr (Config::kFlushes) flush(factors, 0);
      }
    }

    float normalise[2], lse[2], largest[2], sinks[2] = {-INFINITY, -INFINITY};
    if (params.sinks != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (queries.holds(rows[half])) sinks[half] = params.sinks[queries.head(rows[half])];
      }
    }
    softmax.finish(sinks, normalise, lse, largest);
    if (params.max_logit != nullptr) store_max_logit(params.max_logit, queries, warp_row, largest, lane);
    typename Config::Output output(params, queries, warp_row);
    output.store_lse(lse, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!queries.holds(rows[half])) continue;
      const bool empty = normalise[half] == 0.f;  // the hidden values that met its zero weights may have been NaN
      const float factor = normalise[half] * v_scale;
      output.begin_row(queries, rows[half]);
#pragma unroll
      for (int group = 0; group < Config::kHeadDim / 16; ++group) {
        if (group * 16 >= params.head_dim_v) break;
        float x[4];
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          x[column] = empty ? 0.f : acc_o[fp8_output_source(group, half, column)] * factor;
        }
        output.store(group * 16 + 4 * (lane % 4), x);
      }
    }
  });

  // Takes the last signal of the ring, so that every arrival has met its wait.
  if (kTakesTurns && warpgroup == 0) named_barrier_sync(my_turn, kTurnThreads);
}

template <class Config>
__device__ __forceinline__ void flash_fwd_fp8_sm90(const typename Config::Params& params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedStorage<Config>& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  if (warp == 0 && elect_one()) {
    prefetch_tensor_map(params.q_tma.map);
    if (Config::Producer::kArrivals == 1 && params.seqlens_k.num_rows > 0) {
      prefetch_tensor_map(params.k_tma.map);
      prefetch_tensor_map(params.v_tma.map);
    }
    shared.q_ring.init(1, Config::kNumConsumers * 4);
    shared.k_ring.init(Config::Producer::kArrivals, Config::kNumConsumers * 4);
    shared.v_ring.init(Config::Producer::kArrivals, kTransposingWarps);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      mbarrier_init(&shared.transposed_full[stage], kTransposingWarps);
      mbarrier_init(&shared.transposed_empty[stage], Config::kNumConsumers * 4);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    if constexpr (Config::kMovesRegisters) decrease_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      Config::Producer::template run<Config>(params, shared);
    } else {
      transpose<Config>(params, shared, warp - 1);
    }
  } else {
    if constexpr (Config::kMovesRegisters) increase_registers<Config::kConsumerRegisters>();
    consume<Config>(params, shared, warp / 4 - 1);
  }
}

// kernel: the variant's entry, an instance of flash_fwd_fp8_sm90<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_fwd_fp8(Kernel* kernel, FwdFp8Params params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");

  if (params.batch == 0 || params.num_heads == 0 || params.seqlens_q.num_rows == 0) return cudaSuccess;
  // Item numbers are ints, and the last round goes past the end: the planner has seen to it that they fit.
  params.schedule = make_fwd_schedule(params, Config::kBlockM);

  // Maps move pairs of e4m3 as 16-bit elements.
  const auto spec = [&](const void* base, const RowStrides& strides, int rows, int heads, int columns, int box_rows) {
    const int tensor_batch = params.seqlens_q.cu_seqlens != nullptr ? 1 : params.batch;
    return TmaTensorSpec{base, {strides.batch / 2, strides.row / 2, strides.head / 2}, tensor_batch, rows, heads,
                         columns / 2, box_rows};
  };
  const SeqlenParams& keys = params.seqlens_k;
  cudaError_t status =
      encode_tma_queries(&params.q_tma, spec(params.q, params.q_strides, params.seqlens_q.num_rows, params.num_heads,
                                             params.head_dim, Config::kBlockM),
                         params.num_heads / params.num_heads_kv, params.heads_per_tile);
  // Without keys nothing is copied, and the maps of empty tensors do not exist.
  if (keys.num_rows > 0) {
    // Where a sequence, or a part of the keys, ends before the tensor does, what comes next must not meet a zero weight.
    const bool ragged = keys.cu_seqlens != nullptr || keys.seqused != nullptr || params.num_splits > 1;
    if (status == cudaSuccess) {
      status = encode_tma_rows(&params.k_tma, spec(params.k, params.k_strides, keys.num_rows, params.num_heads_kv,
                                                   params.head_dim, Config::kBlockN), ragged);
    }
    if (status == cudaSuccess) {
      status = encode_tma_rows(&params.v_tma, spec(params.v, params.v_strides, keys.num_rows, params.num_heads_kv,
                                                   params.head_dim_v, Config::kBlockN), ragged);
    }
  }
  if (status != cudaSuccess) return status;

  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(params.num_ctas), dim3(Config::kNumThreads), arguments,
                          kSharedBytes, stream);
}

}  // namespace flash_ext::sm90::fp8
