// The consumers of the Hopper backward (bwd.cuh): the five products of a tile, and dK and dV of an item.
#pragma once

#include <climits>
#include <cstddef>
#include <type_traits>

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/outputs.cuh"
#include "sm90/barriers.h"
#include "sm90/bwd_cluster.cuh"
#include "sm90/bwd_tiles.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

__device__ __forceinline__ void store_shared_quad(uint32_t address, const float* values) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// The first array where `kFirst`, else the second.
template <bool kFirst, class First, class Second>
__device__ __forceinline__ auto& one_of(First& first, Second& second) {
  if constexpr (kFirst) {
    return first;
  } else {
    return second;
  }
}

// Which queries see the thread's two keys: columns [begin, end) of its accumulators, counted from its first column.
struct VisibleQueries {
  int begin[2];
  int end[2];
};

// Exponents of hidden scores become -inf.
template <class Mask, int kNumAcc>
__device__ __forceinline__ void hide_queries(float (&acc)[kNumAcc], const VisibleQueries& visible) {
#pragma unroll
  for (int i = 0; i < kNumAcc; ++i) {
    bool hidden = acc_col_offset(i) < visible.begin[acc_half(i)];
    if constexpr (Mask::kBeginMoves) hidden |= acc_col_offset(i) >= visible.end[acc_half(i)];
    if (hidden) acc[i] = -INFINITY;
  }
}

// A warp's 16 rows of packed pairs into its rows of a score tile, from pair of column blocks `first_pair` of a slab on.
template <int kNumPairs>
__device__ __forceinline__ void store_scores(const uint32_t* packed, uint32_t rows, int first_pair, int lane) {
#pragma unroll
  for (int pair = 0; pair < kNumPairs; ++pair) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(rows + staging_write_offset(lane, first_pair + pair)), "r"(packed[staging_source(pair, 0) / 2]),
                 "r"(packed[staging_source(pair, 1) / 2]), "r"(packed[staging_source(pair, 2) / 2]),
                 "r"(packed[staging_source(pair, 3) / 2])
                 : "memory");
  }
}

