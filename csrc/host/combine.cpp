// Op body of combine: the results of the parts of each sequence's keys become one.
#include <torch/csrc/stable/library.h>

#include <climits>

#include "host/check.h"
#include "host/emulator.h"
#include "host/kvcache.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"

namespace flash_ext {

void combine(Tensor out_partial, Tensor lse_partial, Tensor part_begin, std::optional<Tensor> sinks, Tensor out, Tensor lse) {
  using TorchType = torch::headeronly::ScalarType;
  FX_CHECK(out.dim() == 4 && out_partial.dim() == 4 && lse_partial.dim() == 3 && lse.dim() == 3,
           "combine: out and out_partial must have 4 dimensions, lse and lse_partial 3");
  const int64_t batch = out.size(0), seqlen_q = out.size(1), num_heads = out.size(2), head_dim_v = out.size(3);
  const int64_t parts = out_partial.size(0);
  FX_CHECK(out_partial.size(1) == num_heads && out_partial.size(2) == seqlen_q && out_partial.size(3) == head_dim_v &&
               lse_partial.size(0) == parts && lse_partial.size(1) == num_heads && lse_partial.size(2) == seqlen_q &&
               out_partial.scalar_type() == TorchType::Float && lse_partial.scalar_type() == TorchType::Float &&
               out_partial.is_contiguous() && lse_partial.is_contiguous(),
           "combine: partial results must be contiguous float32 of shape (parts, num_heads, seqlen_q[, head_dim_v])");
  FX_CHECK(lse.size(0) == batch && lse.size(1) == num_heads && lse.size(2) == seqlen_q &&
               lse.scalar_type() == TorchType::Float && lse.is_contiguous(),
           "combine: lse must be contiguous float32 of shape (batch, num_heads, seqlen_q)");
  FX_CHECK(part_begin.dim() == 1 && part_begin.size(0) == batch + 1 && part_begin.scalar_type() == TorchType::Int &&
               part_begin.is_contiguous(),
           "combine: part_begin must be int32 of shape (batch + 1)");
  FX_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == num_heads && sinks->scalar_type() == TorchType::Float &&
                      sinks->is_contiguous()),
           "combine: sinks must be float32 of shape (num_heads)");
  FX_CHECK(head_dim_v % 8 == 0 && why_copied(layout_of(out), scalar_type_of(out)) == nullptr &&
               reinterpret_cast<uintptr_t>(out_partial.data_ptr()) % 16 == 0,
           "combine: rows must be multiples of 16 bytes");
  FX_CHECK(parts <= INT_MAX, "combine: too many parts, got ", parts);
  const Variant* variant = plan_kvcache_step(Op::k_combine, scalar_type_of(out), head_dim_v, device_info_of(out));
  FX_CHECK(variant != nullptr, "combine: this build has no kernel for ", dtype_name(scalar_type_of(out)), " and head_dim_v ",
           head_dim_v, " on this GPU");
  if (out.numel() == 0) return;

  OpMemory memory;
  memory.add(out_partial, MemoryRole::kIn, "out_partial");
  memory.add(lse_partial, MemoryRole::kIn, "lse_partial");
  memory.add(part_begin, MemoryRole::kIn, "part_begin");
  if (sinks) memory.add(*sinks, MemoryRole::kIn, "sinks");
  memory.add(out, MemoryRole::kOut, "out");
  memory.add(lse, MemoryRole::kOut, "lse");

  CombineParams params{};
  params.out_partial = static_cast<const float*>(out_partial.data_ptr());
  params.lse_partial = static_cast<const float*>(lse_partial.data_ptr());
  params.part_begin = static_cast<const int*>(part_begin.data_ptr());
  params.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  params.out_strides = row_strides_of(out);
  params.batch = static_cast<int>(batch);
  params.num_heads = static_cast<int>(num_heads);
  params.seqlen_q = static_cast<int>(seqlen_q);
  params.head_dim_v = static_cast<int>(head_dim_v);
  params.max_parts = static_cast<int>(parts);
  params.dependent = variant->arch == 90;
  const LaunchScope scope(out);
  FX_CUDA_CHECK(find_combine(variant->name)(params, scope.stream()), variant->name);
}

}  // namespace flash_ext
