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
#include "sm90/bwd_consumer.cuh"
#include "sm90/bwd_tiles.cuh"
#include "sm90/copies.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

// ---- producer: one thread ----

template <class Config>
__device__ __forceinline__ void produce_tiles(const BwdParams& params, BwdStorage<Config>& shared) {
  RingState<1> k_state, v_state;
  RingState<Config::kStagesQ> q_state;
  RingState<Config::kStagesDout> dout_state;

  for_each_key_item<Config>(params, [&](const KeyItem& item, const auto& tiles) {
    const Sequence& sequence = item.sequence;
    const int stats_row = stats_first_row(params, item.index);
    const int first_key = item.n_block * Config::kBlockN;
    shared.k_ring.begin_fill(k_state, Config::kKeyTileBytes);
    load_rows<Config::kBlockN, Config::kHeadDim>(params.k_tma, &shared.k_ring.full[0], shared.k, sequence.k, first_key,
                                                 item.head_kv, CacheHint::kEvictFirst);
    k_state.advance();

    const auto load_v = [&] {
      shared.v_ring.begin_fill(v_state, Config::kValueTileBytes);
      load_rows<Config::kBlockN, Config::kHeadDimV>(params.v_tma, &shared.v_ring.full[0], shared.v, sequence.k, first_key,
                                                    item.head_kv, CacheHint::kEvictFirst);
      v_state.advance();
    };
    bool first = true;
    for_each_query_tile<Config>(params, item, tiles, [&](int head, int m_block, const auto&) {
      const int row = m_block * Config::kBlockM;
      const int64_t stats = (int64_t(sequence.q.batch) * params.num_heads + head) * params.stats_rows + stats_row +
                            row;
      shared.q_ring.begin_fill(q_state, Config::kQueryTileBytes + Config::kStatsBytes);
      uint64_t* q_full = &shared.q_ring.full[q_state.stage];
      load_rows<Config::kBlockM, Config::kHeadDim>(params.q_tma, q_full, shared.q[q_state.stage], sequence.q, row, head,
                                                   CacheHint::kEvictLast);
      bulk_load(shared.lse_log2[q_state.stage], params.lse_log2 + stats, Config::kStatsBytes, q_full);
      q_state.advance();
      if (first) load_v();
      first = false;
      shared.dout_ring.begin_fill(dout_state, Config::kDoutTileBytes + Config::kStatsBytes);
      uint64_t* dout_full = &shared.dout_ring.full[dout_state.stage];
      load_rows<Config::kBlockM, Config::kHeadDimV>(params.dout_tma, dout_full, shared.dout[dout_state.stage], sequence.q,
                                                    row, head, CacheHint::kEvictLast);
      bulk_load(shared.delta[dout_state.stage], params.delta + stats, Config::kStatsBytes, dout_full);
      dout_state.advance();
    });
    if (first) load_v();
  });
}

// ---- dQ writers: one thread for each consumer ----

