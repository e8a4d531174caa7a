// Shared-memory tiles as TMA writes them and wgmma reads them: columns in slabs of 128 bytes, rows of a slab packed 128
// bytes apart, 16-byte chunks permuted within groups of eight rows (the 128-byte swizzle). Slabs start at multiples of
// 1024 bytes, so that the permutation depends on the row alone. Index maps, compared with CuTe in tests/layouts.
#pragma once

#include "common/math.cuh"

namespace flash_ext {

constexpr int kSlabRowBytes = 128;
constexpr int kSwizzleGroupBytes = 8 * kSlabRowBytes;

// Acts on byte addresses; with 1024-byte aligned slabs, offsets serve as well.
FX_HOST_DEVICE constexpr uint32_t swizzle_128b(uint32_t address) {
  return address ^ ((address >> 3) & 0x70);
}

// Columns of a 16-bit tile in one slab.
constexpr int kSlabColumns = kSlabRowBytes / 2;
// The last slab of a tile may be used in part.
FX_HOST_DEVICE constexpr int num_slabs(int columns) { return ceil_div(columns, kSlabColumns); }

// Byte offset of element (row, col) of a 16-bit tile with `rows` rows.
FX_HOST_DEVICE constexpr uint32_t tile_offset(int rows, int row, int col) {
  return (col / kSlabColumns) * rows * kSlabRowBytes +
         swizzle_128b(row * kSlabRowBytes + (col % kSlabColumns) * 2);
}

// A wgmma matrix descriptor with the 128-byte swizzle. Only the low word moves with tile and step, and stepping is
// 32-bit addition: addresses are in units of 16 bytes and never carry out of their 14 bits.
struct WgmmaDescriptor {
  uint32_t low;   // start address / 16 + leading offset / 16 << 16
  uint32_t high;  // stride offset / 16 + swizzle mode << 30

  FX_HOST_DEVICE constexpr uint64_t at(uint32_t step) const {
    return uint64_t(high) << 32 | (low + step);
  }
};

// The same for every operand here. A kernel hides from the compiler that it is a constant where it would otherwise be
// set again for every wgmma.
constexpr uint32_t kDescriptorHigh = kSwizzleGroupBytes >> 4 | 1u << 30;

// Low word for Q and K: the contraction runs along the row (K-major), a swizzled layout ignores the leading offset.
FX_HOST_DEVICE constexpr uint32_t k_major_descriptor(uint32_t address) {
  return (address >> 4) + (1 << 16);
}
// The 16-column step `step` of a tile with `rows` rows.
FX_HOST_DEVICE constexpr uint32_t k_major_step(int rows, int step) {
  return (step / 4 * rows * kSlabRowBytes + step % 4 * 32) >> 4;
}

// Low word for V: the contraction runs down the rows (MN-major), the leading offset leads from slab to slab.
FX_HOST_DEVICE constexpr uint32_t mn_major_descriptor(uint32_t address, int rows) {
  return (address >> 4) + (rows * kSlabRowBytes >> 4 << 16);
}
// The 16-row step `step`.
FX_HOST_DEVICE constexpr uint32_t mn_major_step(int step) {
  return (step * 16 * kSlabRowBytes) >> 4;
}

}  // namespace flash_ext
