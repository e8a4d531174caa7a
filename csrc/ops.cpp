// Binds the op bodies to the dispatcher. The schemas stand in flash_ext/ops.py, because the ops exist without this
// library too (CPU-only installs). FLASH_EXT_DISPATCH_KEY: CUDA, or CPU in the emulated build.
#include <torch/csrc/stable/library.h>

#include "host/ops.h"

STABLE_TORCH_LIBRARY_IMPL(flash_ext, FLASH_EXT_DISPATCH_KEY, library) {
  library.impl("fwd", TORCH_BOX(&flash_ext::fwd));
  library.impl("bwd", TORCH_BOX(&flash_ext::bwd));
  library.impl("bwd_preprocess", TORCH_BOX(&flash_ext::bwd_preprocess));
  library.impl("fwd_block_mask", TORCH_BOX(&flash_ext::fwd_block_mask));
  library.impl("bwd_block_mask", TORCH_BOX(&flash_ext::bwd_block_mask));
  library.impl("fwd_jagged", TORCH_BOX(&flash_ext::fwd_jagged));
  library.impl("bwd_jagged", TORCH_BOX(&flash_ext::bwd_jagged));
  library.impl("mask_blocks", TORCH_BOX(&flash_ext::mask_blocks));
  library.impl("kvcache", TORCH_BOX(&flash_ext::kvcache));
  library.impl("kvcache_fp8", TORCH_BOX(&flash_ext::kvcache_fp8));
  library.impl("append_kv", TORCH_BOX(&flash_ext::append_kv));
  library.impl("combine", TORCH_BOX(&flash_ext::combine));
  library.impl("fwd_fp8", TORCH_BOX(&flash_ext::fwd_fp8));
  library.impl("quantize_fp8", TORCH_BOX(&flash_ext::quantize_fp8));
}
