// Shared memory that tiles are made for.
#pragma once

namespace flash_ext::sm80 {

// What a CTA may have: 163 KB on 8.0 (and more on 9.0 and 10.0), 99 KB on 8.6, 8.9 and 12.0.
enum class SharedLimit { k163, k99 };
constexpr int bytes_of(SharedLimit limit) { return (limit == SharedLimit::k163 ? 163 : 99) * 1024; }

}  // namespace flash_ext::sm80
