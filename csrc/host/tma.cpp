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

// A dimension beyond the columns: extent, stride in elements, extent of the box.
struct Dimension {
  int64_t size;
  int64_t stride;
  int box;
};

constexpr int kRank = 5;

cudaError_t encode_map(TensorMap* map, const void* base, int columns, const Dimension (&dimensions)[kRank - 1]) {
  static const Encode encode = find_encoder();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  constexpr cuuint64_t kElementBytes = 2;
  cuuint64_t sizes[kRank] = {static_cast<cuuint64_t>(columns)}, strides[kRank - 1];
  cuuint32_t box[kRank] = {kSlabColumns}, element_strides[kRank] = {1, 1, 1, 1, 1};
  for (int i = 0; i < kRank - 1; ++i) {
    const Dimension& dimension = dimensions[i];
    sizes[i + 1] = static_cast<cuuint64_t>(dimension.size);
    box[i + 1] = static_cast<cuuint32_t>(dimension.box);
    // The stride of a dimension of size 1 may be anything: the driver gets that of a packed row instead.
    strides[i] = (dimension.size == 1 ? sizes[0] : static_cast<cuuint64_t>(dimension.stride)) * kElementBytes;
  }
  // The driver wants an element type but moves bytes: bf16 stands for fp16 too.
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(base), sizes,
             strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t encode_tma_rows(TmaTensor* tensor, const TmaTensorSpec& spec, bool ragged) {
  const RowStrides& strides = spec.strides;
  tensor->head_step = strides.head != 0;
  tensor->batch_step = strides.batch != 0;
  tensor->ragged_rows = ragged ? spec.box_rows : 0;
  // Row r of the box, at place p of the second dimension and end e of the fifth, is row p + r + e - box_rows.
  const char* base = static_cast<const char*>(spec.base) - (ragged ? 2 * spec.box_rows * strides.row : 0);
  return encode_map(&tensor->map, base, spec.columns,
                    {{ragged ? spec.box_rows : spec.rows, strides.row, spec.box_rows},
                     {tensor->head_step ? spec.heads : 1, strides.head, 1},
                     {tensor->batch_step ? spec.batch : 1, strides.batch, 1},
                     {ragged ? spec.rows + 1 : 1, strides.row, 1}});
}

cudaError_t encode_tma_queries(TmaTensor* tensor, const TmaTensorSpec& spec, int group, int box_heads) {
  const RowStrides& strides = spec.strides;
  tensor->head_step = strides.head != 0;
  tensor->batch_step = strides.batch != 0;
  tensor->ragged_rows = 0;
  return encode_map(&tensor->map, spec.base, spec.columns,
                    {{tensor->head_step ? group : 1, strides.head, box_heads},
                     {spec.rows, strides.row, spec.box_rows / box_heads},
                     {tensor->head_step ? spec.heads / group : 1, group * strides.head, 1},
                     {tensor->batch_step ? spec.batch : 1, strides.batch, 1}});
}

}  // namespace flash_ext
