// Where the rows of a sequence lie in a cache of keys or values: one (sequences, rows, heads, dim) tensor, or pages.
#pragma once

#include "common/math.cuh"
#include "common/seqlens.cuh"

namespace flash_ext {

// Nothing in device memory is trusted: place_of never names a block or row outside the cache.
struct KvPlaces {
  const int* page_table;   // (batch, pages) int32: the page of rows [i * rows, (i + 1) * rows) of a sequence; null: dense
  const int* batch_index;  // (batch) int32: a sequence's entry of a dense cache; null: the entry of its number
  int64_t page_table_stride;
  int num_blocks;  // pages, or entries of a dense cache
  int rows;        // of a page, or of an entry
  int capacity;    // rows that a sequence can have
  Divisor by_rows;
};

struct KvPlace {
  int block;
  int row;      // in the block
  bool exists;  // false: an index was out of range, and the place is another row's
};

// num_blocks and capacity are above zero.
FX_HOST_DEVICE constexpr KvPlace place_of(const KvPlaces& places, int sequence, int row) {
  const int inside = clamp(row, 0, places.capacity - 1);
  int block = sequence, offset = inside;
  if (places.page_table != nullptr) {
    const int page = places.by_rows.divide(inside);
    block = places.page_table[sequence * places.page_table_stride + page];
    offset = inside - page * places.rows;
  } else if (places.batch_index != nullptr) {
    block = places.batch_index[sequence];
  }
  const int existing = clamp(block, 0, places.num_blocks - 1);
  return {existing, offset, inside == row && existing == block};
}

}  // namespace flash_ext
