// One CTA's shared memory as the tensor units see it, and the swizzle that wgmma and TMA share.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace flash_ext::emulator {

// data[a] is the byte at shared address a (an offset in the CTA's own shared window).
struct SharedView {
  uint8_t* data;
  uint32_t size;
};

struct ByteRange {
  uint32_t begin;
  uint32_t size;
  bool operator==(const ByteRange&) const = default;
};

// An operand that the hardware would not accept; the interpreter adds kernel, line and warp.
struct OperandFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Swizzle : uint8_t { kNone, k32B, k64B, k128B };

// Bytes after which the pattern moves on to the next row of 16-byte chunks.
constexpr uint32_t swizzle_span(Swizzle mode) { return 16u << static_cast<int>(mode); }

// Permutes the 16-byte chunks of a span; works on absolute shared addresses. `base_offset` names
// the 128-byte line at which the pattern starts (0: the pattern is aligned to its own size).
constexpr uint32_t swizzle_address(Swizzle mode, uint32_t address, uint32_t base_offset = 0) {
  const uint32_t chunk_mask = (1u << static_cast<int>(mode)) - 1;  // 0, 1, 3 or 7
  const uint32_t line = (address >> 7) - base_offset;
  return address ^ ((line & chunk_mask) << 4);
}

}  // namespace flash_ext::emulator
