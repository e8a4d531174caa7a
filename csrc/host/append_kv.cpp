// Op body of append_kv: new rows to their places in the cache, rotation, lengths and parts.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>
#include <vector>

#include "host/check.h"
#include "host/emulator.h"
#include "host/kvcache.h"
#include "host/launchers.h"
#include "host/ops.h"
#include "host/plan.h"

namespace flash_ext {
namespace {

using TorchType = torch::headeronly::ScalarType;

const int* ints_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int*>(tensor->data_ptr()) : nullptr;
}

void check_ints(const std::optional<Tensor>& tensor, const char* name, int64_t dims, const Tensor& q) {
  if (!tensor) return;
  FX_CHECK(tensor->scalar_type() == TorchType::Int && tensor->dim() == dims && tensor->size(0) == q.size(0),
           "attention_with_kvcache: ", name, " must be int32 with ", dims, " dimensions and a row for each sequence");
  FX_CHECK(tensor->get_device_index() == q.get_device_index() && tensor->is_cuda() == q.is_cuda(),
           "attention_with_kvcache: ", name, " must be on q's device");
}

// A table as the kernel reads it: packed rows from a 16-byte boundary.
Tensor packed_table(const Tensor& table) {
  if (table.is_contiguous() && reinterpret_cast<uintptr_t>(table.data_ptr()) % 16 == 0) return table;
  Tensor copy = torch::stable::new_empty(table, table.sizes());
  torch::stable::copy_(copy, table);
  return copy;
}

Tensor new_int32(const Tensor& like, int64_t size) {
  const int64_t sizes[] = {size};
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), TorchType::Int);
}

Tensor contiguous_ints(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

}  // namespace

void normalise_indices(Tensor* cache_seqlens, std::optional<Tensor>* cache_batch_idx, std::optional<Tensor>* leftpad_k,
                       std::optional<Tensor>* page_table) {
  if (*page_table && (*page_table)->dim() == 2 && (*page_table)->size(1) > 1 && (*page_table)->stride(1) != 1) {
    *page_table = torch::stable::contiguous(**page_table);
  }
  if (*cache_batch_idx) *cache_batch_idx = contiguous_ints(**cache_batch_idx);
  if (*leftpad_k) *leftpad_k = contiguous_ints(**leftpad_k);
  *cache_seqlens = contiguous_ints(*cache_seqlens);
}

void check_cache(const CacheTensors& cache, const Tensor& q) {
  FX_CHECK(q.dim() == 4, "attention_with_kvcache: q must have 4 dimensions, got ", q.dim());
  for (const Tensor* tensor : {&cache.k_cache, &cache.v_cache}) {
    FX_CHECK(tensor->dim() == 4 && tensor->scalar_type() == q.scalar_type() &&
                 tensor->get_device_index() == q.get_device_index() && tensor->is_cuda() == q.is_cuda(),
             "attention_with_kvcache: the caches must have 4 dimensions, and dtype and device of q");
    FX_CHECK(tensor->stride(3) == 1 || tensor->size(3) <= 1, "attention_with_kvcache: the last dimension must be contiguous");
  }
  for (int dim = 0; dim < 3; ++dim) {
    FX_CHECK(cache.k_cache.size(dim) == cache.v_cache.size(dim), "attention_with_kvcache: the caches' shapes must agree");
  }
  FX_CHECK(cache.k_cache.size(3) == q.size(3), "attention_with_kvcache: k_cache.head_dim must equal q.head_dim");
  const int64_t heads_kv = cache.k_cache.size(2);
  FX_CHECK(heads_kv > 0 && q.size(2) % heads_kv == 0,
           "attention_with_kvcache: q.num_heads must be a multiple of k_cache.num_heads_kv, got ", q.size(2), " and ", heads_kv);
  check_ints(cache.cache_seqlens, "cache_seqlens", 1, q);
  check_ints(cache.cache_batch_idx, "cache_batch_idx", 1, q);
  check_ints(cache.leftpad_k, "leftpad_k", 1, q);
  check_ints(cache.page_table, "page_table", 2, q);
  FX_CHECK(cache.page_table || cache.cache_batch_idx || cache.k_cache.size(0) == q.size(0),
           "attention_with_kvcache: k_cache.batch must equal q.batch, got ", cache.k_cache.size(0), " and ", q.size(0));
  FX_CHECK(!cache.page_table || cache.k_cache.size(1) > 0, "attention_with_kvcache: k_cache.page_size must be at least 1");
  const int64_t pages = cache.page_table ? cache.page_table->size(1) : 1;
  // Rows are ints in the kernels, one tile beyond the end too.
  FX_CHECK(pages * cache.k_cache.size(1) < (int64_t{1} << 30) && cache.k_cache.size(0) <= INT_MAX,
           "attention_with_kvcache: a sequence can have at most 2**30 rows, got ", pages * cache.k_cache.size(1));
}

