// What the op bodies of the KV cache share.
#pragma once

#include <optional>

#include "common/kvcache_params.h"
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

// Why 16-byte accesses cannot reach the rows of a cache where they lie, or null. A cache is never copied.
const char* why_not_accessible(const Tensor& cache);

}  // namespace flash_ext
