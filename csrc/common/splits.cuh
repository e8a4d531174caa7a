// Split-KV: into how many parts the keys of each sequence go, so that all SMs have work of equal length. Decided from
// lengths that only the device knows, in the same functions on host and device; tested on the host.
//
// A CTA's item is one part of one tile of queries. With `target` tiles of keys to a part there are some number of items;
// persistent CTAs need ceil(items / num_ctas) rounds of them. Candidates are the targets that fill 1, 2, ... rounds; the
// cheapest wins, where an item costs kItemCost tiles more than its keys. Lengths that differ need many short items to even
// out, up to 32 rounds; where partial results are dear (several rows of queries, or wide rows, whose tiles have fewer keys), 8.
#pragma once

#include "common/math.cuh"
#include "common/seqlens.cuh"
#include "common/tiles.cuh"

namespace flash_ext {

constexpr int kMaxParts = 256;  // of one sequence
constexpr int kFewRounds = 8, kManyRounds = 32;  // the largest candidate
constexpr int kFewQueries = 8, kManyKeys = 128;  // at most so many rows, at least so many keys of a tile: many rounds
constexpr int kItemCost = 1;    // tiles of keys that starting and storing an item are worth
constexpr int kMinPartTiles = 2;  // of keys: shorter parts are not worth their combination

// What is known on the host.
struct SplitProblem {
  int batch;
  int items_per_part;  // tiles of queries of one sequence, over all heads
  int num_ctas;
  int num_splits;  // 0: chosen here
  int block_n;
  int seqlen_q;
  int window_left;   // -1: unbounded
};

// Tiles of keys that some row of a sequence with num_keys keys sees: the last row's are at the end.
FX_HOST_DEVICE constexpr int visible_tiles(const SplitProblem& problem, int num_keys) {
  if (num_keys <= 0) return 0;
  const int64_t first = problem.window_left < 0 ? 0 : int64_t(num_keys) - problem.seqlen_q - problem.window_left;
  return ceil_div(num_keys, problem.block_n) - static_cast<int>(max_of<int64_t>(0, first)) / problem.block_n;
}

// Parts of a sequence with this many tiles; target is the candidate's, or unused.
FX_HOST_DEVICE constexpr int num_parts(const SplitProblem& problem, int tiles, int target) {
  const int wanted = problem.num_splits > 0 ? problem.num_splits : ceil_div(tiles, target);
  return clamp(min_of(wanted, tiles), 1, kMaxParts);
}

FX_HOST_DEVICE constexpr int max_rounds(const SplitProblem& problem) {
  return problem.seqlen_q <= kFewQueries && problem.block_n >= kManyKeys ? kManyRounds : kFewRounds;
}

// 1, 2, ... 8, 12, 16, 24, 32.
FX_HOST_DEVICE constexpr int rounds_of(int candidate) {
  if (candidate < 8) return candidate + 1;
  return (12 + 4 * (candidate & 1)) << (candidate - 8) / 2;
}

FX_HOST_DEVICE constexpr int target_of(const SplitProblem& problem, int64_t total_tiles, int rounds) {
  const int64_t tiles = ceil_div(total_tiles * problem.items_per_part, int64_t(problem.num_ctas) * rounds);
  return static_cast<int>(max_of<int64_t>(tiles, kMinPartTiles));
}

// In tiles of keys: rounds of the longest item; or, where items differ, the CTAs' even share and one item more.
FX_HOST_DEVICE constexpr int64_t cost_of(const SplitProblem& problem, int64_t total_tiles, int64_t parts, int64_t longest) {
  const int64_t in_rounds = ceil_div(parts * problem.items_per_part, int64_t(problem.num_ctas)) * (longest + kItemCost);
  const int64_t work = (total_tiles + parts * kItemCost) * problem.items_per_part;
  return min_of(in_rounds, ceil_div(work, int64_t(problem.num_ctas)) + longest);
}

// The best target. sum(f) and max(f) are f(tiles of b) over all sequences b, by whatever threads there are.
template <class Sum, class Max>
FX_HOST_DEVICE constexpr int choose_target(const SplitProblem& problem, const Sum& sum, const Max& max) {
  const int64_t total = sum([](int tiles) { return int64_t(tiles); });
  int best = kMinPartTiles;
  int64_t least = INT64_MAX;
  for (int candidate = 0; rounds_of(candidate) <= max_rounds(problem); ++candidate) {
    const int target = target_of(problem, total, rounds_of(candidate));
    const int64_t parts = sum([&](int tiles) { return int64_t(num_parts(problem, tiles, target)); });
    const int64_t longest =
        max([&](int tiles) { return int64_t(ceil_div(tiles, num_parts(problem, tiles, target))); });
    const int64_t cost = cost_of(problem, total, parts, longest);
    if (cost < least) least = cost, best = target;
  }
  return best;
}

// At most this many parts in all, whatever the lengths: room for partial results. max_keys: capacity of a sequence.
FX_HOST_DEVICE constexpr int64_t max_total_parts(const SplitProblem& problem, int max_keys) {
  const int64_t tiles = max_of<int64_t>(1, ceil_div(int64_t(max_keys), int64_t(problem.block_n)));
  const int64_t each = clamp(static_cast<int>(min_of<int64_t>(
                                 tiles, problem.num_splits > 0 ? problem.num_splits : kMaxParts)),
                             1, kMaxParts);
  if (problem.num_splits > 0) return problem.batch * each;
  // parts of b <= tiles of b / target + 1, and target >= total * items / (ctas * rounds).
  const int64_t filling = int64_t(problem.num_ctas) * max_rounds(problem) / problem.items_per_part + 1;
  return min_of(problem.batch * each, problem.batch + filling);
}

// The tiles of one part, in the order of visits: parts differ by at most one tile.
FX_HOST_DEVICE constexpr KeyTiles tiles_of_part(const KeyTiles& tiles, int parts, int part) {
  const int each = tiles.num_tiles / parts, longer = tiles.num_tiles - each * parts;  // the first parts are one tile longer
  const int begin = part * each + min_of(part, longer), count = each + (part < longer ? 1 : 0);
  const int masked = clamp(tiles.num_masked - begin, 0, count);
  return {tiles.end - begin, count, masked, clamp(tiles.full_end - begin, masked, count)};
}

}  // namespace flash_ext
