// What the op bodies of the forwards have in common.
#pragma once

#include "host/device.h"
#include "host/tensor.h"

namespace flash_ext {

// (parts,) batch, seqlen_q, heads, head_dim_v, or packed; not initialised.
Tensor new_out(const FwdProblem& problem, const Tensor& q, torch::headeronly::ScalarType dtype);
// (parts,) batch, heads, seqlen_q, or packed, float32.
Tensor new_lse(const FwdProblem& problem, const Tensor& q);

// The results' pointers and strides. max_logit without elements: not asked for.
void fill_results(FwdParams* params, const FwdProblem& problem, const Tensor& out, const Tensor& lse, const Tensor& max_logit);

// Rows of q that no sequence shows: out 0, lse -inf.
void fill_unused_rows(const FwdParams& params, const DeviceInfo& device, cudaStream_t stream);

}  // namespace flash_ext
