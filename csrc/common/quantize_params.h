// What crosses to the kernel of flash_ext::quantize_fp8, and the rotation's numbers.
#pragma once

#include "common/params.h"

namespace flash_ext {

constexpr int kScaleRows = 64;  // rows of a block with one scale
constexpr float kE4m3Max = 448.f;
constexpr float kSmallestAmax = 0x1p-100f;

// Rows that share a scale: 64 of a head, all of a sequence's head, all of the tensor.
enum class ScaleOf : int { kBlock, kHead, kTensor };
// What a launch does: everything, or the largest elements, or the copy with scales from those.
enum class QuantizeStage : int { kBoth, kFindAmax, kWrite };

// The rotation of a row: sign flips, butterflies within blocks of columns, one factor.
struct Hadamard {
  int block;          // a power of two, at least 8
  float factor;       // block ** -0.5
  uint32_t flips[8];  // bit c of word w: column 32 w + c changes sign
};

// Whether a column changes sign before the butterflies: the top bit of splitmix64.
constexpr bool hadamard_flips(int head_dim, int column) {
  uint64_t x = uint64_t(1024 * head_dim + column) + 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return (x ^ (x >> 31)) >> 63;
}
// Columns that are mixed with one another.
constexpr int hadamard_block(int head_dim) { return head_dim & -head_dim; }
constexpr float hadamard_factor(int block) {
  float factor = 1.f;
  for (; block >= 4; block /= 4) factor /= 2;
  return block == 2 ? factor * 0.70710678118654752f : factor;
}

constexpr Hadamard make_hadamard(int head_dim) {
  Hadamard hadamard{hadamard_block(head_dim), hadamard_factor(hadamard_block(head_dim)), {}};
  for (int column = 0; column < head_dim; ++column) {
    hadamard.flips[column / 32] |= uint32_t(hadamard_flips(head_dim, column)) << column % 32;
  }
  return hadamard;
}

struct QuantizeFp8Params {
  const void* x;   // (batch, seqlen, num_heads, head_dim) bf16 or fp16, or packed (total, num_heads, head_dim); 16-byte rows
  void* out;       // e4m3, contiguous, the same shape
  float* descale;  // (batch, num_heads, num_slots), (num_sequences, num_heads), or one
  int* amax;       // float32 bits, as many as descale, 0 before the launch; null for block scales
  RowStrides x_strides;
  SeqlenParams seqlens;  // cu_seqlens and num_rows alone
  int batch;          // of x; 1 when packed
  int num_sequences;  // batch, or those of cu_seqlens
  int num_heads;
  int head_dim;   // a multiple of 8
  int num_slots;  // blocks of 64 rows of a batch entry, or slots of the packed tensor
  ScaleOf scale;
  QuantizeStage stage;  // the launcher fills it in
  bool rotates;
  Hadamard hadamard;
};

}  // namespace flash_ext
