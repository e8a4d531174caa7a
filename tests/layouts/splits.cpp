// Split-KV on the host: parts cover the tile list, the room for partial results is enough, SMs are kept busy; and the
// places of a cache. Prints what failed and returns how much.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "common/kv.cuh"
#include "common/splits.cuh"

namespace {

using namespace flash_ext;

int failures = 0;

#define EXPECT(condition, ...)         \
  do {                                 \
    if (!(condition)) {                \
      ++failures;                      \
      std::printf("%s: ", #condition); \
      std::printf(__VA_ARGS__);        \
      std::printf("\n");               \
    }                                  \
  } while (0)

std::vector<int> parts_of(const SplitProblem& problem, const std::vector<int>& lengths) {
  const auto sum = [&](const auto& f) {
    int64_t total = 0;
    for (int n : lengths) total += f(visible_tiles(problem, n));
    return total;
  };
  const auto max = [&](const auto& f) {
    int64_t largest = 0;
    for (int n : lengths) largest = std::max<int64_t>(largest, f(visible_tiles(problem, n)));
    return largest;
  };
  const int target = problem.num_splits > 0 ? 1 : choose_target(problem, sum, max);
  std::vector<int> parts;
  for (int n : lengths) parts.push_back(num_parts(problem, visible_tiles(problem, n), target));
  return parts;
}

// Tiles of keys, and kItemCost an item, that the busiest CTA works on when items are dealt out in rounds.
int64_t longest_round_trip(const SplitProblem& problem, const std::vector<int>& lengths, const std::vector<int>& parts) {
  int64_t items = 0, longest = 0;
  for (size_t b = 0; b < lengths.size(); ++b) {
    items += int64_t(parts[b]) * problem.items_per_part;
    longest = std::max<int64_t>(longest, ceil_div(visible_tiles(problem, lengths[b]), parts[b]));
  }
  return ceil_div(items, int64_t(problem.num_ctas)) * (longest + kItemCost);
}

void check_parts_cover_the_list() {
  std::mt19937 random(0);
  for (int trial = 0; trial < 3000; ++trial) {
    const int count = random() % 40, masked = count ? random() % (count + 1) : 0;
    const int full_end = masked + (count > masked ? random() % (count - masked + 1) : 0);
    const KeyTiles tiles{static_cast<int>(count + random() % 9), count, masked, full_end};
    const int parts = 1 + random() % 50;
    int visited = 0, least = count, most = 0;
    for (int part = 0; part < parts; ++part) {
      const KeyTiles mine = tiles_of_part(tiles, parts, part);
      least = std::min(least, mine.num_tiles), most = std::max(most, mine.num_tiles);
      EXPECT(0 <= mine.num_masked && mine.num_masked <= mine.full_end && mine.full_end <= mine.num_tiles, "trial %d", trial);
      for (int i = 0; i < mine.num_tiles; ++i, ++visited) {
        EXPECT(mine.n_block(i) == tiles.n_block(visited), "trial %d: tile %d", trial, i);
        const bool needs_mask = i < mine.num_masked || i >= mine.full_end;
        EXPECT(needs_mask == (visited < tiles.num_masked || visited >= tiles.full_end), "trial %d: tile %d", trial, i);
      }
    }
    EXPECT(visited == count, "trial %d: %d of %d", trial, visited, count);
    EXPECT(most - least <= 1, "trial %d: parts of %d to %d tiles", trial, least, most);
  }
}

void check_room_and_balance() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    const int batch = 1 + random() % (trial % 3 == 0 ? 200 : 9);
    const int longest = 1 << (random() % 18);
    std::vector<int> lengths;
    for (int b = 0; b < batch; ++b) lengths.push_back(random() % (longest + 1));
    const int num_splits = random() % 4 ? 0 : 1 + random() % 300;
    const int window = random() % 4 ? -1 : static_cast<int>(random() % 5000);
    const SplitProblem problem{batch, static_cast<int>(1 + random() % 64), static_cast<int>(1 + random() % 160),
                               num_splits, 64 << (random() % 2), static_cast<int>(1 + random() % 5), window};
    const std::vector<int> parts = parts_of(problem, lengths);
    int64_t total = 0;
    for (int b = 0; b < batch; ++b) {
      const int tiles = visible_tiles(problem, lengths[b]);
      total += parts[b];
      EXPECT(parts[b] >= 1 && parts[b] <= kMaxParts && parts[b] <= std::max(1, tiles), "trial %d: %d parts", trial, parts[b]);
      if (num_splits) EXPECT(parts[b] == std::max(1, std::min({num_splits, tiles, kMaxParts})), "trial %d", trial);
    }
    EXPECT(total <= max_total_parts(problem, longest), "trial %d: %d parts, room for %d", trial, int(total),
           int(max_total_parts(problem, longest)));
  }
}

