// Position in a ring of shared-memory stages, and the pair of mbarriers that guards each stage.
#pragma once

#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

// The ring position of one role. The phase bit flips with every trip round the ring.
template <int kStages>
struct RingState {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if constexpr (kStages == 2) {
      phase ^= stage;
      stage ^= 1;
    } else if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // The stage before; its phase is not told.
  __device__ __forceinline__ RingState before() const { return {(stage == 0 ? kStages : stage) - 1, 0}; }
};

// full[s]: 1 arrival (the producer's expect_tx) and the bytes of the copies, or the arrivals of the threads that copied;
// consumers wait.
// empty[s]: one arrival per consumer warp, when its reads of the stage are done; the producer waits.
template <int kStages>
struct RingBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  __device__ __forceinline__ void init(int num_producers, int num_consumer_warps) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], num_producers);
      mbarrier_init(&empty[s], num_consumer_warps);
    }
  }
  // Producer: waits until the stage is free (at once on the first trip), then announces the bytes to come.
  __device__ __forceinline__ void begin_fill(const RingState<kStages>& state, uint32_t bytes) {
    mbarrier_wait(&empty[state.stage], state.phase ^ 1);
    mbarrier_arrive_expect_tx(&full[state.stage], bytes);
  }
  __device__ __forceinline__ void wait_full(const RingState<kStages>& state) {
    mbarrier_wait(&full[state.stage], state.phase);
  }
  __device__ __forceinline__ void release(const RingState<kStages>& state, bool elected) {
    mbarrier_arrive_if(&empty[state.stage], elected);
  }
};

}  // namespace flash_ext::sm90
