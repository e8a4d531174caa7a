// Pairs of CTAs: places in the peer's shared memory, arrivals at its mbarriers, copies into it and into both.
#pragma once

#include "sm90/primitives.cuh"

namespace flash_ext::sm90 {

// The address, in the cluster's window, of what lies at `address` in the shared memory of CTA `rank`.
__device__ __forceinline__ uint32_t address_in_cta(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// All threads of the cluster: what they wrote or announced before is known to all after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// An arrival at a barrier of any CTA of the cluster (address_in_cta).
__device__ __forceinline__ void mbarrier_arrive_in_cluster_if(uint32_t barrier, bool predicate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\n}" ::"r"(
          barrier),
      "r"(static_cast<int>(predicate))
      : "memory");
}
// mbarrier_wait for a barrier at which threads of the peer arrive.
__device__ __forceinline__ void mbarrier_wait_for_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// tma_load into the same place of every CTA in `ctas` (bit r: rank r); completes the bytes on each one's barrier.
__device__ __forceinline__ void tma_load_multicast(const TensorMap& map, uint64_t* barrier, void* destination,
                                                   const int (&coordinates)[5], uint16_t ctas, CacheHint hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;"
      ::"r"(shared_address(destination)), "l"(&map), "r"(shared_address(barrier)), "r"(coordinates[0]),
      "r"(coordinates[1]), "r"(coordinates[2]), "r"(coordinates[3]), "r"(coordinates[4]), "h"(ctas),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// Bytes of this CTA's shared memory into another's, whose barrier then counts them.
__device__ __forceinline__ void bulk_send(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(destination), "r"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace flash_ext::sm90
