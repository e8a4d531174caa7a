// Hopper backward: dK, dV and the float32 sum of dQ, from Q, K, V, dO and the row statistics of bwd_preprocess.
// Timeline, barriers, memory: docs/bwd_sm90.md.
//
// A persistent CTA takes tiles of kBlockN keys of one KV head, and for each visits the tiles of kBlockM queries of the
// query heads that share it. Warp 0 copies K and V once an item and Q, dO and statistics tile by tile; two consumer
// warpgroups compute S^T = K Q^T and dP^T = V dO^T (swapped, so that P^T and dS^T are at once the A operands of
// dV += P^T dO and dK += dS^T Q), and dQ = dS K through shared memory; warps 1 and 2 add dQ to memory in bulk.
#pragma once

#include <climits>
#include <cstddef>

#include "common/math.cuh"
#include "common/outputs.cuh"
#include "host/tma.h"
#include "sm90/barriers.h"
#include "sm90/bwd_cluster.cuh"
#include "sm90/bwd_consumer.cuh"
#include "sm90/bwd_tiles.cuh"
#include "sm90/copies.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

// ---- producer: one thread ----

template <class Config, int kStages>
__device__ __forceinline__ void begin_fill(RingBarriers<kStages>& ring, const RingState<kStages>& state, uint32_t bytes) {
  if constexpr (Config::kPaired) {
    begin_fill_in_pair(ring, state, bytes);
  } else {
    ring.begin_fill(state, bytes);
  }
}

// A tile of Q or dO; a CTA of a pair copies half of its columns into both.
template <class Config, int kColumns>
__device__ __forceinline__ void load_queries_of(const TmaTensor& tensor, uint64_t* barrier, uint8_t* tile, const RowRange& range,
                                                int row, int head) {
  if constexpr (Config::kPaired) {
    constexpr int kHalf = kColumns / 2;
    const int rank = static_cast<int>(rank_in_pair<Config>());
    load_rows_into_pair<Config::kBlockM, kHalf>(tensor, barrier, tile + rank * num_slabs(kHalf) * Config::kBlockM * kSlabRowBytes,
                                                range, row, head, CacheHint::kEvictLast, rank * kHalf);
  } else {
    load_rows<Config::kBlockM, kColumns>(tensor, barrier, tile, range, row, head, CacheHint::kEvictLast);
  }
}

// K and V of a pair: a thread of its own, since one has too few registers for both.
template <class Config>
__device__ __forceinline__ void produce_keys_of_pair(const BwdParams& params, BwdStorage<Config>& shared) {
  RingState<1> item_state;
  for_each_key_item<Config>(params, [&](const KeyItem& item, const auto&) {
    const RowRange& keys = item.sequence.k;
    const int first_key = item.n_block * Config::kBlockN, peer_key = (item.n_block ^ 1) * Config::kBlockN;
    constexpr int kPeerColumns = Config::kPeerKeySlabs * kSlabColumns;
    shared.k_ring.begin_fill(item_state, Config::kKeyTileBytes + sizeof(shared.peer.k));
    load_rows<Config::kBlockN, Config::kHeadDim>(params.k_tma, &shared.k_ring.full[0], shared.k, keys, first_key, item.head_kv,
                                                 CacheHint::kEvictFirst);
    load_rows<Config::kBlockN, kPeerColumns>(params.k_tma, &shared.k_ring.full[0], shared.peer.k, keys, peer_key, item.head_kv,
                                             CacheHint::kEvictFirst, DqTurns<Config>::first_block() * kSlabColumns);
    shared.v_ring.begin_fill(item_state, Config::kValueTileBytes);
    load_rows<Config::kBlockN, Config::kHeadDimV>(params.v_tma, &shared.v_ring.full[0], shared.v, keys, first_key, item.head_kv,
                                                  CacheHint::kEvictFirst);
    item_state.advance();
  });
}

