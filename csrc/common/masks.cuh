// Mask policy: which keys a query position sees. Each mask shows an interval [visible_begin, visible_end) of key positions
// whose ends never decrease with the query; tiles.cuh derives from that which tiles are visited and which of them hide
// keys element by element. rows_begin and rows_end are the inverse: the query positions that see a key.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

struct MaskParams {
  int window_left;   // keys to the left of the diagonal; -1: all; at most kMaxWindow
  int window_right;  // to its right
};
constexpr int kMaxWindow = (1 << 30) - 1;  // reaches across every sequence; sums of positions and windows stay ints

struct FullMask {
  // Whether rows of one sequence differ in where their interval begins or ends.
  static constexpr bool kBeginMoves = false, kEndMoves = false;
  FX_HOST_DEVICE constexpr explicit FullMask(const MaskParams&) {}
  FX_HOST_DEVICE static constexpr int visible_begin(int /*row*/, const Sequence&) { return 0; }
  FX_HOST_DEVICE static constexpr int visible_end(int /*row*/, const Sequence& s) { return s.k.num_rows; }
  FX_HOST_DEVICE static constexpr int rows_begin(int /*key*/, const Sequence&) { return 0; }
  FX_HOST_DEVICE static constexpr int rows_end(int /*key*/, const Sequence& s) { return s.q.num_rows; }
};

// Aligned bottom-right: the last query sees every key.
struct CausalMask {
  static constexpr bool kBeginMoves = false, kEndMoves = true;
  FX_HOST_DEVICE constexpr explicit CausalMask(const MaskParams&) {}
  FX_HOST_DEVICE static constexpr int visible_begin(int /*row*/, const Sequence&) { return 0; }
  FX_HOST_DEVICE static constexpr int visible_end(int row, const Sequence& s) {
    return clamp(row + 1 + s.diagonal, 0, s.k.num_rows);
  }
  FX_HOST_DEVICE static constexpr int rows_begin(int key, const Sequence& s) {
    return clamp(key - s.diagonal, 0, s.q.num_rows);
  }
  FX_HOST_DEVICE static constexpr int rows_end(int /*key*/, const Sequence& s) { return s.q.num_rows; }
};

// A sliding window, either side of it bounded or not: the most general of these masks.
struct LocalMask {
  static constexpr bool kBeginMoves = true, kEndMoves = true;
  int left, right;
  FX_HOST_DEVICE constexpr explicit LocalMask(const MaskParams& params)
      : left(params.window_left < 0 ? kMaxWindow : params.window_left),
        right(params.window_right < 0 ? kMaxWindow : params.window_right) {}
  FX_HOST_DEVICE constexpr int visible_begin(int row, const Sequence& s) const {
    return clamp(row + s.diagonal - left, 0, s.k.num_rows);
  }
  FX_HOST_DEVICE constexpr int visible_end(int row, const Sequence& s) const {
    return clamp(row + s.diagonal + right + 1, 0, s.k.num_rows);
  }
  FX_HOST_DEVICE constexpr int rows_begin(int key, const Sequence& s) const {
    return clamp(key - s.diagonal - right, 0, s.q.num_rows);
  }
  FX_HOST_DEVICE constexpr int rows_end(int key, const Sequence& s) const {
    return clamp(key - s.diagonal + left + 1, 0, s.q.num_rows);
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