bool shares_rows(const Tensor& k_cache, const Tensor& v_cache) {
  if (k_cache.data_ptr() != v_cache.data_ptr() || v_cache.size(3) > k_cache.size(3)) return false;
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t size = k_cache.size(dim);
    if (size != v_cache.size(dim) || (size > 1 && k_cache.stride(dim) != v_cache.stride(dim))) return false;
  }
  return true;
}

KvPlaces places_of(const CacheTensors& cache) {
  const int rows = static_cast<int>(cache.k_cache.size(1));
  KvPlaces places{};
  places.page_table = ints_of(cache.page_table);
  places.batch_index = ints_of(cache.cache_batch_idx);
  places.page_table_stride = cache.page_table ? cache.page_table->stride(0) : 0;
  places.num_blocks = static_cast<int>(cache.k_cache.size(0));
  places.rows = rows;
  places.capacity = static_cast<int>(cache.page_table ? cache.page_table->size(1) * rows : rows);
  places.by_rows = make_divisor(max_of(1, rows));
  return places;
}

const char* why_not_accessible(const Tensor& cache) {
  const int elements = 16 / element_size(scalar_type_of(cache));
  if (cache.size(3) % elements != 0) return elements == 8 ? "head dims must be multiples of 8" : "head dims must be multiples of 16";
  return why_copied(layout_of(cache), scalar_type_of(cache));
}