template <class Config>
__device__ __forceinline__ void produce_tiles(const BwdParams& params, BwdStorage<Config>& shared) {
  RingState<1> item_state;  // of K and V
  RingState<Config::kStagesQ> q_state;
  RingState<Config::kStagesDout> dout_state_own;
  auto& dout_state = one_of<Config::kStagesQ == Config::kStagesDout>(q_state, dout_state_own);  // both advance with the tile

  for_each_key_item<Config>(params, [&](const KeyItem& item, const auto& tiles) {
    const Sequence& sequence = item.sequence;
    const int stats_row = stats_first_row(params, item.index);
    const int first_key = item.n_block * Config::kBlockN;
    if constexpr (!Config::kPaired) {
      shared.k_ring.begin_fill(item_state, Config::kKeyTileBytes);
      load_rows<Config::kBlockN, Config::kHeadDim>(params.k_tma, &shared.k_ring.full[0], shared.k, sequence.k, first_key,
                                                   item.head_kv, CacheHint::kEvictFirst);
    }

    const auto load_v = [&] {
      shared.v_ring.begin_fill(item_state, Config::kValueTileBytes);
      load_rows<Config::kBlockN, Config::kHeadDimV>(params.v_tma, &shared.v_ring.full[0], shared.v, sequence.k, first_key,
                                                    item.head_kv, CacheHint::kEvictFirst);
    };
    bool first = !Config::kPaired;
    for_each_query_tile<Config>(params, item, tiles, [&](int head, int m_block, const auto&) {
      const int row = m_block * Config::kBlockM;
      const int64_t stats = (int64_t(sequence.q.batch) * params.num_heads + head) * params.stats_rows + stats_row +
                            row;
      begin_fill<Config>(shared.q_ring, q_state, Config::kQueryTileBytes + Config::kStatsBytes);
      uint64_t* q_full = &shared.q_ring.full[q_state.stage];
      load_queries_of<Config, Config::kHeadDim>(params.q_tma, q_full, shared.q[q_state.stage], sequence.q, row, head);
      bulk_load(shared.lse_log2[q_state.stage], params.lse_log2 + stats, Config::kStatsBytes, q_full);
      if constexpr (!Config::kPaired) {
        if (first) load_v();
      }
      first = false;
      begin_fill<Config>(shared.dout_ring, dout_state, Config::kDoutTileBytes + Config::kStatsBytes);
      uint64_t* dout_full = &shared.dout_ring.full[dout_state.stage];
      load_queries_of<Config, Config::kHeadDimV>(params.dout_tma, dout_full, shared.dout[dout_state.stage], sequence.q, row, head);
      bulk_load(shared.delta[dout_state.stage], params.delta + stats, Config::kStatsBytes, dout_full);
      q_state.advance();
      if constexpr (Config::kStagesQ != Config::kStagesDout) dout_state.advance();
    });
    if (first) load_v();
    item_state.advance();
  });
}

// ---- dQ writers: one thread for each consumer ----