template <class Config>
__device__ __forceinline__ void consume_tiles(const BwdParams& params, BwdStorage<Config>& shared, int warpgroup) {
  using Element = typename Config::Element;
  using Mask = typename Config::Mask;
  using Shared = BwdStorage<Config>;
  constexpr int kThreads = 128, kAllThreads = kBwdConsumers * kThreads;
  constexpr bool kOwnsKeys = Config::kOwnsKeys, kWantsDq = Config::kWantsDq, kWantsDkv = Config::kWantsDkv;
  constexpr int kQueries = Config::kQueriesPerConsumer;
  constexpr int kNumAccS = kQueries / 2;
  const int thread = threadIdx.x % kThreads;
  const int lane = thread % 32;
  const bool elected = lane == 0;
  const int first_key_row = kOwnsKeys ? warpgroup * kRowsPerWarpgroup : 0;  // of the warpgroup in the tile of keys
  const int first_query = kOwnsKeys ? 0 : warpgroup * kQueries;             // in the tile of queries

  const Mask mask(params.mask);
  typename Config::Score score(params.score);

  // Descriptors start from the base of shared memory, so that one register serves all of them. Units of 16 bytes.
  constexpr uint32_t kKeys = offsetof(Shared, k) / 16, kValues = offsetof(Shared, v) / 16;
  constexpr uint32_t kQuery = offsetof(Shared, q) / 16, kQueryStage = sizeof(shared.q[0]) / 16;
  constexpr uint32_t kDout = offsetof(Shared, dout) / 16, kDoutStage = sizeof(shared.dout[0]) / 16;
  constexpr uint32_t kDs = offsetof(Shared, ds) / 16, kP = offsetof(Shared, p) / 16;
  constexpr uint32_t kScoreStage = sizeof(shared.ds[0]) / 16;
  uint32_t base = __shfl_sync(0xffffffffu, shared_address(&shared), 0);
  WgmmaDescriptor k_major, mn_major_keys, mn_major_queries;
  const auto set_descriptors = [&] {
    k_major = {k_major_descriptor(base), kDescriptorHigh};
    mn_major_keys = {mn_major_descriptor(base, Config::kBlockN), kDescriptorHigh};
    mn_major_queries = {mn_major_descriptor(base, Config::kBlockM), kDescriptorHigh};
  };
  set_descriptors();
  const uint32_t my_key_step = first_key_row * kSlabRowBytes >> 4;
  const uint32_t my_query_step = first_query * kSlabRowBytes >> 4;
  const uint32_t my_score_rows = (first_key_row + thread / 32 * kRowsPerWarp) * kSlabRowBytes;
  const uint32_t my_dq = shared_address(shared.dq[warpgroup]) + dq_quad_offset(thread, 0) * 4;

  RingState<1> item_state, dq_state;  // of K and V; of the dQ block
  RingState<Config::kStagesQ> q_state;
  RingState<Config::kStagesDout> dout_state_own;
  auto& dout_state = one_of<Config::kStagesQ == Config::kStagesDout>(q_state, dout_state_own);  // both advance with the tile
  RingState<Config::kStagesDs> ds_state;
  bool used = false;  // whether the item has stages before these

  float acc_s[kNumAccS], acc_dp_own[Config::kOneScoreTile ? 1 : kNumAccS];
  float (&acc_dp)[kNumAccS] = one_of<Config::kOneScoreTile>(acc_s, acc_dp_own);
  // Owner of keys: dK and dV. Else dK (consumer 0) or dV (consumer 1), in acc_dk.
  float acc_dk[kWantsDkv ? Config::kHeadDim / 2 : 1], acc_dv[kWantsDkv && kOwnsKeys ? Config::kHeadDimV / 2 : 1];
  float acc_dq_own[Config::kOneScoreTile ? 1 : kDqAccumulators];
  float (&acc_dq)[kDqAccumulators] = one_of<Config::kOneScoreTile>(acc_s, acc_dq_own);
  uint32_t p_regs[kNumAccS / 2], ds_regs_own[Config::kSparesRegisters && !Config::kLateDv ? 1 : kNumAccS / 2];
  uint32_t (&ds_regs)[kNumAccS / 2] = one_of<Config::kSparesRegisters && !Config::kLateDv>(p_regs, ds_regs_own);

  // The stages of the tile before; those of a pair are released at the end of their own trip.
  const auto release_used = [&] {
    if constexpr (!Config::kPaired) {
      shared.q_ring.release(q_state.before(), elected && used);
      shared.dout_ring.release(dout_state.before(), elected && used);
    }
  };

  // dQ of block `block` of the tile, from dS in its stage: starts a sum of its own.
  const auto issue_dq = [&](int block) {
    const uint32_t ds_step = kDs + ds_state.stage * kScoreStage +
                             block / Config::kDqColumnBlocks * (Config::kBlockN * kSlabRowBytes >> 4);
    const uint32_t k_step = kKeys + block % Config::kDqColumnBlocks * (Config::kBlockN * kSlabRowBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
      Wgmma<Element, kDqBlockColumns>::template ss<Major::kMn, Major::kMn>(
          acc_dq, mn_major_keys.at(ds_step + mn_major_step(step)), mn_major_keys.at(k_step + mn_major_step(step)), step > 0);
    }
    wgmma_commit();
  };
  const auto hand_over_piece = [&](int piece) {
    constexpr int kQuads = kDqAccumulators / 4 / Config::kDqPieces;
    mbarrier_wait(&shared.dq_ring[warpgroup].empty[0], dq_state.phase ^ 1);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      store_shared_quad(my_dq + dq_quad_offset(0, quad) * 4, &acc_dq[4 * (piece * kQuads + quad)]);
    }
    fence_async_proxy();
    __syncwarp();
    mbarrier_arrive_if(&shared.dq_ring[warpgroup].full[0], elected);
    dq_state.advance();
  };
  const auto hand_over_dq = [&] {
    pin_registers(acc_dq);
#pragma unroll
    for (int piece = 0; piece < Config::kDqPieces; ++piece) hand_over_piece(piece);
  };

  // Of a pair: dQ over the keys of both CTAs, in their order, whoever forms it.
  DsExchange<Config> exchange{shared, q_state, warpgroup, elected};
  // Whether dQ of the tile before is formed here, and not handed over yet.
  const auto dq_pending = [&] {
    return used && (Config::kDqShare == DqShare::kHalfColumns || !DqTurns<Config>::is_mine(q_state));
  };
  const auto issue_dq_of_pair = [&](uint32_t ds_stage) {
    constexpr uint32_t kSlab = Config::kBlockN * kSlabRowBytes >> 4;
    constexpr uint32_t kPeerKeys = offsetof(Shared, peer) / 16;
    constexpr uint32_t kPeerDs = kPeerKeys + Config::kPeerKeySlabs * kSlab;
    const uint32_t ds_steps[] = {kDs + ds_stage * kScoreStage, kPeerDs};
    const uint32_t k_steps[] = {kKeys + (DqTurns<Config>::first_block() + warpgroup) * kSlab, kPeerKeys + warpgroup * kSlab};
    const uint32_t rank = rank_in_pair<Config>();
    wgmma_fence();
#pragma unroll
    for (int cta = 0; cta < Config::Cluster::kCtas; ++cta) {
      const uint32_t ds_step = cta == rank ? ds_steps[0] : ds_steps[1], k_step = cta == rank ? k_steps[0] : k_steps[1];
#pragma unroll
      for (int step = 0; step < Config::kBlockN / 16; ++step) {
        Wgmma<Element, kDqBlockColumns>::template ss<Major::kMn, Major::kMn>(acc_dq, mn_major_keys.at(ds_step + mn_major_step(step)),
                                                                 mn_major_keys.at(k_step + mn_major_step(step)), cta + step > 0);
      }
    }
    wgmma_commit();
  };
  const auto release_tile_of_pair = [&] {
    release_in_pair(shared.q_ring, q_state, lane);
    release_in_pair(shared.dout_ring, dout_state, lane);
  };

  for_each_key_item<Config>(params, [&](const KeyItem& item, const auto& tiles) {
    const Sequence& sequence = item.sequence;
#pragma unroll
    for (float& x : acc_dk) x = 0.f;
#pragma unroll
    for (float& x : acc_dv) x = 0.f;
    const int first_key = item.n_block * Config::kBlockN + first_key_row + acc_row(thread, 0);  // of the thread
    score.begin_item(params.score, sequence.k, item.index, item.head_kv, first_key);
    shared.k_ring.wait_full(item_state);
    shared.v_ring.wait_full(item_state);

    for_each_query_tile<Config>(params, item, tiles, [&](int head, int m_block, const auto& visit) {
      if constexpr (Config::kHidesBase) {
        asm volatile("" : "+r"(base));  // else every descriptor of the loop is computed before it, and spilled
        set_descriptors();
      }
      score.begin_head(params.score, item.index, head);
      // S^T, and what is left of the tile before: dK (and dV).
      shared.q_ring.wait_full(q_state);
      {
        const uint32_t a_step = kKeys + my_key_step;
        const uint32_t b_step = kQuery + q_state.stage * kQueryStage + my_query_step;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Config::kHeadDim / 16; ++step) {
          Wgmma<Element, kQueries>::ss(acc_s, k_major.at(a_step + k_major_step(Config::kBlockN, step)),
                                       k_major.at(b_step + k_major_step(Config::kBlockM, step)), step > 0);
        }
        wgmma_commit();
      }
      const auto issue_dp = [&] {
        const uint32_t a_step = kValues + my_key_step;
        const uint32_t b_step = kDout + dout_state.stage * kDoutStage + my_query_step;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Config::kHeadDimV / 16; ++step) {
          Wgmma<Element, kQueries>::ss(acc_dp, k_major.at(a_step + k_major_step(Config::kBlockN, step)),
                                       k_major.at(b_step + k_major_step(Config::kBlockM, step)), step > 0);
        }
        wgmma_commit();
      };
      wgmma_wait<1>();
      release_used();
      shared.dout_ring.wait_full(dout_state);
      if constexpr (Config::kOneScoreTile) {
        wgmma_wait<0>();
      } else {
        issue_dp();
        if constexpr (Config::kDqShare == DqShare::kHalfColumns) {
          // dQ of the tile before goes out under this one's exponentials.
          pin_registers(acc_dq);
          if (dq_pending()) hand_over_piece(0);
        }
        wgmma_wait<1>();
      }
      pin_registers(acc_s);

      // P^T = exp2(scale * S^T - lse), a column for each query.
      const uint32_t statistics = (first_query + acc_first_col(lane)) * 4;
      const uint32_t lse = shared_address(shared.lse_log2[q_state.stage]) + statistics;
      const int distance = m_block * Config::kBlockM + first_query + acc_first_col(lane) + sequence.diagonal - first_key;
      score.exponents(acc_s, lse, distance);
      if constexpr (Config::Tiles::kListed) {
        if (visit.slot >= 0) {
          const int my_lane = read_lane();
          const int key = item.n_block * Config::kBlockN + first_key_row + thread / 32 * kRowsPerWarp + acc_row(my_lane, 0);
          uint32_t hidden[2];
          load_hidden<Config::kBlockM>(params.blocks, visit, /*direction=*/1, key % kMaskBlock, my_lane, hidden);
          // A thread has two of eight queries.
          hidden[0] >>= first_query / 4;
          hidden[1] >>= first_query / 4;
          hide_keys(acc_s, hidden);
        }
      } else if (m_block < tiles.full_begin || m_block >= tiles.full_end) {
        VisibleQueries visible;
        const int my_lane = read_lane();
        const int first = m_block * Config::kBlockM + first_query + acc_first_col(my_lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = item.n_block * Config::kBlockN + first_key_row + thread / 32 * kRowsPerWarp + acc_row(my_lane, half);
          visible.begin[half] = (key < sequence.k.num_rows ? mask.rows_begin(key, sequence) : INT_MAX) - first;
          visible.end[half] = mask.rows_end(key, sequence) - first;
        }
        hide_queries<Mask>(acc_s, visible);
      }
#pragma unroll
      for (float& x : acc_s) x = fast_exp2(x);
      const auto round_p = [&] {
#pragma unroll
        for (int i = 0; i < kNumAccS / 2; ++i) p_regs[i] = pack_pair<Element>(acc_s[2 * i], acc_s[2 * i + 1]);
      };
      if constexpr (!Config::kLateDv) round_p();
      if constexpr (Config::kDqShare == DqShare::kHalfColumns) {
        if (dq_pending()) hand_over_piece(1);
      }
      if constexpr (Config::kStagesP == 1) {
        named_barrier_sync(static_cast<int>(BwdBarrier::kScoresUsed), kAllThreads);
      }
      if constexpr (!kOwnsKeys && kWantsDkv) {
        store_scores<kQueries / 16>(p_regs, shared_address(shared.p.stage[ds_state.stage % Config::kStagesP]) + my_score_rows,
                                    warpgroup * (kQueries / 16), lane);
      }

      const auto issue_dv = [&] {
        if constexpr (kOwnsKeys && kWantsDkv) {
          const uint32_t b_step = kDout + dout_state.stage * kDoutStage;
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < Config::kBlockM / 16; ++step) {
            Wgmma<Element, Config::kHeadDimV>::rs(acc_dv, &p_regs[4 * step], mn_major_queries.at(b_step + mn_major_step(step)));
          }
          wgmma_commit();
        }
      };
      auto& acc_ds = one_of<Config::kLateDv>(acc_dp, acc_s);
      if constexpr (Config::kLateDv) {
        wgmma_wait<0>();
        pin_registers(acc_dp);
      } else if constexpr (Config::kOneScoreTile) {
        issue_dv();
        issue_dp();
        wgmma_wait<0>();
        pin_registers(acc_dp);
      } else if constexpr (Config::kSparesRegisters) {
        issue_dv();
        wgmma_wait<0>();  // dV too, whose operand P makes room for dS
        pin_registers(acc_dp);
      } else {
        wgmma_wait<0>();
        pin_registers(acc_dp);
        issue_dv();
      }
      // dS^T = P^T (dP^T - delta), by softcap times its derivative; neighbouring queries pair by pair.
      const uint32_t delta = shared_address(shared.delta[dout_state.stage]) + statistics;
      const auto differentiate = [&](auto& of_score, auto softcap) {
#pragma unroll
        for (int i = 0; i < kNumAccS; i += 4) {
          const float2 delta_pair = load_shared_pair(delta + acc_col_offset(i) * 4);
          float2 lse_pair{};
          if constexpr (softcap) lse_pair = load_shared_pair(lse + acc_col_offset(i) * 4);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = i + 2 * half;
            float2 p{acc_s[j], acc_s[j + 1]};
            if constexpr (Config::kOneScoreTile) p = unpack_pair<Element>(p_regs[j / 2]);
            acc_ds[j] = p.x * (acc_dp[j] - delta_pair.x);
            acc_ds[j + 1] = p.y * (acc_dp[j + 1] - delta_pair.y);
            if constexpr (Config::Score::kModifies) score.bias_sum[half] += acc_ds[j] + acc_ds[j + 1];
            if constexpr (softcap) {
              const float from = static_cast<float>(distance) + float(acc_col_offset(i) - 8 * half);
              acc_ds[j] *= of_score.softcap_factor(p.x, lse_pair.x, half, from);
              acc_ds[j + 1] *= of_score.softcap_factor(p.y, lse_pair.y, half, from + 1.f);
            }
          }
        }
      };
      if constexpr (Config::Score::kModifies) {
        if (score.numbers.has_softcap()) {
          differentiate(score, std::true_type{});
        } else {
          differentiate(score, std::false_type{});
        }
      } else {
        differentiate(score, std::false_type{});
      }
