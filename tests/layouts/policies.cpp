// The kernels' policies on the host: tile lists against the mask they stand for, the schedule against its promises, the
// folded scale. Prints what failed and returns how much.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "common/fill_unused.cuh"
#include "common/masks.cuh"
#include "common/scheduler.cuh"
#include "common/scores.cuh"
#include "common/tiles.cuh"
#include "common/work.cuh"

namespace {

using namespace flash_ext;

int failures = 0;

#define EXPECT(condition, ...)      \
  do {                              \
    if (!(condition)) {             \
      ++failures;                   \
      std::printf("%s: ", #condition); \
      std::printf(__VA_ARGS__);     \
      std::printf("\n");            \
    }                               \
  } while (0)

constexpr MaskParams kAnyWindow{-1, -1};

// The definition, by distance from the diagonal.
bool sees(const FullMask&, int /*distance*/) { return true; }
bool sees(const CausalMask&, int distance) { return distance <= 0; }
bool sees(const LocalMask& mask, int distance) { return -mask.left <= distance && distance <= mask.right; }

// Visible pairs of one sequence, by the definition; a row for each query.
template <class Mask>
std::vector<std::vector<bool>> visible_pairs(const Mask& mask, const Sequence& sequence) {
  std::vector<std::vector<bool>> pairs(sequence.q.num_rows, std::vector<bool>(sequence.k.num_rows));
  for (int row = 0; row < sequence.q.num_rows; ++row) {
    for (int key = 0; key < sequence.k.num_rows; ++key) pairs[row][key] = sees(mask, key - row - sequence.diagonal);
  }
  return pairs;
}

// A part of the keys shows of each row what the whole shows of it there.
void check_part(const Sequence& whole, int begin, int end) {
  const Sequence part = with_keys_between(whole, begin, end);
  const auto of_whole = visible_pairs(LocalMask({3, 2}), whole), of_part = visible_pairs(LocalMask({3, 2}), part);
  const int first = part.k.first_row - whole.k.first_row;
  EXPECT(part.k.num_rows == max_of(0, min_of(end, whole.k.num_rows) - clamp(begin, 0, whole.k.num_rows)), "%d to %d", begin, end);
  for (int row = 0; row < whole.q.num_rows; ++row) {
    for (int key = 0; key < part.k.num_rows; ++key) {
      EXPECT(of_part[row][key] == of_whole[row][first + key], "keys %d to %d: (%d, %d)", begin, end, row, key);
    }
  }
}

// How many pairs of a tile are visible, rows and keys beyond the sequence left out.
struct Count {
  int visible = 0;
  int pairs = 0;
};
Count count(const std::vector<std::vector<bool>>& pairs, int row, int rows, int key, int keys) {
  Count found;
  for (int i = row; i < min_of<int>(row + rows, pairs.size()); ++i) {
    for (int j = key; j < min_of<int>(key + keys, pairs[i].size()); ++j) {
      ++found.pairs;
      found.visible += pairs[i][j];
    }
  }
  return found;
}

// Intervals and their inverse are the mask's; every visible pair lies in a tile that is visited once, from either side; no
// tile is visited for nothing; tiles said to be full are.
template <class Mask, int kBlockM, int kBlockN>
void check_tiles(const Mask& mask, const Sequence& sequence) {
  using Tiles = RangeTiles<Mask>;
  const int seqlen_q = sequence.q.num_rows, seqlen_k = sequence.k.num_rows;
  const auto pairs = visible_pairs(mask, sequence);
  for (int row = 0; row < seqlen_q; ++row) {
    for (int key = 0; key < seqlen_k; ++key) {
      const bool by_row = mask.visible_begin(row, sequence) <= key && key < mask.visible_end(row, sequence);
      const bool by_key = mask.rows_begin(key, sequence) <= row && row < mask.rows_end(key, sequence);
      EXPECT(by_row == pairs[row][key] && by_key == pairs[row][key], "%d x %d: (%d, %d)", seqlen_q, seqlen_k, row, key);
    }
  }
  for (int m_block = 0; m_block * kBlockM < seqlen_q; ++m_block) {
    const int first_row = m_block * kBlockM, last_row = min_of(first_row + kBlockM, seqlen_q) - 1;
    const KeyTiles tiles = Tiles::template key_tiles<kBlockN>(mask, sequence, first_row, last_row);
    EXPECT(0 <= tiles.num_masked && tiles.num_masked <= tiles.full_end && tiles.full_end <= tiles.num_tiles, "%d x %d",
           seqlen_q, seqlen_k);
    EXPECT(Tiles::kManyMasked || tiles.num_masked <= 1, "%d x %d", seqlen_q, seqlen_k);
    EXPECT(Tiles::kMaskedLeft || tiles.full_end == tiles.num_tiles, "%d x %d", seqlen_q, seqlen_k);
    std::vector<int> visits(ceil_div(seqlen_k, kBlockN), 0);
    for (int i = 0; i < tiles.num_tiles; ++i) {
      const int n_block = tiles.n_block(i);
      EXPECT(n_block >= 0 && n_block < int(visits.size()), "%d x %d: tile %d", seqlen_q, seqlen_k, n_block);
      if (n_block < 0 || n_block >= int(visits.size())) continue;
      EXPECT(++visits[n_block] == 1, "%d x %d: tile %d twice", seqlen_q, seqlen_k, n_block);
      if (i < tiles.num_masked || i >= tiles.full_end) continue;
      const Count found = count(pairs, first_row, kBlockM, n_block * kBlockN, kBlockN);
      EXPECT(found.visible == (last_row - first_row + 1) * kBlockN, "%d x %d: tile (%d, %d) is not full", seqlen_q,
             seqlen_k, m_block, n_block);
    }
    for (int n_block = 0; n_block < int(visits.size()); ++n_block) {
      const bool any = count(pairs, first_row, kBlockM, n_block * kBlockN, kBlockN).visible > 0;
      EXPECT(any == (visits[n_block] == 1), "%d x %d: tile (%d, %d)", seqlen_q, seqlen_k, m_block, n_block);
    }
  }
  for (int n_block = 0; n_block * kBlockN < seqlen_k; ++n_block) {
    const QueryTiles tiles = Tiles::template query_tiles<kBlockM, kBlockN>(mask, sequence, n_block);
    EXPECT(0 <= tiles.begin && tiles.begin <= tiles.full_begin && tiles.full_begin <= tiles.full_end && tiles.full_end <= tiles.end,
           "%d x %d", seqlen_q, seqlen_k);
    for (int m_block = 0; m_block * kBlockM < seqlen_q; ++m_block) {
      const Count found = count(pairs, m_block * kBlockM, kBlockM, n_block * kBlockN, kBlockN);
      const bool visited = tiles.begin <= m_block && m_block < tiles.end;
      EXPECT(visited == (found.visible > 0), "%d x %d: tile (%d, %d), backward", seqlen_q, seqlen_k, m_block, n_block);
      const bool full = tiles.full_begin <= m_block && m_block < tiles.full_end;
      const bool whole = (n_block + 1) * kBlockN <= seqlen_k;
      EXPECT(full == (whole && found.visible == found.pairs), "%d x %d: full tile (%d, %d), backward", seqlen_q, seqlen_k,
             m_block, n_block);
    }
  }
}

template <class Mask>
void check_tile_sizes(const MaskParams& params, const Sequence& sequence) {
  const Mask mask(params);
  check_tiles<Mask, 16, 16>(mask, sequence);
  check_tiles<Mask, 24, 16>(mask, sequence);
  check_tiles<Mask, 16, 22>(mask, sequence);
}

void check_all_tiles() {
  const int lengths[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 65, 97};
  const int windows[] = {-1, 0, 1, 9, 16, 40};
  for (int seqlen_q : lengths) {
    for (int seqlen_k : lengths) {
      const Sequence whole{{0, seqlen_q, 0}, {0, seqlen_k, 0}, seqlen_k - seqlen_q};
      check_part(whole, seqlen_k / 3, seqlen_k - 5);
      for (const Sequence& sequence : {whole, with_keys_between(whole, seqlen_k / 3, seqlen_k - 5)}) {
        check_tile_sizes<FullMask>(kAnyWindow, sequence);
        check_tile_sizes<CausalMask>(kAnyWindow, sequence);
        for (int left : windows) {
          for (int right : windows) check_tile_sizes<LocalMask>({left, right}, sequence);
        }
      }
    }
  }
  // The largest lengths: nothing overflows.
  constexpr int kMost = kMaxWindow;
  for (int seqlen_q : {1, kMost}) {
    for (int seqlen_k : {1, kMost}) {
      const Sequence longest{{0, seqlen_q, 0}, {0, seqlen_k, 0}, seqlen_k - seqlen_q};
      const int last_row = seqlen_q - 1, all = ceil_div(seqlen_k, 128);
      EXPECT((RangeTiles<FullMask>::key_tiles<128>(FullMask(kAnyWindow), longest, last_row, last_row).num_tiles == all), "longest");
      EXPECT((RangeTiles<CausalMask>::key_tiles<128>(CausalMask(kAnyWindow), longest, last_row, last_row).num_tiles == all),
             "longest");
      for (int window : {-1, kMaxWindow}) {
        const LocalMask mask({window, window});
        EXPECT((RangeTiles<LocalMask>::key_tiles<128>(mask, longest, last_row, last_row).num_tiles == all), "longest");
        EXPECT((RangeTiles<LocalMask>::query_tiles<128, 128>(mask, longest, 0).end == ceil_div(seqlen_q, 128)), "longest");
      }
    }
  }
}

// Packed sequences, and numbers in device memory that nobody has checked.
void check_sequences() {
  const int garbage[][5] = {{0, 3, 3, 40, 64}, {5, 2, 90, -7, 1 << 30}, {64, 0, 64, 0, 64}, {0, 0, 0, 0, 0}, {-9, 70, 10, 20, 63}};
  constexpr int kBatch = 4, kTotal = 64, kBlock = 8;
  const int used[] = {2, -1, 1 << 30, 20}, pads[] = {1, 1 << 30, -3, 4};
  for (const auto& cu_seqlens : garbage) {
    for (int with = 0; with < 4; ++with) {
      const SeqlenParams params{cu_seqlens, with & 1 ? used : nullptr, with & 2 ? pads : nullptr, kTotal};
      for (int b = 0; b < kBatch; ++b) {
        const RowRange rows = rows_of_sequence(params, b);
        EXPECT(rows.first_row >= 0 && rows.num_rows >= 0 && rows.first_row + rows.num_rows <= kTotal && rows.batch == 0,
               "sequence %d: rows %d + %d", b, rows.first_row, rows.num_rows);
        const int slot = first_slot(params, b, kBlock);
        EXPECT(slot >= 0 && slot * kBlock + rows.num_rows <= num_slots(kTotal, kBatch, kBlock) * kBlock, "slot %d", slot);
      }
    }
  }
  const int lengths[] = {0, 3, 0, 17, 8, 0, 1, 16};
  int cu_seqlens[9] = {};
  for (int b = 0; b < 8; ++b) cu_seqlens[b + 1] = cu_seqlens[b] + lengths[b];
  const SeqlenParams params{cu_seqlens, nullptr, nullptr, cu_seqlens[8]};
  std::vector<int> blocks(8, 0);
  for (int slot = 0; slot < num_slots(cu_seqlens[8], 8, kBlock); ++slot) {
    const SequenceBlock found = block_at_slot(params, 8, kBlock, slot);
    if (found.block * kBlock >= lengths[found.index]) continue;
    EXPECT(found.block == blocks[found.index]++, "slot %d: block %d of sequence %d", slot, found.block, found.index);
  }
  for (int b = 0; b < 8; ++b) EXPECT(blocks[b] == ceil_div(lengths[b], kBlock), "sequence %d has %d blocks", b, blocks[b]);
}

// The bits of hidden columns against the columns themselves, for every thread of a row and every interval.
template <int kNumAcc>
void check_hidden_bits() {
  constexpr int kColumns = 2 * kNumAcc;
  for (int thread = 0; thread < 4; ++thread) {
    for (int begin = -9; begin <= kColumns + 9; ++begin) {
      for (int end = begin; end <= kColumns + 9; ++end) {
        const int first = acc_first_col(thread);
        const uint64_t outside = HiddenBits<kNumAcc>::outside(begin - first, end - first);
        const uint64_t from = HiddenBits<kNumAcc>::from(end - first);
        for (int i = 0; i < kNumAcc; ++i) {
          const int column = acc_col(thread, i), bit = acc_position(i);
          EXPECT(acc_at(acc_half(i), bit) == i, "accumulator %d", i);
          EXPECT((outside >> bit & 1) == (column < begin || column >= end), "column %d outside [%d, %d)", column, begin, end);
          EXPECT((from >> bit & 1) == (column >= end), "column %d from %d", column, end);
        }
      }
    }
  }
}

// Every query of every head and part belongs to one row of one item, packed or not, with one head a tile or more; items
// of no sequence do not exist.
void check_work(int group, int heads_per_tile, bool packed, int num_splits) {
  constexpr int kBlockM = 16, kHeadsKv = 2, kBatch = 5;
  const int lengths[kBatch] = {0, 7, 40, 1, 16}, pads[kBatch] = {0, 2, 0, 1, 3};
  int cu_seqlens[kBatch + 1] = {3};
  for (int b = 0; b < kBatch; ++b) cu_seqlens[b + 1] = cu_seqlens[b] + lengths[b];
  FwdParams params{};
  params.batch = kBatch;
  params.num_heads = group * kHeadsKv;
  params.num_heads_kv = kHeadsKv;
  params.head_dim = params.head_dim_v = 64;
  params.heads_per_tile = heads_per_tile;
  params.num_splits = num_splits;
  for (int part = 0; part <= num_splits; ++part) params.split_boundaries[part] = 10 * part;
  params.seqlens_q = packed ? SeqlenParams{cu_seqlens, nullptr, pads, cu_seqlens[kBatch] + 4} : SeqlenParams{nullptr, lengths, pads, 41};
  params.seqlens_k = packed ? SeqlenParams{cu_seqlens, nullptr, nullptr, cu_seqlens[kBatch]} : SeqlenParams{nullptr, nullptr, nullptr, 10 * num_splits};
  const Schedule schedule = make_fwd_schedule(params, kBlockM);
  std::vector<int> visits(kBatch * params.num_heads * num_splits * 64, 0);
  for (int index = 0; index < schedule.num_items(); ++index) {
    const WorkItem item = schedule.item(index);
    const SequenceBlock block = packed ? block_at_slot(params.seqlens_q, kBatch, kBlockM / heads_per_tile, item.m_block)
                                       : dense_block(params, item);
    const QueryTile tile = query_tile(params, item, block, kBlockM);
    if (!tile.exists()) continue;
    const int shown = max_of(0, lengths[tile.index] - pads[tile.index]);
    EXPECT(tile.sequence.q.num_rows == shown, "sequence %d has %d rows", tile.index, tile.sequence.q.num_rows);
    int last = -1;
    for (int row = 0; row < kBlockM; ++row) {
      if (!tile.holds(row)) continue;
      last = max_of(last, tile.position(row));
      EXPECT(tile.position(row) < 64 && tile.head(row) < params.num_heads && tile.head(row) / group == tile.head_kv, "item %d", index);
      EXPECT(tile.existing_head(row) == tile.head(row), "item %d", index);
      ++visits[((tile.index * params.num_heads + tile.head(row)) * num_splits + tile.part) * 64 + tile.position(row)];
    }
    EXPECT(last == tile.last_position(kBlockM), "item %d ends at %d", index, last);
    for (int row = 0; row < kBlockM; ++row) EXPECT(tile.existing_head(row) / group == tile.head_kv, "item %d", index);
    if (num_splits > 1) EXPECT(tile.sequence.k.first_row == 10 * tile.part && tile.sequence.k.num_rows == 10, "part %d", tile.part);
  }
  for (int b = 0; b < kBatch; ++b) {
    for (int i = 0; i < params.num_heads * num_splits * 64; ++i) {
      const bool shown = i % 64 < max_of(0, lengths[b] - pads[b]);
      EXPECT(visits[b * params.num_heads * num_splits * 64 + i] == shown, "sequence %d, query %d", b, i % 64);
    }
  }
}

// Rows that no sequence shows, against the sequences' own ranges. What stands behind cu_seqlens is not its business.
void check_shown() {
  const int cu_seqlens[] = {2, 2, 9, 9, 20, 20, 24}, used[] = {0, 4, 3, 11, 0}, pads[] = {0, 1, 0, 2, 0};
  constexpr int kBatch = 5, kTotal = 24;
  for (int with = 0; with < 4; ++with) {
    const SeqlenParams params{cu_seqlens, with & 1 ? used : nullptr, with & 2 ? pads : nullptr, kTotal};
    std::vector<bool> shown(kTotal, false);
    for (int b = 0; b < kBatch; ++b) {
      const RowRange rows = rows_of_sequence(params, b);
      for (int row = 0; row < rows.num_rows; ++row) shown[rows.first_row + row] = true;
    }
    for (int row = 0; row < kTotal; ++row) EXPECT(is_shown(params, kBatch, 0, row) == shown[row], "row %d", row);
  }
  const SeqlenParams dense{nullptr, used, pads, 8};
  for (int row = 0; row < 8; ++row) EXPECT(is_shown(dense, kBatch, 1, row) == (row >= 1 && row < 4), "row %d", row);
}

// Every item once, whatever the number of CTAs; longer tiles never after shorter ones in a group of heads; query
// heads of one KV head together; and, for causal lengths, hardly any imbalance.
void check_schedule(int num_m_blocks, int batch, int num_heads, int num_heads_kv, int64_t kv_bytes, int num_ctas) {
  const Schedule schedule = make_schedule(num_m_blocks, batch, num_heads, num_heads_kv, kv_bytes);
  const int ratio = num_heads / num_heads_kv;
  EXPECT(schedule.heads_per_group % ratio == 0, "%d heads a group", schedule.heads_per_group);
  const int kv_heads = schedule.heads_per_group / ratio;
  EXPECT(kv_heads == 1 || kv_heads * kv_bytes <= kCacheBudgetBytes, "%d heads of %ld bytes", kv_heads, long(kv_bytes));
  std::vector<int> visits(schedule.num_items(), 0);
  std::vector<long> work(num_ctas, 0);
  for (int cta = 0; cta < num_ctas; ++cta) {
    for (int round = 0;; ++round) {
      const int index = Schedule::index(round, cta, num_ctas);
      if (index >= schedule.num_items()) break;
      const WorkItem item = schedule.item(index);
      EXPECT(item.m_block >= 0 && item.m_block < num_m_blocks, "item %d", index);
      EXPECT(item.head >= 0 && item.head < num_heads && item.batch >= 0 && item.batch < batch, "item %d", index);
      ++visits[(item.batch * num_heads + item.head) * num_m_blocks + item.m_block];
      work[cta] += item.m_block + 1;
      if (index > 0) {
        const WorkItem before = schedule.item(index - 1);
        const int head = item.batch * num_heads + item.head, head_before = before.batch * num_heads + before.head;
        const bool same_group = head / schedule.heads_per_group == head_before / schedule.heads_per_group;
        EXPECT(!same_group || item.m_block <= before.m_block, "item %d is longer than the one before", index);
      }
    }
  }
  for (int count : visits) EXPECT(count == 1, "an item is visited %d times", count);
  if (batch * num_heads <= schedule.heads_per_group) {
    long most = 0, least = std::numeric_limits<long>::max();
    for (long sum : work) most = max_of(most, sum), least = min_of(least, sum);
    EXPECT(most - least <= num_m_blocks, "%d m blocks, %d CTAs: work from %ld to %ld", num_m_blocks, num_ctas, least,
           most);
  }
}

void check_schedules() {
  for (int num_m_blocks : {1, 2, 5, 32}) {
    for (int batch : {1, 3}) {
      for (int num_heads_kv : {1, 3, 8}) {
        for (int ratio : {1, 4}) {
          for (int num_ctas : {1, 3, 131, 132}) {
            for (int64_t kv_bytes : {int64_t(0), int64_t(1) << 21, int64_t(1) << 24, int64_t(1) << 40}) {
              check_schedule(num_m_blocks, batch, num_heads_kv * ratio, num_heads_kv, kv_bytes, num_ctas);
            }
          }
        }
      }
    }
  }
}

void check_divisors() {
  const int most = std::numeric_limits<int>::max();
  for (int divisor : {1, 2, 3, 5, 6, 7, 31, 32, 33, 127, 128, 641, 65535, 65536, 65537, 1 << 30, most - 1, most}) {
    const Divisor by = make_divisor(divisor);
    const auto check = [&](int64_t n) {
      if (n < 0 || n > most) return;
      EXPECT(by.divide(static_cast<int>(n)) == n / divisor, "%ld / %d", static_cast<long>(n), divisor);
    };
    for (int n = 0; n < 3000; ++n) check(n), check(int64_t(most) - n);
    for (int64_t multiple = 0; multiple <= most; multiple += int64_t(divisor) * max_of(1, most / divisor / 1000)) {
      check(multiple - 1), check(multiple), check(multiple + divisor - 1);
    }
  }
}

void check_scale() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (float scale : {1.f, 0.125f, -0.125f, 0.f, -0.f, 1e-45f, -1e-45f, 3e38f, -3e38f, infinity}) {
    const FoldedScale folded = fold_scale(scale);
    EXPECT(folded.log2_scale > 0 && std::isfinite(folded.log2_scale), "scale %g gives %g", scale, folded.log2_scale);
    EXPECT(folded.changes_q() == !(scale > 0), "scale %g", scale);
    EXPECT((folded.q_keep_bits == 0) == (scale == 0), "scale %g", scale);
    EXPECT((folded.q_flip_bits == 0x80008000u) == (scale < 0), "scale %g", scale);
  }
  EXPECT(std::abs(fold_scale(0.5f).log2_scale - 0.5f * kLog2e) < 1e-7f, "scale 0.5");
}

}  // namespace

int main() {
  check_all_tiles();
  check_sequences();
  check_schedules();
  check_divisors();
  check_scale();
  check_hidden_bits<32>();
  check_hidden_bits<40>();
  check_hidden_bits<64>();
  check_hidden_bits<88>();
  for (bool packed : {false, true}) {
    for (int heads_per_tile : {1, 2, 4, 8}) {
      for (int group : {1, 3, 8, 11}) {
        for (int num_splits : {1, 3}) check_work(group, heads_per_tile, packed, packed ? 1 : num_splits);
      }
    }
  }
  check_shown();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
