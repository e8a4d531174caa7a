// Op body of mask_blocks: dense masks -> kinds and bits of their blocks.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "common/block_list.cuh"
#include "host/check.h"
#include "host/emulator.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {

std::tuple<Tensor, Tensor> mask_blocks(Tensor mask) {
  using TorchType = torch::headeronly::ScalarType;
  FX_CHECK(mask.dim() == 3 && mask.scalar_type() == TorchType::Bool && mask.is_contiguous(),
           "mask_blocks: mask must be a contiguous bool tensor of 3 dimensions, got ", mask.dim(), " dimensions");
  const int64_t num_masks = mask.size(0), seqlen_q = mask.size(1), seqlen_k = mask.size(2);
  FX_CHECK(seqlen_q <= std::numeric_limits<int>::max() && seqlen_k <= std::numeric_limits<int>::max(),
           "mask_blocks: sequences must be shorter than 2^31, got ", seqlen_q, " and ", seqlen_k);
  const int64_t rows = ceil_div<int64_t>(seqlen_q, kMaskBlock), columns = ceil_div<int64_t>(seqlen_k, kMaskBlock);
  const int64_t kinds_sizes[] = {num_masks, rows, columns};
  const int64_t bits_sizes[] = {num_masks, rows, columns, 2, kMaskBlock, kMaskWords};
  Tensor kinds = torch::stable::new_empty(mask, kinds_sizes, TorchType::Byte);
  Tensor bits = torch::stable::new_empty(mask, bits_sizes, TorchType::Int);
  if (kinds.numel() == 0) return {kinds, bits};
  FX_CHECK(kinds.numel() <= std::numeric_limits<int>::max(), "mask_blocks: too many blocks for one grid, got ", kinds.numel());

  const Variant* variant = plan_mask_blocks(device_info_of(mask));
  FX_CHECK(variant != nullptr, "mask_blocks: this build has no kernel for this GPU");
  OpMemory memory;
  memory.add(mask, MemoryRole::kIn, "mask");
  memory.add(kinds, MemoryRole::kOut, "kinds");
  memory.add(bits, MemoryRole::kWorkspace, "bits");  // only what belongs to partial blocks is written
  const MaskBlocksParams params{.mask = static_cast<const uint8_t*>(mask.data_ptr()),
                                .kinds = static_cast<uint8_t*>(kinds.data_ptr()),
                                .bits = static_cast<uint32_t*>(bits.data_ptr()),
                                .num_masks = num_masks,
                                .seqlen_q = static_cast<int>(seqlen_q),
                                .seqlen_k = static_cast<int>(seqlen_k)};
  const LaunchScope scope(mask);
  FX_CUDA_CHECK(find_mask_blocks(variant->name)(params, scope.stream()), variant->name);
  return {kinds, bits};
}

}  // namespace flash_ext