template <class Config>
__device__ __forceinline__ void write_dq(const BwdParams& params, BwdStorage<Config>& shared, int consumer) {
  RingState<1> state;
  for_each_key_item<Config>(params, [&](const KeyItem& item, const auto& tiles) {
    const Sequence& sequence = item.sequence;
    const int stats_row = stats_first_row(params, item.index);
    for_each_query_tile<Config>(params, item, tiles, [&](int head, int m_block, const auto& visit) {
      // In a deterministic sum, how many tiles of keys add to this tile of queries before this one.
      int turn = 0;
      if (params.dq_turns != nullptr) {
        if constexpr (Config::Tiles::kListed) {
          turn = listed_turn<Config::kBlockN>(params.blocks, visit, item.n_block);
        } else {
          const int first_row = m_block * Config::kBlockM;
          const int last_row = min_of(first_row + Config::kBlockM, sequence.q.num_rows) - 1;
          const auto before = Config::Tiles::template key_tiles<Config::kBlockN>(typename Config::Mask(params.mask), sequence,
                                                                                 first_row, last_row);
          turn = item.n_block - (before.end - before.num_tiles);
        }
      }
      for (int block = consumer; block < Config::kDqBlocks; block += kBwdConsumers) {
        const int64_t index = dq_block_index(
            int64_t(sequence.q.batch) * params.num_heads + head, params.stats_rows,
            (stats_row + m_block * Config::kBlockM) / kDqBlockRows + block / Config::kDqColumnBlocks,
            Config::kDqColumnBlocks, block % Config::kDqColumnBlocks);
        // Columns beyond head_dim are zeros, and stay here.
        const int bytes = dq_bytes_of_columns(params.head_dim - block % Config::kDqColumnBlocks * kDqBlockColumns);
        mbarrier_wait(&shared.dq_ring[consumer].full[0], state.phase);
        if (params.dq_turns != nullptr && bytes > 0) {
          wait_for_turn(params.dq_turns + index, turn);
          bulk_reduce_add(params.dq_blocks + index * kDqBlockFloats, shared.dq[consumer], bytes);
          bulk_commit();
          // The sum must be in memory before the next tile may add to it: that the source has been read says nothing.
          bulk_wait();
          pass_turn(params.dq_turns + index);
        } else if (params.dq_blocks != nullptr && bytes > 0) {  // else dQ is not wanted
          bulk_reduce_add(params.dq_blocks + index * kDqBlockFloats, shared.dq[consumer], bytes);
          bulk_commit();
          bulk_wait_read();
        }
        mbarrier_arrive(&shared.dq_ring[consumer].empty[0]);
        state.advance();
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
    shared.q_ring.init(1, kBwdConsumers * 4);
    shared.dout_ring.init(1, kBwdConsumers * 4);
    for (auto& ring : shared.dq_ring) ring.init(4, 1);
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    decrease_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      if (elect_one()) produce_tiles<Config>(params, shared);
    } else if (warp <= kBwdConsumers) {
      if constexpr (Config::kWantsDq) {
        if (elect_one()) write_dq<Config>(params, shared, warp - 1);
      }
    }
  } else {
    increase_registers<Config::kConsumerRegisters>();
    consume_tiles<Config>(params, shared, warp / 4 - 1);
  }
}

// kernel: the variant's entry, an instance of flash_bwd_sm90<Config>. Sizes, dtype and alignment have been checked.
template <class Config, class Kernel>
cudaError_t launch_bwd(Kernel* kernel, BwdParams params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BwdStorage<Config>);
  static_assert(kSharedBytes <= kBwdMaxSharedBytes, "a Hopper CTA has at most 227 KB of shared memory");

  const SeqlenParams &of_q = params.seqlens_q, &of_k = params.seqlens_k;
  const bool packed = of_k.cu_seqlens != nullptr;
  const int num_keys = min_of(params.key_end, of_k.num_rows) - params.key_begin;  // of a sequence
  const int num_n_blocks = packed ? num_slots(of_k.num_rows, params.batch, Config::kBlockN) : ceil_div(num_keys, Config::kBlockN);
  const int grid_batch = packed ? 1 : params.batch;
  const int64_t num_items = int64_t(num_n_blocks) * params.num_heads_kv * grid_batch;
  if (num_items == 0 || of_k.num_rows == 0) return cudaSuccess;
  // Item numbers are ints, and the last round goes past the end.
  if (num_items + 2 * params.num_ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  // What the tiles of keys of one head read again and again: Q and dO of its query heads, and their sums of dQ.
  const int64_t bytes_per_row = (params.head_dim + params.head_dim_v) * 2 + params.head_dim * 4;
  const int64_t rows = packed ? ceil_div(of_q.num_rows, params.batch) : of_q.num_rows;
  params.schedule = make_schedule(num_n_blocks, grid_batch, params.num_heads_kv, params.num_heads_kv,
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
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(params.num_ctas), dim3(Config::kNumThreads), arguments,
                          kSharedBytes, stream);
}

}  // namespace flash_ext::sm90