template <class Config>
__device__ __forceinline__ void write_dq(const BwdParams& params, BwdStorage<Config>& shared, int consumer) {
  RingState<1> state;
  RingState<2> tile;
  for_each_key_item<Config>(params, [&](const KeyItem& item, const auto& tiles) {
    const Sequence& sequence = item.sequence;
    const int stats_row = stats_first_row(params, item.index);
    for_each_query_tile<Config>(params, item, tiles, [&](int head, int m_block, const auto& visit) {
      const bool mine = DqTurns<Config>::is_mine(tile);
      tile.advance();
      if (!mine) return;
      // In a deterministic sum, how many tiles (of a pair: pairs of tiles) of keys add to this tile of queries before this one.
      int turn = 0;
      if (params.dq_turns != nullptr) {
        if constexpr (Config::Tiles::kListed) {
          turn = listed_turn<Config::kBlockN>(params.blocks, visit, item.n_block);
        } else {
          const int first_row = m_block * Config::kBlockM;
          const int last_row = min_of(first_row + Config::kBlockM, sequence.q.num_rows) - 1;
          const auto before = Config::Tiles::template key_tiles<Config::kItemKeys>(typename Config::Mask(params.mask), sequence,
                                                                                   first_row, last_row);
          turn = item.group - (before.end - before.num_tiles);
        }
      }
      constexpr int kBlocks = Config::kDqShare == DqShare::kHalfColumns ? Config::kDqBlocks / 2 : Config::kDqBlocks;
      for (int i = consumer; i < kBlocks; i += kBwdConsumers) {
        const int block = DqTurns<Config>::first_block() + i;
        const int64_t index = dq_block_index(
            int64_t(sequence.q.batch) * params.num_heads + head, params.stats_rows,
            (stats_row + m_block * Config::kBlockM) / kDqBlockRows + block / Config::kDqColumnBlocks,
            Config::kDqColumnBlocks, block % Config::kDqColumnBlocks);
        // Columns beyond head_dim are zeros, and stay here.
        const int bytes = dq_bytes_of_columns(params.head_dim - block % Config::kDqColumnBlocks * kDqBlockColumns);
#pragma unroll
        for (int piece = 0; piece < Config::kDqPieces; ++piece) {
          const int bytes_of_piece = min_of(Config::kDqPieceBytes, bytes - piece * Config::kDqPieceBytes);
          mbarrier_wait(&shared.dq_ring[consumer].full[0], state.phase);
          if (piece == 0 && params.dq_turns != nullptr && bytes > 0) wait_for_turn(params.dq_turns + index, turn);
          if (params.dq_blocks != nullptr && bytes_of_piece > 0) {  // else dQ is not wanted
            bulk_reduce_add(params.dq_blocks + index * kDqBlockFloats + piece * (Config::kDqPieceBytes / 4), shared.dq[consumer],
                            bytes_of_piece);
            bulk_commit();
            bulk_wait_read();
          }
          mbarrier_arrive(&shared.dq_ring[consumer].empty[0]);
          state.advance();
        }
        if (params.dq_turns != nullptr && bytes > 0) {
          // The sum must be in memory before the next tile may add to it: that the source has been read says nothing.
          bulk_wait();
          pass_turn(params.dq_turns + index);
        }
      }
    });
  });
  bulk_wait();
}

// ---- kernel ----

template <class Config>
__device__ __forceinline__ void flash_bwd_sm90(const BwdParams& params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  BwdStorage<Config>& shared = *reinterpret_cast<BwdStorage<Config>*>(shared_bytes);
  // The shuffle tells the compiler that the value is the same in the whole warp.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  if (warp == 0 && elect_one()) {
    prefetch_tensor_map(params.k_tma.map);
    prefetch_tensor_map(params.v_tma.map);
    if (params.seqlens_q.num_rows > 0) {
      prefetch_tensor_map(params.q_tma.map);
      prefetch_tensor_map(params.dout_tma.map);
    }
    shared.k_ring.init(1, kBwdConsumers * 4);
    shared.v_ring.init(1, kBwdConsumers * 4);
    shared.q_ring.init(1, Config::Cluster::kCtas * kBwdConsumers * 4);
    shared.dout_ring.init(1, Config::Cluster::kCtas * kBwdConsumers * 4);
    for (auto& ring : shared.dq_ring) ring.init(4, 1);
    if constexpr (Config::kPaired) init_pair_barriers(shared);
    fence_mbarrier_init();
  }
  if constexpr (Config::kPaired) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp < 4) {
    decrease_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      if (elect_one()) produce_tiles<Config>(params, shared);
    } else if (warp <= kBwdConsumers) {
      if constexpr (Config::kWantsDq) {
        if (elect_one()) write_dq<Config>(params, shared, warp - 1);
      }
    } else if constexpr (Config::kPaired) {
      if (elect_one()) produce_keys_of_pair<Config>(params, shared);
    }
  } else {
    increase_registers<Config::kConsumerRegisters>();
    consume_tiles<Config>(params, shared, warp / 4 - 1);
  }
  // The peer may still copy into this CTA's shared memory, or arrive at its barriers.
  if constexpr (Config::kPaired) cluster_sync();
}

