// Op body of kvcache_fp8: kvcache.cpp's, with the scales of e4m3 tensors.
#include <torch/csrc/stable/library.h>

#include "common/quantize_params.h"
#include "host/check.h"
#include "host/kvcache.h"

namespace flash_ext {
namespace {

using TorchType = torch::headeronly::ScalarType;

// One scale, (batch, heads), or blocks of 64 rows: (entries, heads, blocks), where the rows of k and v count in the cache.
Descale descale_of(const std::optional<Tensor>& given, int64_t batch, int64_t entries, int64_t heads, int64_t heads_kv,
                   int64_t rows, const Tensor& q, const char* name, OpMemory* memory) {
  if (!given) return {nullptr, 0, 0, 1, 0};
  const Tensor& descale = *given;
  FX_CHECK(descale.scalar_type() == TorchType::Float && descale.is_cuda() == q.is_cuda() &&
               descale.get_device_index() == q.get_device_index(),
           "attention_with_kvcache: ", name, " must be float32 on q's device");
  memory->add(descale, MemoryRole::kIn, name);
  Descale result{static_cast<const float*>(descale.data_ptr()), 0, 0, 1, 0};
  if (descale.dim() < 2) {
    FX_CHECK(descale.numel() == 1, "attention_with_kvcache: ", name, " must have one element, two dimensions or three");
    return result;
  }
  const bool blocks = descale.dim() == 3, groups = !blocks && descale.size(1) != heads;
  const int64_t num_blocks = (rows + kScaleRows - 1) / kScaleRows;
  bool fits = descale.dim() <= 3 && descale.size(0) == (blocks ? entries : batch) &&
              descale.size(1) == (groups ? heads_kv : heads);
  if (blocks) fits = fits && descale.size(2) == num_blocks && (num_blocks <= 1 || descale.stride(2) == 1);
  FX_CHECK(fits, "attention_with_kvcache: ", name, " has a wrong shape or a last dimension that is not contiguous");
  result.batch_stride = descale.stride(0);
  result.head_stride = descale.stride(1);
  result.heads_per_scale = groups ? static_cast<int>(heads / heads_kv) : 1;
  result.block_step = blocks ? 1 : 0;
  return result;
}

}  // namespace

bool has_block_scales(const CacheFp8& fp8) {
  return (fp8.k_descale && fp8.k_descale->dim() == 3) || (fp8.v_descale && fp8.v_descale->dim() == 3);
}

void fill_scales(FwdFp8CacheParams* params, const CacheFp8& fp8, const CacheTensors& cache, const Tensor& q, OpMemory* memory) {
  const int64_t batch = q.size(0), heads_kv = cache.k_cache.size(2), entries = cache.k_cache.size(0);
  const int64_t rows = cache.k_cache.size(1);
  FX_CHECK(!has_block_scales(fp8) || !cache.page_table || rows % kScaleRows == 0,
           "attention_with_kvcache: scales of 64 rows need pages of a multiple of 64 rows, got ", rows);
  params->q_descale = descale_of(fp8.q_descale, batch, batch, q.size(2), heads_kv, q.size(1), q, "q_descale", memory);
  params->k_descale = descale_of(fp8.k_descale, batch, entries, heads_kv, heads_kv, rows, q, "k_descale", memory);
  params->v_descale = descale_of(fp8.v_descale, batch, entries, heads_kv, heads_kv, rows, q, "v_descale", memory);
  params->out_is_fp16 = fp8.out_dtype == TorchType::Half;
}

std::tuple<Tensor, Tensor> kvcache_fp8(FX_CACHE_PARAMETERS, std::optional<Tensor> q_descale, std::optional<Tensor> k_descale,
                                       std::optional<Tensor> v_descale, TorchType out_dtype, bool validate,
                                       std::optional<std::string> backend) {
  FX_CHECK(q.scalar_type() == TorchType::Float8_e4m3fn,
           "attention_with_kvcache: q and the caches of an FP8 call must be float8_e4m3fn");
  FX_CHECK(out_dtype == TorchType::BFloat16 || out_dtype == TorchType::Half,
           "attention_with_kvcache: out_dtype must be bfloat16 or float16");
  FX_CHECK(!rotary_cos, "attention_with_kvcache: e4m3 rows are not rotated: rotate before they are quantised");
  const CacheFp8 fp8{q_descale, k_descale, v_descale, out_dtype};
  return attend_to_cache(FX_CACHE_NAMES, &fp8, validate, backend);
}

}  // namespace flash_ext
