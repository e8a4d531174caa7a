// Mask policy: which keys a query row sees. Today's masks show keys [0, end) where end never decreases with the row;
// tiles.cuh derives the tiles of a query tile from that, and edge tiles hide the other keys element by element.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"

namespace flash_ext {

struct FullMask {
  static constexpr bool kEndMoves = false;  // whether rows of one sequence differ in where their interval ends
  FX_HOST_DEVICE static constexpr int visible_end(int /*row*/, int /*seqlen_q*/, int seqlen_k) {
    return seqlen_k;
  }
};

// Aligned bottom-right: the last query sees every key.
struct CausalMask {
  static constexpr bool kEndMoves = true;
  FX_HOST_DEVICE static constexpr int visible_end(int row, int seqlen_q, int seqlen_k) {
    return max_of(0, min_of(seqlen_k, row + 1 + (seqlen_k - seqlen_q)));
  }
};

#ifdef __CUDACC__
// Scores of hidden keys become -inf. visible_end: of the thread's two rows, less the column of its first accumulator.
template <int kNumAcc>
__device__ __forceinline__ void hide_keys(float (&acc_s)[kNumAcc], const int (&visible_end)[2]) {
#pragma unroll
  for (int i = 0; i < kNumAcc; ++i) {
    if (acc_col_offset(i) >= visible_end[acc_half(i)]) acc_s[i] = -INFINITY;
  }
}
#endif

}  // namespace flash_ext
