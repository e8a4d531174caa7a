// Tensor maps for TMA. The driver's encoder is looked up at the first use, so that importing needs no driver.
#pragma once

#include <cuda_runtime_api.h>

#include "common/params.h"

namespace flash_ext {

// A (batch, rows, heads, columns) tensor of 16-bit elements and the box that one copy moves: box_rows rows of one slab
// of 64 columns, 128-byte swizzled. Elements beyond the tensor read as zero.
struct TmaTensorSpec {
  const void* base;    // 16-byte aligned
  RowStrides strides;  // in elements, multiples of 8; of a dimension of size 1 they do not matter; 0 is allowed
  int batch;
  int rows;
  int heads;
  int columns;
  int box_rows;  // at most 256
};

// For copies of rows of one head (sm90/copies.cuh, load_rows). ragged: rows of a box beyond the end of the caller's range of
// rows read as zero too, though the tensor goes on: the box is the map's whole second dimension, which a copy enters at the
// row that leaves as many rows as the range has; a fifth dimension of the same stride then says where the range ends.
// cudaErrorInvalidValue: the driver refuses the tensor. cudaErrorInsufficientDriver: no driver, or one too old.
cudaError_t encode_tma_rows(TmaTensor* tensor, const TmaTensorSpec& spec, bool ragged);

// For copies of a tile of queries (load_queries): box_rows / box_heads rows of box_heads neighbouring heads of the `group` heads
// that share a KV head; heads beyond the group read as zero. Heads alternate fastest.
cudaError_t encode_tma_queries(TmaTensor* tensor, const TmaTensorSpec& spec, int group, int box_heads);

}  // namespace flash_ext
