#include "host/problem.h"

#include <stdexcept>

namespace flash_ext {

Pairs pairs_from_name(std::string_view name) {
  if (name == "auto") return Pairs::kByRule;
  if (name == "never") return Pairs::kNever;
  if (name == "always") return Pairs::kAlways;
  throw std::invalid_argument("FLASH_EXT_BWD_PAIRS must be auto, never or always, got '" + std::string(name) + "'");
}

int element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64: return 8;
    case ScalarType::kFloat32: return 4;
    case ScalarType::kFloat8E4m3: return 1;
    default: return 2;
  }
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64: return "float64";
    case ScalarType::kFloat32: return "float32";
    case ScalarType::kBFloat16: return "bfloat16";
    case ScalarType::kFloat8E4m3: return "float8_e4m3fn";
    default: return "float16";
  }
}

const char* op_name(Op op) {
  switch (op) {
    case Op::k_fwd: return "fwd";
    case Op::k_bwd: return "bwd";
    case Op::k_bwd_preprocess: return "bwd_preprocess";
    case Op::k_bwd_postprocess: return "bwd_postprocess";
    case Op::k_bwd_sinks: return "bwd_sinks";
    case Op::k_fill_unused: return "fill_unused";
    case Op::k_mask_blocks: return "mask_blocks";
    case Op::k_append_kv: return "append_kv";
    case Op::k_combine: return "combine";
    case Op::k_fwd_cache: return "fwd_cache";
    case Op::k_fwd_cache_gather: return "fwd_cache_gather";
    case Op::k_fwd_mla: return "fwd_mla";
    case Op::k_fwd_mla_gather: return "fwd_mla_gather";
    case Op::k_quantize_fp8: return "quantize_fp8";
    case Op::k_fwd_fp8: return "fwd_fp8";
    case Op::k_fwd_fp8_cache: return "fwd_fp8_cache";
    case Op::k_fwd_fp8_cache_gather: return "fwd_fp8_cache_gather";
  }
  return "";
}

const char* why_copied(const TensorLayout& layout, ScalarType dtype) {
  constexpr int kRowDim = 1;
  const int64_t elements = 16 / element_size(dtype);
  for (int dim = 0; dim < 3; ++dim) {
    if (layout.sizes[dim] > 1 && layout.strides[dim] % elements != 0) return "base and strides must be multiples of 16 bytes";
  }
  if (!layout.base_aligned) return "base and strides must be multiples of 16 bytes";
  if (layout.sizes[kRowDim] > 1 && layout.strides[kRowDim] == 0) return "rows must not share memory (seqlen stride 0)";
  return nullptr;
}

}  // namespace flash_ext
