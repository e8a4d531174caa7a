// Mask policy: which keys a query position sees. Each mask shows an interval [visible_begin, visible_end) of key positions
// whose ends never decrease with the query; tiles.cuh derives from that which tiles are visited and which of them hide
// keys element by element. rows_begin and rows_end are the inverse: the query positions that see a key.
#pragma once

#include <type_traits>

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

// Rows [begin, end) of a packed tensor.
struct alignas(8) Interval {
  int begin;
  int end;
};

struct MaskParams {
  int window_left;   // keys to the left of the diagonal; -1: all; at most kMaxWindow
  int window_right;  // to its right
  const Interval* keys_of;     // (total_q), the keys that each query sees; neither end ever decreases; or null
  const Interval* queries_of;  // (total_k), the queries that see each key, the same; or null
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

// Several short sequences taken as one: tables tell what of the whole each row sees. They are not trusted: nothing outside the
// sequence is named.
struct SegmentMask {
  static constexpr bool kBeginMoves = true, kEndMoves = true;
  const Interval* keys_of;
  const Interval* queries_of;
  FX_HOST_DEVICE constexpr explicit SegmentMask(const MaskParams& params) : keys_of(params.keys_of), queries_of(params.queries_of) {}
  // Rows beyond the sequence, which stand for none, see what the last one sees.
  FX_HOST_DEVICE static constexpr const Interval& entry(const Interval* table, int row, const RowRange& own) {
    return table[own.first_row + clamp(row, 0, own.num_rows - 1)];
  }
  FX_HOST_DEVICE constexpr int visible_begin(int row, const Sequence& s) const {
    return clamp(entry(keys_of, row, s.q).begin - s.k.first_row, 0, s.k.num_rows);
  }
  FX_HOST_DEVICE constexpr int visible_end(int row, const Sequence& s) const {
    return clamp(entry(keys_of, row, s.q).end - s.k.first_row, 0, s.k.num_rows);
  }
  FX_HOST_DEVICE constexpr int rows_begin(int key, const Sequence& s) const {
    return clamp(entry(queries_of, key, s.k).begin - s.q.first_row, 0, s.q.num_rows);
  }
  FX_HOST_DEVICE constexpr int rows_end(int key, const Sequence& s) const {
    return clamp(entry(queries_of, key, s.k).end - s.q.first_row, 0, s.q.num_rows);
  }
};

// The accumulators of one row of a thread's fragment (fragment.cuh) whose columns are outside [begin, end), columns counted
// from the thread's first: bit p for the p-th of the row. Hiding keys tests bits, eight of which become predicates by one
// instruction (R2P), instead of comparing columns. The bits of what is hidden, for what is shown would be their complement,
// which the compiler never makes but tests bit by bit.
template <int kNumAcc>
struct HiddenBits {
  using Word = std::conditional_t<(kNumAcc / 2 > 32), uint64_t, uint32_t>;
  static_assert(kNumAcc / 2 < 64, "the bits fit a word, and a shift past all of them is defined");

  FX_HOST_DEVICE static constexpr Word from(int end) {
    const int column = clamp(end, 0, 2 * kNumAcc);
    const int position = 2 * (column / 8) + min_of(column % 8, 2);  // columns come in pairs, eight apart
    return static_cast<Word>(~uint64_t{0} << position);
  }
  FX_HOST_DEVICE static constexpr Word outside(int begin, int end) { return from(end) | ~from(begin); }
};

#ifdef __CUDACC__
// Scores of hidden keys become -inf. hidden: of the thread's two rows.
template <int kNumAcc>
__device__ __forceinline__ void hide_keys(float (&acc_s)[kNumAcc], const typename HiddenBits<kNumAcc>::Word (&hidden)[2]) {
  using Word = typename HiddenBits<kNumAcc>::Word;
  // Row by row, in the order of the bits.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int p = 0; p < kNumAcc / 2; ++p) {
      if ((hidden[half] & Word{1} << p) != 0) acc_s[acc_at(half, p)] = -INFINITY;
    }
  }
}
#endif

}  // namespace flash_ext
