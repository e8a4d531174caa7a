// Shared memory that tiles are made for.
#pragma once

namespace flash_ext::sm80 {

// What a CTA may have: 163 KB on 8.0 (and more on 9.0 and 10.0), 99 KB on 8.6, 8.9 and 12.0.
enum class SharedLimit { k163, k99 };
constexpr int bytes_of(SharedLimit limit) { return (limit == SharedLimit::k163 ? 163 : 99) * 1024; }

// CTAs of the forward over a cache that an SM holds at once (fwd_cache.cuh): with 99 KB a CTA the SM has 100.
constexpr int cache_ctas_per_sm(SharedLimit limit, int head_dim) {
  return limit == SharedLimit::k163 && head_dim <= 128 ? 2 : 1;
}

}  // namespace flash_ext::sm80
