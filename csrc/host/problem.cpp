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

bool rows_are_16_byte_aligned(const TensorLayout& layout, ScalarType dtype) {
  const int64_t elements = 16 / element_size(dtype);
  for (int dim = 0; dim < 3; ++dim) {
    if (layout.sizes[dim] > 1 && layout.strides[dim] % elements != 0) return false;
  }
  return layout.base_aligned;
}

}  // namespace flash_ext
