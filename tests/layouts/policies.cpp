// The kernels' policies on the host: tile lists against the mask they stand for, the schedule against its promises, the
// folded scale. Prints what failed and returns how much.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "common/masks.cuh"
#include "common/scheduler.cuh"
#include "common/scores.cuh"
#include "common/tiles.cuh"

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

bool sees(FullMask, int, int, int, int) { return true; }
bool sees(CausalMask, int row, int key, int seqlen_q, int seqlen_k) { return key - row <= seqlen_k - seqlen_q; }

// Visited once, from the list's order; every visible pair covered; no tile without a visible pair; every tile after the
// masked ones is full; the end of each row.
template <class Mask, int kBlockM, int kBlockN>
void check_tiles(int seqlen_q, int seqlen_k) {
  const Sequence sequence{seqlen_q, seqlen_k, 0, 0, 0, 0};
  for (int m_block = 0; m_block * kBlockM < seqlen_q; ++m_block) {
    const TileRange list = PrefixTiles<Mask>::template tiles<kBlockM, kBlockN>(sequence, m_block);
    EXPECT(list.num_masked >= 0 && list.num_masked <= list.num_tiles, "%d x %d", seqlen_q, seqlen_k);
    EXPECT(PrefixTiles<Mask>::kManyMasked || list.num_masked <= 1, "%d x %d", seqlen_q, seqlen_k);
    const int num_n_blocks = ceil_div(seqlen_k, kBlockN);
    std::vector<int> visits(num_n_blocks, 0);
    for (int i = 0; i < list.num_tiles; ++i) {
      const int n_block = list.n_block(i);
      EXPECT(n_block >= 0 && n_block < num_n_blocks, "%d x %d: tile %d", seqlen_q, seqlen_k, n_block);
      if (n_block < 0 || n_block >= num_n_blocks) continue;
      EXPECT(++visits[n_block] == 1, "%d x %d: tile %d twice", seqlen_q, seqlen_k, n_block);
      if (i < list.num_masked) continue;
      for (int row = m_block * kBlockM; row < min_of((m_block + 1) * kBlockM, seqlen_q); ++row) {
        for (int key = n_block * kBlockN; key < (n_block + 1) * kBlockN; ++key) {
          EXPECT(key < seqlen_k && sees(Mask{}, row, key, seqlen_q, seqlen_k), "%d x %d: (%d, %d) in an unmasked tile",
                 seqlen_q, seqlen_k, row, key);
        }
      }
    }
    for (int n_block = 0; n_block < num_n_blocks; ++n_block) {
      bool any = false;
      for (int row = m_block * kBlockM; row < min_of((m_block + 1) * kBlockM, seqlen_q); ++row) {
        for (int key = n_block * kBlockN; key < min_of((n_block + 1) * kBlockN, seqlen_k); ++key) {
          const bool visible = sees(Mask{}, row, key, seqlen_q, seqlen_k);
          any |= visible;
          EXPECT(visible == (key < Mask::visible_end(row, seqlen_q, seqlen_k)), "%d x %d: end of row %d",
                 seqlen_q, seqlen_k, row);
        }
      }
      EXPECT(any == (visits[n_block] == 1), "%d x %d: rows of %d, tile %d", seqlen_q, seqlen_k, m_block, n_block);
    }
  }
}

void check_all_tiles() {
  const int lengths[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 95, 96, 97};
  for (int seqlen_q : lengths) {
    for (int seqlen_k : lengths) {
      check_tiles<FullMask, 16, 16>(seqlen_q, seqlen_k);
      check_tiles<FullMask, 24, 16>(seqlen_q, seqlen_k);
      check_tiles<CausalMask, 16, 16>(seqlen_q, seqlen_k);
      check_tiles<CausalMask, 24, 16>(seqlen_q, seqlen_k);
      check_tiles<CausalMask, 16, 22>(seqlen_q, seqlen_k);
    }
  }
  // The largest lengths: nothing overflows.
  constexpr int kMost = std::numeric_limits<int>::max();
  const Sequence longest{kMost, kMost, 0, 0, 0, 0};
  const int last = (kMost - 1) / 128;
  EXPECT((PrefixTiles<FullMask>::tiles<128, 128>(longest, last).num_tiles == last + 1), "longest");
  EXPECT((PrefixTiles<CausalMask>::tiles<128, 128>(longest, last).num_tiles == last + 1), "longest");
  EXPECT((PrefixTiles<CausalMask>::tiles<128, 128>(longest, 0).num_tiles == 1), "longest");
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
  check_schedules();
  check_divisors();
  check_scale();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
