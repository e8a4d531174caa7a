#include "host/tma.h"

#include <cuda.h>

#include "common/swizzle.cuh"

namespace flash_ext {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(symbol) : nullptr;
}

}  // namespace

cudaError_t encode_tensor_map(TensorMap* map, const TensorMapSpec& spec) {
  static const Encode encode = find_encoder();
  if (encode == nullptr) return cudaErrorInsufficientDriver;

  constexpr cuuint64_t kElementBytes = 2;
  // Strides of dimensions of size 1 may be anything: give the driver one that it accepts.
  const auto stride_bytes = [](int size, int64_t stride) -> cuuint64_t {
    return size == 1 ? 16 : static_cast<cuuint64_t>(stride) * kElementBytes;
  };
  const auto extent = [](int size) { return static_cast<cuuint64_t>(size); };
  const cuuint64_t sizes[4] = {extent(spec.columns), extent(spec.rows), extent(spec.heads), extent(spec.batch)};
  const cuuint64_t strides[3] = {stride_bytes(spec.rows, spec.strides.row), stride_bytes(spec.heads, spec.strides.head),
                                 stride_bytes(spec.batch, spec.strides.batch)};
  const cuuint32_t box[4] = {kSlabColumns, static_cast<cuuint32_t>(spec.box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  // The driver wants an element type but moves bytes: bf16 stands for fp16 too.
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(spec.base),
             sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flash_ext
