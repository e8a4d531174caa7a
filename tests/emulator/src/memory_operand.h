// What ld, st, atom, red and the copies share: address operands and the packed mode of an access.
#pragma once

#include "decode.h"
#include "state.h"

namespace flash_ext::emulator {

struct MemoryMode {
  Space space = Space::kGeneric;
  Scope scope = Scope::kWeak;
  Order order = Order::kRelaxed;
  uint32_t vector = 1;
  bool wide = true;  // the base register has 64-bit lanes
};

constexpr uint32_t pack_mode(const MemoryMode& mode) {
  return mode.vector | static_cast<uint32_t>(mode.space) << 8 | static_cast<uint32_t>(mode.scope) << 12 |
         static_cast<uint32_t>(mode.order) << 16 | static_cast<uint32_t>(mode.wide) << 20;
}
constexpr MemoryMode unpack_mode(uint32_t bits) {
  return {static_cast<Space>(bits >> 8 & 0xf), static_cast<Scope>(bits >> 12 & 0xf),
          static_cast<Order>(bits >> 16 & 0xf), bits & 0xff, (bits >> 20 & 1) != 0};
}
// Space, scope and order as the opcode's parts say.
MemoryMode decode_mode(Decoder& d);

// Inst::b is the base and Inst::imm the offset of every address operand.
inline void lane_addresses(const Warp& w, const Inst& i, uint64_t* addresses) {
  if (i.aux >> 20 & 1) {
    const uint64_t* base = in<uint64_t>(w, i.b);
    for (int l = 0; l < kLanes; ++l) addresses[l] = base[l] + static_cast<uint64_t>(i.imm);
  } else {
    const uint32_t* base = in<uint32_t>(w, i.b);
    for (int l = 0; l < kLanes; ++l) addresses[l] = base[l] + static_cast<uint32_t>(i.imm);
  }
}

Status zero_u64(Warp& w, const Inst& i, Mask mask);

}  // namespace flash_ext::emulator
