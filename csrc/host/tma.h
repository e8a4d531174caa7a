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

// cudaErrorInvalidValue: the driver refuses the tensor. cudaErrorInsufficientDriver: no driver, or one too old.
cudaError_t encode_tma_tensor(TmaTensor* tensor, const TmaTensorSpec& spec);

}  // namespace flash_ext
