// Seqlens policy: how long the sequences of a batch entry are and where its rows begin.
#pragma once

#include "common/math.cuh"
#include "common/params.h"

namespace flash_ext {

// One batch entry. Rows are coordinates of the tensors' seqlen dimension, batches of their batch dimension.
struct Sequence {
  int seqlen_q;
  int seqlen_k;
  int first_row_q;
  int first_row_k;
  int batch_q;
  int batch_k;
};

// (batch, seqlen, heads, dim) tensors whose entries all have full length.
struct DenseSeqlens {
  FX_HOST_DEVICE static constexpr Sequence sequence(const FwdParams& params, int batch) {
    return {params.seqlen_q, params.seqlen_k, 0, 0, batch, batch};
  }
};

}  // namespace flash_ext