// kernel: the variant's entry, an instance of flash_bwd_sm90<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_bwd(Kernel* kernel, BwdParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BwdStorage<Config>);
  static_assert(kSharedBytes <= kBwdMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");

  const SeqlenParams &of_q = params.seqlens_q, &of_k = params.seqlens_k;
  const bool packed = of_k.cu_seqlens != nullptr;
  const int num_keys = min_of(params.key_end, of_k.num_rows) - params.key_begin;  // of a sequence
  const int num_groups = Config::Tiles::kListed ? num_ordered_tiles(of_k.num_rows, Config::kBlockN)
                         : packed               ? num_slots(of_k.num_rows, params.batch, Config::kItemKeys)
                                                : ceil_div(num_keys, Config::kItemKeys);
  const int grid_batch = packed ? 1 : params.batch;
  const int64_t num_items = int64_t(num_groups) * params.num_heads_kv * grid_batch;
  if (num_items == 0 || of_k.num_rows == 0) return cudaSuccess;
  // Item numbers are ints, and the last round goes past the end.
  if (num_items + 2 * params.num_ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  // What the tiles of keys of one head read again and again: Q and dO of its query heads, and their sums of dQ.
  const int64_t bytes_per_row = (params.head_dim + params.head_dim_v) * 2 + params.head_dim * 4;
  const int64_t rows = packed ? ceil_div(of_q.num_rows, params.batch) : of_q.num_rows;
  params.schedule = make_schedule(num_groups, grid_batch, params.num_heads_kv, params.num_heads_kv,
                                  rows * bytes_per_row * (params.num_heads / params.num_heads_kv));

  const auto encode = [&](TmaTensor* map, const void* base, const RowStrides& strides, const SeqlenParams& seqlens, bool ragged,
                          int heads, int columns, int box_rows) {
    if (seqlens.num_rows == 0) return cudaSuccess;  // nothing is copied, and maps of empty tensors do not exist
    return encode_tma_rows(map, {base, strides, grid_batch, seqlens.num_rows, heads, columns, box_rows}, ragged);
  };
  // Copies of a tile end where the sequence ends, not where the tensor does.
  const bool ragged_q = of_q.cu_seqlens != nullptr || of_q.seqused != nullptr;
  const bool ragged_k = packed || of_k.seqused != nullptr || params.key_end < of_k.num_rows;
  cudaError_t status = encode(&params.k_tma, params.k, params.k_strides, of_k, ragged_k, params.num_heads_kv, params.head_dim,
                              Config::kBlockN);
  if (status == cudaSuccess) {
    status = encode(&params.v_tma, params.v, params.v_strides, of_k, ragged_k, params.num_heads_kv, params.head_dim_v,
                    Config::kBlockN);
  }
  if (status == cudaSuccess) {
    status = encode(&params.q_tma, params.q, params.q_strides, of_q, ragged_q, params.num_heads, params.head_dim,
                    Config::kBlockM);
  }
  if (status == cudaSuccess) {
    status = encode(&params.dout_tma, params.dout, params.dout_strides, of_q, ragged_q, params.num_heads, params.head_dim_v,
                    Config::kBlockM);
  }
  if (status != cudaSuccess) return status;

  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  // Its own status, not cudaGetLastError(): that would blame this launch for an earlier call's error.
  void* arguments[] = {&params};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Config::Cluster::kCtas, 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(params.num_ctas);
  launch.blockDim = dim3(Config::kNumThreads);
  launch.dynamicSmemBytes = kSharedBytes;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = Config::kPaired ? 1 : 0;
  return cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace flash_ext::sm90
