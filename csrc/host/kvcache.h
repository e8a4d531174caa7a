// What the op bodies of the KV cache share.
#pragma once

#include <optional>

#include "common/fp8_params.h"
#include "common/kvcache_params.h"
#include "host/emulator.h"
#include "host/ops.h"
#include "host/tensor.h"

namespace flash_ext {

// The tensors of a call that say where rows lie; as in flash_ext.attention_with_kvcache.
struct CacheTensors {
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& cache_seqlens;
  const std::optional<Tensor>& cache_batch_idx;
  const std::optional<Tensor>& leftpad_k;
  const std::optional<Tensor>& page_table;
};

// Checks what memory safety needs; batch: sequences of the call.
void check_cache(const CacheTensors& cache, const Tensor& q);

// Index tensors as kernels read them: contiguous, of the page table its rows.
void normalise_indices(Tensor* cache_seqlens, std::optional<Tensor>* cache_batch_idx, std::optional<Tensor>* leftpad_k,
                       std::optional<Tensor>* page_table);

// Whether v_cache is k_cache[..., :head_dim_v].
bool shares_rows(const Tensor& k_cache, const Tensor& v_cache);

KvPlaces places_of(const CacheTensors& cache);

// What a call on e4m3 tensors has besides; flash_ext/kvcache_fp8.py.
struct CacheFp8 {
  const std::optional<Tensor>&q_descale, &k_descale, &v_descale;
  torch::headeronly::ScalarType out_dtype;
};

// Both ops; fp8: null for the 16-bit one.
std::tuple<Tensor, Tensor> attend_to_cache(FX_CACHE_PARAMETERS, const CacheFp8* fp8, bool validate,
                                           const std::optional<std::string>& backend);

// Whether keys or values have a scale for every 64 rows.
bool has_block_scales(const CacheFp8& fp8);

// The scales, checked; adds them to what the kernel may read.
void fill_scales(FwdFp8CacheParams* params, const CacheFp8& fp8, const CacheTensors& cache, const Tensor& q, OpMemory* memory);

// Why 16-byte accesses cannot reach the rows of a cache where they lie, or null. A cache is never copied.
const char* why_not_accessible(const Tensor& cache);

}  // namespace flash_ext
