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
  int full_groups;      // groups of that size; one smaller group may follow
  Divisor by_group_items, by_group_heads, by_last_group_heads, by_num_heads;

  FX_HOST_DEVICE constexpr int num_items() const { return num_m_blocks * total_heads; }

  FX_HOST_DEVICE constexpr WorkItem item(int index) const {
    const int group = by_group_items.divide(index);
    const int first_head = group * heads_per_group;
    const int within = index - first_head * num_m_blocks;
    const bool full = group < full_groups;
    const int rank = (full ? by_group_heads : by_last_group_heads).divide(within);
    const int head = first_head + within - rank * (full ? heads_per_group : total_heads - first_head);
    const int batch = by_num_heads.divide(head);
    return {num_m_blocks - 1 - rank, head - batch * num_heads, batch};
  }

  // Index of the item that a CTA takes in a round; at or beyond num_items() its work is done.
  FX_HOST_DEVICE static constexpr int index(int round, int cta, int num_ctas) {
    return round * num_ctas + (round % 2 == 0 ? cta : num_ctas - 1 - cta);
  }
};

// K and V of a group fit this many bytes: most of an H100's or H200's 50 MB, shared with Q and the outputs.
constexpr int64_t kCacheBudgetBytes = 32 << 20;

// Every count is at least 1, and there are fewer than 2^31 items.
constexpr Schedule make_schedule(int num_m_blocks, int batch, int num_heads, int num_heads_kv,
                                 int64_t kv_bytes_per_head) {
  const int q_heads_per_kv = num_heads / num_heads_kv;
  const int total = batch * num_heads;
  const int64_t kv_heads = max_of<int64_t>(1, kCacheBudgetBytes / max_of<int64_t>(1, kv_bytes_per_head));
  const int heads = static_cast<int>(min_of<int64_t>(kv_heads * q_heads_per_kv, total));
  return {num_m_blocks,
          num_heads,
          total,
          heads,
          total / heads,
          make_divisor(heads * num_m_blocks),
          make_divisor(heads),
          make_divisor(max_of(1, total % heads)),
          make_divisor(num_heads)};
}

}  // namespace flash_ext
