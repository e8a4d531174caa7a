#include "host/problem.h"

namespace flash_ext {

int element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64: return 8;
    case ScalarType::kFloat32: return 4;
    default: return 2;
  }
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64: return "float64";
    case ScalarType::kFloat32: return "float32";
    case ScalarType::kBFloat16: return "bfloat16";
    default: return "float16";
  }
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
