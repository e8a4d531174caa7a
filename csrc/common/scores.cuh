// Score policy: what happens to q.k before the softmax.
#pragma once

#include <cfloat>

#include "common/math.cuh"

namespace flash_ext {

// softmax_scale * q.k, by folding the scale and log2(e) into the argument of exp2. The online softmax needs a scale
// above zero (a maximum of scores must be the maximum of scaled scores, and -inf * 0 is NaN), so a negative scale flips
// the signs of Q in shared memory and a zero scale clears it: exact, and free for everybody else.
struct FoldedScale {
  float log2_scale;      // > 0
  uint32_t q_keep_bits;  // Q, two elements at a time, becomes (q & keep) ^ flip
  uint32_t q_flip_bits;

  FX_HOST_DEVICE constexpr bool changes_q() const {
    return q_keep_bits != 0xffffffffu || q_flip_bits != 0;
  }
};

FX_HOST_DEVICE constexpr FoldedScale fold_scale(float softmax_scale) {
  const float magnitude = softmax_scale < 0 ? -softmax_scale : softmax_scale;
  const float log2_scale = min_of(magnitude, FLT_MAX / kLog2e) * kLog2e;
  if (log2_scale == 0) return {1.f, 0, 0};
  return {log2_scale, 0xffffffffu, softmax_scale < 0 ? 0x80008000u : 0};
}

}  // namespace flash_ext
