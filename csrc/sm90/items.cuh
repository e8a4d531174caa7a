// What the forwards of this architecture share: the items of a persistent CTA, and what a consumer knows of a tile of keys.
#pragma once

#include "common/masks.cuh"
#include "common/params.h"
#include "common/scheduler.cuh"
#include "common/tiles.cuh"
#include "common/work.cuh"

namespace flash_ext::sm90 {

constexpr int kMaxSharedBytes = 227 * 1024;

// Work policy: the items of the call's schedule, each with all the keys that its queries see.
struct ScheduledWork {
  __device__ __forceinline__ static int num_items(const FwdParams& params) { return params.schedule.num_items(); }
  template <int kBlockM>
  __device__ __forceinline__ static QueryTile query_tile(const FwdParams& params, int index, int lane) {
    return warp_query_tile<kBlockM>(params, params.schedule.item(index), lane);
  }
  __device__ __forceinline__ static KeyTiles part_of(const FwdParams&, const QueryTile&, const KeyTiles& tiles) {
    return tiles;
  }
};

// The items of one CTA in order, the same for every role, by converged warps: function(queries, tiles of keys).
template <class Config, class Function>
__device__ __forceinline__ void for_each_item(const typename Config::Params& params, int lane, Function&& function) {
  using Work = typename Config::Work;
  const int num_items = Work::num_items(params);
  for (int round = 0;; ++round) {
    const int index = Schedule::index(round, blockIdx.x, gridDim.x);
    if (index >= num_items) return;
    if constexpr (Config::Tiles::kListed) {
      static_assert(kMaskBlock % Config::kBlockM == 0, "a tile of queries lies in one block");
      const QueryTile queries = warp_query_tile<Config::kBlockM>(params, listed_item<Config::kBlockM>(params, index), lane);
      if (!queries.exists()) continue;
      function(queries, ListedTiles<Config::kBlockN>::of_line(params.blocks, queries.index, queries.head(0),
                                                              queries.first_position / kMaskBlock));
    } else {
      const QueryTile queries = Work::template query_tile<Config::kBlockM>(params, index, lane);
      if (!queries.exists()) continue;
      const KeyTiles tiles = Config::Tiles::template key_tiles<Config::kBlockN>(
          typename Config::Mask(params.mask), queries.sequence, queries.first_position, queries.last_position(Config::kBlockM));
      function(queries, Work::part_of(params, queries, tiles));
    }
  }
}

// What `step` needs to know of a tile of keys.
struct UnmaskedTile {
  template <int kNumAcc>
  __device__ __forceinline__ void hide(float (&)[kNumAcc]) const {}
};
template <int kNumAcc>
struct MaskedTile {
  typename HiddenBits<kNumAcc>::Word hidden[2];  // of the thread's rows
  __device__ __forceinline__ void hide(float (&acc_s)[kNumAcc]) const { hide_keys(acc_s, hidden); }
};

}  // namespace flash_ext::sm90
