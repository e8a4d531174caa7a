// Which (query tile, head, batch) a persistent CTA works on, round by round: a pure function, tested on the host.
//
// Work items are ordered so that K and V stay in L2 and the longest tiles come first: groups of heads outermost (as
// many as fit the cache budget), then query tiles from the last to the first, then the heads of the group, query heads
// of one KV head adjacent. CTAs take items in turn, in alternating direction (0 1 2 2 1 0 0 1 ...): with lengths that
// fall along the order, every CTA gets nearly the same sum.
#pragma once

#include "common/math.cuh"

namespace flash_ext {

struct WorkItem {
  int m_block;
  int head;
  int batch;
};

struct Schedule {
  int num_m_blocks;
  int num_heads;        // query heads
  int total_heads;      // batch * num_heads
  int heads_per_group;  // query heads whose K and V share the cache

  FX_HOST_DEVICE constexpr int num_items() const { return num_m_blocks * total_heads; }

  FX_HOST_DEVICE constexpr WorkItem item(int index) const {
    const int items_per_group = heads_per_group * num_m_blocks;
    const int group = index / items_per_group;
    const int first_head = group * heads_per_group;
    const int heads = min_of(heads_per_group, total_heads - first_head);
    const int within = index - group * items_per_group;
    const int rank = within / heads;
    const int head = first_head + within - rank * heads;
    return {num_m_blocks - 1 - rank, head % num_heads, head / num_heads};
  }

  // Index of the item that a CTA takes in a round; at or beyond num_items() its work is done.
  FX_HOST_DEVICE static constexpr int index(int round, int cta, int num_ctas) {
    return round * num_ctas + (round % 2 == 0 ? cta : num_ctas - 1 - cta);
  }
};

// K and V of a group fit this many bytes: most of an H100's or H200's 50 MB, shared with Q and the outputs.
constexpr int64_t kCacheBudgetBytes = 32 << 20;

FX_HOST_DEVICE constexpr Schedule make_schedule(int num_m_blocks, int batch, int num_heads,
                                                int num_heads_kv, int64_t kv_bytes_per_head) {
  const int q_heads_per_kv = num_heads / num_heads_kv;
  const int64_t kv_heads = max_of<int64_t>(1, kCacheBudgetBytes / max_of<int64_t>(1, kv_bytes_per_head));
  const int64_t heads = min_of<int64_t>(kv_heads * q_heads_per_kv, int64_t(batch) * num_heads);
  return {num_m_blocks, num_heads, batch * num_heads, static_cast<int>(heads)};
}

}  // namespace flash_ext
