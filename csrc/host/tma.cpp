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

cudaError_t encode_tma_tensor(TmaTensor* tensor, const TmaTensorSpec& spec) {
  static const Encode encode = find_encoder();
  if (encode == nullptr) return cudaErrorInsufficientDriver;

  constexpr cuuint64_t kElementBytes = 2;
  const auto unsigned_of = [](auto number) { return static_cast<cuuint64_t>(number); };
  tensor->head_step = spec.strides.head != 0;
  tensor->batch_step = spec.strides.batch != 0;
  const cuuint64_t sizes[4] = {unsigned_of(spec.columns), unsigned_of(spec.rows),
                               unsigned_of(tensor->head_step ? spec.heads : 1),
                               unsigned_of(tensor->batch_step ? spec.batch : 1)};
  // The stride of a dimension of size 1 may be anything: the driver gets that of a packed row instead.
  const auto stride_bytes = [&](cuuint64_t size, int64_t stride) {
    return (size == 1 ? sizes[0] : unsigned_of(stride)) * kElementBytes;
  };
  const cuuint64_t strides[3] = {stride_bytes(sizes[1], spec.strides.row), stride_bytes(sizes[2], spec.strides.head),
                                 stride_bytes(sizes[3], spec.strides.batch)};
  const cuuint32_t box[4] = {kSlabColumns, static_cast<cuuint32_t>(spec.box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  // The driver wants an element type but moves bytes: bf16 stands for fp16 too.
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&tensor->map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(spec.base), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flash_ext