// Against the best uniform target of all, by trying every one.
void check_choice_is_good() {
  for (const int ctas : {132, 78}) {
    for (const int items : {1, 2, 8, 16}) {
      for (const int batch : {1, 2, 3, 7, 16, 17, 33, 128}) {
        for (const int length : {100, 1000, 8192, 32768, 131072}) {
          const SplitProblem problem{batch, items, ctas, 0, 128, 1, -1};
          const std::vector<int> lengths(batch, length);
          const int64_t chosen = longest_round_trip(problem, lengths, parts_of(problem, lengths));
          int64_t best = INT64_MAX;
          for (int splits = 1; splits <= kMaxParts; ++splits) {
            SplitProblem fixed = problem;
            fixed.num_splits = splits;
            best = std::min(best, longest_round_trip(fixed, lengths, parts_of(fixed, lengths)));
          }
          // Parts of fewer than kMinPartTiles tiles are not considered.
          EXPECT(chosen * 100 <= best * 115 + 100 * kMinPartTiles, "%d CTAs, %d items, batch %d, %d keys: %d against %d", ctas,
                 items, batch, length, int(chosen), int(best));
        }
      }
    }
  }
}

// Lengths log-uniform from 1k to 128k, many rounds of items: the busiest CTA against an even share.
void check_mixed_lengths() {
  std::mt19937 random(2);
  for (const int items : {1, 2, 8}) {
    for (const int batch : {32, 67, 128, 256}) {
      const SplitProblem problem{batch, items, 132, 0, 128, 1, -1};
      std::vector<int> lengths;
      for (int b = 0; b < batch; ++b) lengths.push_back(1024 << (random() % 8));
      const std::vector<int> parts = parts_of(problem, lengths);
      std::vector<int64_t> load(problem.num_ctas);
      int64_t total = 0, item = 0;
      for (int b = 0; b < batch; ++b) {
        const KeyTiles tiles{visible_tiles(problem, lengths[b]), visible_tiles(problem, lengths[b]), 0, 0};
        for (int part = 0; part < parts[b]; ++part) {
          for (int i = 0; i < items; ++i, ++item) {
            const int count = tiles_of_part(tiles, parts[b], part).num_tiles;
            load[item % problem.num_ctas] += count + kItemCost, total += count;
          }
        }
      }
      const int64_t busiest = *std::max_element(load.begin(), load.end());
      EXPECT(busiest * problem.num_ctas * 100 <= total * 118, "%d items, batch %d: %d tiles against an even share of %d", items,
             batch, int(busiest), int(total / problem.num_ctas));
    }
  }
}

void check_visible_tiles() {
  for (int keys = -3; keys < 400; ++keys) {
    for (const int window : {-1, 0, 1, 63, 64, 200}) {
      for (const int rows : {1, 5}) {
        const SplitProblem problem{1, 1, 1, 0, 64, rows, window};
        int expected = 0;
        for (int tile = 0; tile * 64 < keys; ++tile) {
          bool seen = false;  // by row i, whose diagonal is keys - rows + i
          for (int i = 0; i < rows; ++i) {
            const int diagonal = keys - rows + i;
            seen = seen || window < 0 || (std::min(keys, tile * 64 + 64) - 1 >= diagonal - window);
          }
          expected += seen;
        }
        EXPECT(visible_tiles(problem, keys) == expected, "%d keys, window %d, %d rows: %d, expected %d", keys, window, rows,
               visible_tiles(problem, keys), expected);
      }
    }
  }
}

void check_places() {
  const int table[] = {4, 1, -1, 9, 0, 2};
  for (const int rows : {1, 3, 16}) {
    const KvPlaces places{table, nullptr, 3, 5, rows, 3 * rows, make_divisor(rows)};
    for (int row = -2; row < 3 * rows + 2; ++row) {
      for (int sequence = 0; sequence < 2; ++sequence) {
        const KvPlace place = place_of(places, sequence, row);
        const int inside = std::clamp(row, 0, 3 * rows - 1), page = table[3 * sequence + inside / rows];
        EXPECT(place.block == std::clamp(page, 0, 4) && place.row == inside % rows, "row %d of %d", row, rows);
        EXPECT(place.exists == (row == inside && page >= 0 && page < 5), "row %d of %d", row, rows);
      }
    }
  }
  const int index[] = {2, 7};
  const KvPlaces dense{nullptr, index, 0, 4, 10, 10, make_divisor(10)};
  EXPECT(place_of(dense, 0, 9).block == 2 && place_of(dense, 0, 9).row == 9 && place_of(dense, 0, 9).exists, "dense");
  EXPECT(place_of(dense, 1, 3).block == 3 && !place_of(dense, 1, 3).exists && !place_of(dense, 0, 10).exists, "dense");
}

}  // namespace

int main() {
  check_parts_cover_the_list();
  check_room_and_balance();
  check_choice_is_good();
  check_mixed_lengths();
  check_visible_tiles();
  check_places();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
