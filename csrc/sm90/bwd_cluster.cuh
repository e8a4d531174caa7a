// The exchange of dS between the two CTAs of a pair (bwd.cuh, CtaPair). Both visit the same tiles of queries, and each adds
// its share of dQ over the keys of both: one reduction to memory instead of two. docs/bwd_sm90.md has timeline and barriers.
//
// dQ of a tile is formed during the next one, so that what the peer sends has a trip's time to arrive, and neither CTA
// waits for the other while they are less than that apart.
#pragma once

#include "sm90/bwd_tiles.cuh"
#include "sm90/cluster.cuh"
#include "sm90/copies.cuh"
#include "sm90/pipeline.cuh"

namespace flash_ext::sm90 {

// Which tiles' dQ a CTA of a pair forms. Every role counts the tiles of queries of all its items, in the state of a ring of
// two stages as that of Q: stage 0 are the even ones.
template <class Config>
struct DqTurns {
  // Whether this CTA forms dQ of the tile.
  __device__ __forceinline__ static bool is_mine(const RingState<2>& tile) {
    return Config::kDqShare != DqShare::kEveryOtherTile || tile.stage == static_cast<int>(rank_in_pair<Config>());
  }
  // The first block of its dQ; a block for each consumer follows.
  __device__ __forceinline__ static int first_block() {
    return Config::kDqShare == DqShare::kHalfColumns ? rank_in_pair<Config>() * kBwdConsumers : 0;
  }
  // Phase bit of the exchange's barriers: each is used once a tile, or once in two.
  __device__ __forceinline__ static uint32_t phase(const RingState<2>& tile) {
    return Config::kDqShare == DqShare::kEveryOtherTile ? tile.phase : tile.stage;
  }
};

// A consumer thread's side.
template <class Config>
struct DsExchange {
  using Turns = DqTurns<Config>;
  BwdStorage<Config>& shared;
  const RingState<Config::kStagesQ>& tile;
  int warpgroup;
  bool elected;  // lane 0

  static constexpr bool kEveryOtherTile = Config::kDqShare == DqShare::kEveryOtherTile;

  __device__ __forceinline__ static uint32_t in_peer(const void* place) {
    return address_in_cta(shared_address(place), rank_in_pair<Config>() ^ 1);
  }
  // The bytes to come, before anybody waits for them.
  __device__ __forceinline__ void expect_peer(bool by_me) {
    if (by_me) mbarrier_arrive_expect_tx(&shared.pair.peer_ds_full, Config::kScoreTileBytes);
  }

  // kEveryOtherTile: the stage of dS that this tile is written to: 0 stays here, 1 is sent.
  __device__ __forceinline__ uint32_t begin_write() {
    const uint32_t stage = Turns::is_mine(tile) ? 0 : 1;
    mbarrier_wait_for_cluster(&shared.pair.empty[stage], Turns::phase(tile) ^ 1);
    return stage;
  }
  // A warp's rows, from this byte of the tile on, are written: consumers own keys, so its rows lie together.
  __device__ __forceinline__ void end_write(uint32_t stage, uint32_t warp_rows, bool first_warp) {
    static_assert(num_slabs(Config::kBlockM) == 1, "a warp's rows are one piece");
    fence_async_proxy();
    __syncwarp();
    if (stage == 0) {
      expect_peer(elected && first_warp);
      mbarrier_arrive_if(&shared.pair.ds_full, elected);
    } else if (elected) {
      bulk_send(in_peer(shared.peer.ds) + warp_rows, shared_address(shared.ds[1]) + warp_rows, kRowsPerWarp * kSlabRowBytes,
                in_peer(&shared.pair.peer_ds_full));
    }
  }
  // kHalfColumns: all of dS is written and fenced.
  __device__ __forceinline__ void send(int stage, bool by_me) {
    if (by_me) {
      expect_peer(true);
      mbarrier_wait_for_cluster(&shared.pair.empty[1], Turns::phase(tile) ^ 1);
      bulk_send(in_peer(shared.peer.ds), shared_address(shared.ds[stage]), Config::kScoreTileBytes,
                in_peer(&shared.pair.peer_ds_full));
    }
    __syncwarp();
  }

  // Both CTAs' dS are there: of this tile, or of the one before (kEveryOtherTile).
  __device__ __forceinline__ void wait() {
    const uint32_t phase = kEveryOtherTile ? tile.phase ^ tile.stage ^ 1 : Turns::phase(tile);
    if constexpr (kEveryOtherTile) mbarrier_wait(&shared.pair.ds_full, phase);
    mbarrier_wait_for_cluster(&shared.pair.peer_ds_full, phase);
  }
  // The products that read them are complete.
  __device__ __forceinline__ void release() {
    if constexpr (kEveryOtherTile) mbarrier_arrive_if(&shared.pair.empty[0], elected);
    mbarrier_arrive_in_cluster_if(in_peer(&shared.pair.empty[1]), elected);
  }
};

template <class Config>
__device__ __forceinline__ void init_pair_barriers(BwdStorage<Config>& shared) {
  mbarrier_init(&shared.pair.ds_full, kBwdConsumers * 4);
  mbarrier_init(&shared.pair.peer_ds_full, 1);
  mbarrier_init(&shared.pair.empty[0], kBwdConsumers * 4);
  mbarrier_init(&shared.pair.empty[1], kBwdConsumers * 4);
}

// A stage that both CTAs fill together, half each: it is free when the consumers of both are done with it.
template <int kStages>
__device__ __forceinline__ void begin_fill_in_pair(RingBarriers<kStages>& ring, const RingState<kStages>& state, uint32_t bytes) {
  mbarrier_wait_for_cluster(&ring.empty[state.stage], state.phase ^ 1);
  mbarrier_arrive_expect_tx(&ring.full[state.stage], bytes);
}
// Called by whole warps: lane r tells CTA r.
template <int kStages>
__device__ __forceinline__ void release_in_pair(RingBarriers<kStages>& ring, const RingState<kStages>& state, int lane) {
  mbarrier_arrive_in_cluster_if(address_in_cta(shared_address(&ring.empty[state.stage]), lane & 1), lane < 2);
}

}  // namespace flash_ext::sm90