std::tuple<Tensor, Tensor, Tensor> append_kv(Tensor q, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k,
                                             std::optional<Tensor> v, Tensor cache_seqlens,
                                             std::optional<Tensor> cache_batch_idx, std::optional<Tensor> leftpad_k,
                                             std::optional<Tensor> page_table, std::optional<Tensor> rotary_cos,
                                             std::optional<Tensor> rotary_sin, bool rotary_interleaved, bool positions_move,
                                             std::vector<int64_t> split) {
  normalise_indices(&cache_seqlens, &cache_batch_idx, &leftpad_k, &page_table);
  const CacheTensors cache{k_cache, v_cache, cache_seqlens, cache_batch_idx, leftpad_k, page_table};
  check_cache(cache, q);
  const bool shared = shares_rows(k_cache, v_cache);
  FX_CHECK((v ? k.has_value() : !k || shared) && rotary_cos.has_value() == rotary_sin.has_value(),
           "append_kv: rotary_cos and rotary_sin come in pairs, and k and v, unless v_cache is k_cache[..., :head_dim_v]");
  FX_CHECK(!rotary_cos || (k && v), "append_kv: rotation needs new rows, of k alone");
  FX_CHECK(split.empty() || split.size() == 5, "append_kv: split must have 5 numbers, got ", split.size());
  for (const Tensor* tensor : {&k_cache, &v_cache}) {
    const char* reason = why_not_accessible(*tensor);
    FX_CHECK(reason == nullptr || tensor->numel() == 0, "append_kv: ", reason == nullptr ? "" : reason);
  }
  const int64_t batch = q.size(0), seqlen_q = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  if (k) {
    for (const auto& [rows, target] : {std::pair{&*k, &k_cache}, std::pair{v ? &*v : nullptr, &v_cache}}) {
      if (rows == nullptr) continue;
      FX_CHECK(rows->dim() == 4 && rows->scalar_type() == q.scalar_type() && rows->size(0) == batch &&
                   rows->size(1) == k->size(1) && rows->size(2) == target->size(2) && rows->size(3) == target->size(3) &&
                   rows->get_device_index() == q.get_device_index() && rows->is_cuda() == q.is_cuda(),
               "append_kv: k and v must have shape (batch, seqlen_new, num_heads_kv, head_dim), and dtype and device of q");
    }
  }
  const Variant* variant = plan_kvcache_step(Op::k_append_kv, scalar_type_of(q), v_cache.size(3), device_info_of(q));
  FX_CHECK(variant != nullptr, "append_kv: this build has no kernel for ", dtype_name(scalar_type_of(q)), " on this GPU");

  AppendKvParams params{};
  OpMemory memory;
  const Tensor q_rows = with_aligned_rows(q);
  std::optional<Tensor> k_rows, v_rows, cos, sin;
  Tensor q_out = torch::stable::new_empty(q, rotary_cos ? q.sizes() : torch::headeronly::IntHeaderOnlyArrayRef({0}));
  Tensor lengths = new_int32(q, batch), part_begin = new_int32(q, split.empty() ? 0 : batch + 1);
  if (k) {
    k_rows = with_aligned_rows(*k);
    memory.add(*k_rows, MemoryRole::kIn, "k");
    params.k = k_rows->data_ptr(), params.k_strides = row_strides_of(*k_rows);
    params.seqlen_new = static_cast<int>(k->size(1));
  }
  if (v) {
    v_rows = with_aligned_rows(*v);
    memory.add(*v_rows, MemoryRole::kIn, "v");
    params.v = v_rows->data_ptr(), params.v_strides = row_strides_of(*v_rows);
    if (shared) params.k_first_column = static_cast<int>(v->size(3));
  }
  if (rotary_cos) {
    FX_CHECK(rotary_cos->dim() == 2 && rotary_sin->dim() == 2 && rotary_cos->size(0) > 0 &&
                 rotary_cos->size(0) == rotary_sin->size(0) && rotary_cos->size(1) == rotary_sin->size(1) &&
                 2 * rotary_cos->size(1) <= head_dim && rotary_cos->size(1) % 8 == 0,
             "append_kv: rotary_cos and rotary_sin must have shape (positions, rotary_dim / 2), rotary_dim a multiple of 16");
    FX_CHECK(rotary_cos->scalar_type() == rotary_sin->scalar_type() &&
                 (rotary_cos->scalar_type() == q.scalar_type() || rotary_cos->scalar_type() == TorchType::Float) &&
                 rotary_cos->is_cuda() == q.is_cuda() && rotary_sin->is_cuda() == q.is_cuda(),
             "append_kv: rotary_cos and rotary_sin must be float32 or of q's dtype, on q's device");
    cos = packed_table(*rotary_cos), sin = packed_table(*rotary_sin);
    memory.add(q_rows, MemoryRole::kIn, "q");
    memory.add(q_out, MemoryRole::kOut, "q_rotated");
    memory.add(*cos, MemoryRole::kIn, "rotary_cos");
    memory.add(*sin, MemoryRole::kIn, "rotary_sin");
    params.q = q_rows.data_ptr(), params.q_out = q_out.data_ptr(), params.q_strides = row_strides_of(q_rows);
    params.rotary_cos = cos->data_ptr(), params.rotary_sin = sin->data_ptr();
    params.rotary_is_float = cos->scalar_type() == TorchType::Float;
    params.rotary_interleaved = rotary_interleaved;
    params.rotary_dim = static_cast<int>(2 * cos->size(1));
    params.num_positions = static_cast<int>(cos->size(0));
  }
  memory.add(k_cache, MemoryRole::kInOut, "k_cache");
  if (!shared) memory.add(v_cache, MemoryRole::kInOut, "v_cache");
  memory.add(cache_seqlens, MemoryRole::kIn, "cache_seqlens");
  if (cache_batch_idx) memory.add(*cache_batch_idx, MemoryRole::kIn, "cache_batch_idx");
  if (leftpad_k) memory.add(*leftpad_k, MemoryRole::kIn, "leftpad_k");
  if (page_table) memory.add(*page_table, MemoryRole::kIn, "page_table");
  memory.add(lengths, MemoryRole::kOut, "lengths");
  memory.add(part_begin, MemoryRole::kOut, "part_begin");

  params.k_cache = k_cache.data_ptr(), params.v_cache = v_cache.data_ptr();
  params.k_cache_strides = row_strides_of(k_cache), params.v_cache_strides = row_strides_of(v_cache);
  params.cache_seqlens = static_cast<const int*>(cache_seqlens.data_ptr());
  params.leftpad = ints_of(leftpad_k);
  params.q_positions_move = positions_move;
  params.places = places_of(cache);
  params.batch = static_cast<int>(batch);
  params.seqlen_q = static_cast<int>(seqlen_q);
  params.num_heads = static_cast<int>(num_heads);
  params.num_heads_kv = static_cast<int>(k_cache.size(2));
  params.head_dim = static_cast<int>(head_dim);
  params.head_dim_v = static_cast<int>(v_cache.size(3));
  params.lengths = static_cast<int*>(lengths.data_ptr());
  if (!split.empty()) {
    for (int i = 0; i < 4; ++i) {
      FX_CHECK(split[i] >= (i == 2 ? 0 : 1) && split[i] <= INT_MAX, "append_kv: split ", i, " is out of range, got ", split[i]);
    }
    params.part_begin = static_cast<int*>(part_begin.data_ptr());
    params.split = {.batch = params.batch,
                    .items_per_part = static_cast<int>(split[0]),
                    .num_ctas = static_cast<int>(split[1]),
                    .num_splits = static_cast<int>(split[2]),
                    .block_n = static_cast<int>(split[3]),
                    .seqlen_q = params.seqlen_q,
                    .window_left = static_cast<int>(split[4])};
  }
  if (scalar_type_of(q) == ScalarType::kFloat8E4m3) {
    FX_CHECK(!rotary_cos, "append_kv: e4m3 rows are not rotated");
    for (RowStrides* strides : {&params.k_strides, &params.v_strides, &params.k_cache_strides, &params.v_cache_strides}) {
      *strides = {strides->batch / 2, strides->row / 2, strides->head / 2};
    }
    params.head_dim /= 2, params.head_dim_v /= 2;
  }
  const LaunchScope scope(q);
  FX_CUDA_CHECK(find_append_kv(variant->name)(params, scope.stream()), variant->name);
  return {q_out, lengths, part_begin};
}

}  // namespace flash_ext