#pragma unroll
      for (int i = 0; i < kNumAccS / 2; ++i) ds_regs[i] = pack_pair<Element>(acc_ds[2 * i], acc_ds[2 * i + 1]);
      if constexpr (Config::kLateDv) round_p();

      const auto store_ds = [&](uint32_t stage) {
        const uint32_t ds_rows = shared_address(shared.ds[stage]) + my_score_rows;
        if constexpr (kOwnsKeys) {
#pragma unroll
          for (int slab = 0; slab < num_slabs(Config::kBlockM); ++slab) {
            store_scores<4>(&ds_regs[slab * kSlabColumns / 4], ds_rows + slab * Config::kBlockN * kSlabRowBytes, 0, lane);
          }
        } else {
          store_scores<kQueries / 16>(ds_regs, ds_rows, warpgroup * (kQueries / 16), lane);
        }
      };
      if constexpr (Config::kDqShare == DqShare::kEveryOtherTile) {
        const uint32_t stage = exchange.begin_write();
        store_ds(stage);
        exchange.end_write(stage, my_score_rows, warpgroup == 0 && thread < 32);
      } else if constexpr (!kOwnsKeys || kWantsDq) {
        store_ds(ds_state.stage);
        fence_async_proxy();
        named_barrier_sync(static_cast<int>(BwdBarrier::kScoresWritten), kAllThreads);
        if constexpr (Config::kPaired) exchange.send(ds_state.stage, warpgroup == 0 && thread == 0);
      }

      const auto issue_dk = [&] {
        if constexpr (kWantsDkv) {
          wgmma_fence();
          if constexpr (kOwnsKeys) {
            const uint32_t b_step = kQuery + q_state.stage * kQueryStage;
#pragma unroll
            for (int step = 0; step < Config::kBlockM / 16; ++step) {
              Wgmma<Element, Config::kHeadDim>::rs(acc_dk, &ds_regs[4 * step], mn_major_queries.at(b_step + mn_major_step(step)));
            }
          } else {
            const uint32_t a_step =
                warpgroup == 0 ? kDs + ds_state.stage * kScoreStage : kP + ds_state.stage % Config::kStagesP * kScoreStage;
            const uint32_t b_step = warpgroup == 0 ? kQuery + q_state.stage * kQueryStage : kDout + dout_state.stage * kDoutStage;
#pragma unroll
            for (int step = 0; step < Config::kBlockM / 16; ++step) {
              Wgmma<Element, Config::kHeadDim>::template ss<Major::kK, Major::kMn>(
                  acc_dk, k_major.at(a_step + k_major_step(Config::kBlockN, step)),
                  mn_major_queries.at(b_step + mn_major_step(step)), true);
            }
          }
          wgmma_commit();
        }
      };
      if constexpr (Config::kDqShare == DqShare::kEveryOtherTile) {
        issue_dv();
        issue_dk();
        wgmma_wait<0>();  // in flight beside dQ or from one trip to the next, they would make ptxas serialise all products
        release_tile_of_pair();
        if (dq_pending()) {
          exchange.wait();
          issue_dq_of_pair(0);
          wgmma_wait<0>();
          exchange.release();
          hand_over_dq();
        }
      } else if constexpr (Config::kDqShare == DqShare::kHalfColumns) {
        issue_dk();
        exchange.wait();
        issue_dq_of_pair(ds_state.stage);
        wgmma_wait<1>();
        release_tile_of_pair();
        wgmma_wait<0>();  // dQ goes out in the next trip; still in flight then, it would make ptxas serialise all products
        exchange.release();
      } else if constexpr (kWantsDq) {
        issue_dq(warpgroup);
        issue_dk();
        wgmma_wait<kWantsDkv ? 1 : 0>();
        hand_over_dq();
#pragma unroll
        for (int first = kBwdConsumers; first < Config::kDqBlocks; first += kBwdConsumers) {
          if (first + kBwdConsumers > Config::kDqBlocks && first + warpgroup >= Config::kDqBlocks) break;
          issue_dq(first + warpgroup);
          wgmma_wait<0>();
          hand_over_dq();
        }
      } else {
        issue_dk();
        wgmma_wait<1>();  // dV, whose operand P makes room
      }
      used = true;
      q_state.advance();
      if constexpr (Config::kStagesQ != Config::kStagesDout) dout_state.advance();
      ds_state.advance();
    });

    wgmma_wait<0>();
    pin_registers(acc_dk);
    pin_registers(acc_dv);
    release_used();
    if constexpr (Config::kPaired) {
      if (dq_pending()) {  // of the last tile
        if constexpr (Config::kDqShare == DqShare::kEveryOtherTile) {
          exchange.wait();
          issue_dq_of_pair(0);
          wgmma_wait<0>();
          exchange.release();
        }
        hand_over_dq();
      }
    }
    used = false;
    shared.k_ring.release(item_state, elected);

    // Found anew where registers are short, rather than kept.
    const KeyItem done = Config::kPaired ? key_item<Config>(params, opaque(item.round)) : item;
    const RowRange& keys = done.sequence.k;
    // V becomes the staging: a warp's 16 rows of one of its slabs.
    const auto store = [&](auto& acc, void* gradient, const RowStrides& strides, int num_columns, int slab) {
      if (gradient == nullptr) return;
      Element* first = static_cast<Element*>(gradient) + keys.batch * strides.batch +
                       keys.first_row * strides.row + done.head_kv * strides.head;
      const int my_lane = read_lane();
      const int first_row = done.n_block * Config::kBlockN + first_key_row + thread / 32 * kRowsPerWarp;
      const uint32_t staging = shared_address(shared.v) + slab * Config::kBlockN * kSlabRowBytes + my_score_rows;
      store_warp_rows<Element>(acc, staging, my_lane, num_columns, [&](int row_of_warp) -> Element* {
        const int row = first_row + row_of_warp;
        return row < keys.num_rows ? first + row * strides.row : nullptr;
      });
    };
    const bool has_dk = kOwnsKeys || warpgroup == 0;
    if (has_dk) {
#pragma unroll
      for (float& x : acc_dk) x *= params.score.softmax_scale;
    }
    constexpr bool kHasBias = Config::Score::kModifies;
    if constexpr (kHasBias) {
      if (params.dk_bias != nullptr) {
#pragma unroll
        for (float& sum : score.bias_sum) {
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        }
        if constexpr (!kOwnsKeys) {
          if (warpgroup == 1 && lane % 4 == 0) {
            for (int half = 0; half < 2; ++half) shared.bias.of_keys[acc_row(thread, half)] = score.bias_sum[half];
          }
        }
      }
    }
    if constexpr (kOwnsKeys && kWantsDkv) {
      named_barrier_sync(static_cast<int>(BwdBarrier::kValuesUsed0) + warpgroup, kThreads);
      store(acc_dv, params.dv, params.dv_strides, params.head_dim_v, 0);
      store(acc_dk, params.dk, params.dk_strides, params.head_dim, 0);
    } else if constexpr (kWantsDkv) {
      named_barrier_sync(static_cast<int>(BwdBarrier::kValuesUsed0), kAllThreads);
      store(acc_dk, has_dk ? params.dk : params.dv, has_dk ? params.dk_strides : params.dv_strides,
            has_dk ? params.head_dim : params.head_dim_v, warpgroup);
    }
    if constexpr (kHasBias) {
      if (params.dk_bias != nullptr && has_dk && lane % 4 == 0) {
        const RowStrides& strides = params.dk_bias_strides;
        float* first = params.dk_bias + keys.batch * strides.batch + done.head_kv * strides.head + keys.first_row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = score.bias_sum[half];
          if constexpr (!kOwnsKeys) sum += shared.bias.of_keys[acc_row(thread, half)];
          if (first_key + 8 * half < keys.num_rows) first[first_key + 8 * half] = sum;
        }
      }
    }
    fence_async_proxy();  // the staged rows before the next tile of V
    __syncwarp();
    shared.v_ring.release(item_state, elected);
    item_state.advance();
  });
}

}  // namespace flash_ext::sm90
