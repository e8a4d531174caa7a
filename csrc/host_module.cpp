// `flash_ext._host`: introspection and tests. Never on the path of a call, needs neither CUDA nor LibTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "host/explain_kvcache.h"
#include "host/plan.h"
#include "host/plan_kvcache.h"

namespace py = pybind11;

namespace flash_ext {
namespace {

#ifndef FLASH_EXT_BUILD_INFO
#error "the build defines FLASH_EXT_BUILD_INFO, a JSON object"
#endif

const std::pair<const char*, ScalarType> kDtypes[] = {{"float16", ScalarType::kFloat16},
                                                      {"bfloat16", ScalarType::kBFloat16},
                                                      {"float32", ScalarType::kFloat32},
                                                      {"float64", ScalarType::kFloat64},
                                                      {"float8_e4m3fn", ScalarType::kFloat8E4m3}};

ScalarType dtype_from_name(const std::string& name) {
  for (const auto& [known, dtype] : kDtypes) {
    if (name == known) return dtype;
  }
  throw std::invalid_argument("unknown dtype '" + name + "'");
}

// (sizes, strides, base_aligned), of (batch, seqlen, num_heads, head_dim), or packed of (total, num_heads, head_dim)
using PyLayout = std::tuple<std::vector<int64_t>, std::vector<int64_t>, bool>;

TensorLayout layout_from_python(const PyLayout& given) {
  const auto& [sizes, strides, base_aligned] = given;
  if (sizes.size() != strides.size() || sizes.size() < 3 || sizes.size() > 4) {
    throw std::invalid_argument("a layout has 3 or 4 sizes and as many strides");
  }
  TensorLayout layout{.sizes = {1}, .base_aligned = base_aligned};
  std::copy(sizes.begin(), sizes.end(), layout.sizes.end() - sizes.size());
  std::copy(strides.begin(), strides.end(), layout.strides.end() - strides.size());
  return layout;
}

py::dict plan_to_python(const FwdPlan& plan) {
  py::dict rejected;
  for (const Rejection& rejection : plan.rejected) rejected[rejection.backend.c_str()] = rejection.reasons;
  py::dict result;
  result["backend"] = plan.backend;
  result["variant"] = plan.variant ? plan.variant->name : "";
  result["tile"] = plan.variant ? std::make_pair(plan.variant->block_m, plan.variant->block_n)
                                : std::make_pair(0, 0);
  result["grid"] = py::make_tuple(plan.grid[0], plan.grid[1], plan.grid[2]);
  result["num_splits"] = plan.num_splits;
  result["heads_per_tile"] = plan.heads_per_tile;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["copies"] = plan.copies;
  result["rejected"] = rejected;
  result["rejections_as_text"] = plan.rejections_as_text();
  return result;
}

template <FwdPlan (*plan)(const FwdProblem&, const DeviceInfo&)>
void bind_plan(py::module_& m, const char* name, const char* doc) {
  m.def(
      name,
      [](const std::string& device, const std::string& dtype, const PyLayout& q, const PyLayout& k, const PyLayout& v,
         double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
         const std::string& backend, int64_t num_sequences, int64_t num_parts, bool sinks, bool alibi, bool k_bias,
         bool block_mask, bool deterministic, int64_t wanted, const std::string& pairs) {
        const FwdProblem problem{.dtype = dtype_from_name(dtype),
                                 .q = layout_from_python(q),
                                 .k = layout_from_python(k),
                                 .v = layout_from_python(v),
                                 .num_sequences = num_sequences,
                                 .num_parts = num_parts,
                                 .causal = causal,
                                 .window_left = window_left,
                                 .window_right = causal ? 0 : window_right,
                                 .softmax_scale = softmax_scale,
                                 .softcap = softcap,
                                 .deterministic = deterministic,
                                 .wanted = wanted,
                                 .sinks = sinks,
                                 .alibi = alibi,
                                 .k_bias = k_bias,
                                 .pairs = pairs_from_name(pairs),
                                 .block_mask = block_mask,
                                 .backend = backend};
        return plan_to_python(plan(problem, device_info_from_name(device)));
      },
      doc, py::kw_only(), py::arg("device"), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"),
      py::arg("softmax_scale"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"), py::arg("softcap"),
      py::arg("backend"), py::arg("num_sequences") = -1, py::arg("num_parts") = 0, py::arg("sinks") = false,
      py::arg("alibi") = false, py::arg("k_bias") = false, py::arg("block_mask") = false,
      py::arg("deterministic") = false, py::arg("wanted") = FwdProblem{}.wanted, py::arg("pairs") = "auto");
}

void bind_fp8_plan(py::module_& m) {
  m.def(
      "plan_fwd_fp8",
      [](const std::string& device, const PyLayout& q, const PyLayout& k, const PyLayout& v, bool causal,
         int64_t window_left, int64_t window_right, double softcap, const std::string& backend, int64_t num_sequences,
         int64_t num_parts, bool alibi, bool k_bias, bool leftpad, bool block_scales, bool flushes,
         bool whole_blocks, bool shared_q_scale) {
        const FwdProblem problem{.dtype = ScalarType::kFloat8E4m3,
                                 .q = layout_from_python(q),
                                 .k = layout_from_python(k),
                                 .v = layout_from_python(v),
                                 .num_sequences = num_sequences,
                                 .num_parts = num_parts,
                                 .causal = causal,
                                 .window_left = window_left,
                                 .window_right = causal ? 0 : window_right,
                                 .softcap = softcap,
                                 .alibi = alibi,
                                 .k_bias = k_bias,
                                 .leftpad = leftpad,
                                 .backend = backend};
        return plan_to_python(plan_fwd_fp8(problem, {.block_scales = block_scales,
                                                     .flushes = flushes,
                                                     .whole_blocks = whole_blocks,
                                                     .shared_q_scale = shared_q_scale},
                                           device_info_from_name(device)));
      },
      "The plan of an FP8 forward; arguments as plan_fwd.", py::kw_only(), py::arg("device"), py::arg("q"), py::arg("k"),
      py::arg("v"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"), py::arg("softcap"),
      py::arg("backend"), py::arg("num_sequences"), py::arg("num_parts"), py::arg("alibi"), py::arg("k_bias"),
      py::arg("leftpad"), py::arg("block_scales"), py::arg("flushes"), py::arg("whole_blocks"),
      py::arg("shared_q_scale"));
}

void bind_kvcache_plan(py::module_& m) {
  m.def(
      "plan_kvcache",
      [](const std::string& device, const std::string& dtype, const PyLayout& q, const PyLayout& k_cache,
         const PyLayout& v_cache, const std::optional<PyLayout>& k, const std::optional<PyLayout>& v, int64_t pages,
         bool leftpad, int64_t rotary_dim, bool causal, int64_t window_left, int64_t window_right, bool modified_score,
         double softmax_scale, int64_t num_splits, const std::string& backend, bool shared_values, const std::string& out_dtype,
         bool block_scales) {
        const DeviceInfo info = device_info_from_name(device);
        const TensorLayout new_k = layout_from_python(k.value_or(q)), new_v = layout_from_python(v.value_or(q));
        const TensorLayout keys = layout_from_python(k_cache);
        const CacheProblem problem{.dtype = dtype_from_name(dtype),
                                   .q = layout_from_python(q),
                                   .k_cache = keys,
                                   .v_cache = layout_from_python(v_cache),
                                   .paged = pages >= 0,
                                   .leftpad = leftpad,
                                   .appends = k.has_value(),
                                   .shared_values = shared_values,
                                   .capacity = keys.sizes[1] * (pages >= 0 ? pages : 1),
                                   .rotary_dim = rotary_dim,
                                   .window_left = window_left,
                                   .window_right = causal ? 0 : window_right,
                                   .modified_score = modified_score,
                                   .softmax_scale = softmax_scale,
                                   .num_splits = num_splits,
                                   .backend = backend,
                                   .out_dtype = dtype_from_name(out_dtype),
                                   .block_scales = block_scales};
        const CachePlan plan = plan_kvcache(problem, info);
        py::dict result;
        result["reasons"] = plan.reasons;
        result["variant"] = plan.variant ? plan.variant->name : "";
        if (plan.variant == nullptr) return result;
        const CacheCallReport report =
            report_of(problem, plan, info, k ? &new_k : nullptr, v ? &new_v : nullptr);
        result["backend"] = plan.backend;
        result["tile"] = std::make_pair(plan.variant->block_m, plan.variant->block_n);
        result["grid"] = py::make_tuple(plan.grid, 1, 1);
        result["heads_per_tile"] = plan.heads_per_tile;
        result["max_parts"] = plan.max_parts;
        result["kernels"] = report.kernels;
        result["keys_by"] = report.keys_by;
        result["workspace_bytes"] = report.workspace_bytes;
        result["copies"] = report.copies;
        return result;
      },
      "The plan of a call over a KV cache; pages: of a sequence, -1 for a dense cache; k and v: the rows to append; "
      "shared_values: v_cache is the first columns of k_cache.",
      py::kw_only(), py::arg("device"), py::arg("dtype"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("k"),
      py::arg("v"), py::arg("pages"), py::arg("leftpad"), py::arg("rotary_dim"), py::arg("causal"), py::arg("window_left"),
      py::arg("window_right"), py::arg("modified_score"), py::arg("softmax_scale"), py::arg("num_splits"), py::arg("backend"),
      py::arg("shared_values"), py::arg("out_dtype"), py::arg("block_scales"));
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "What was compiled, and what the planner would choose: introspection of flash_ext without a GPU.";
  m.attr("build_info_json") = FLASH_EXT_BUILD_INFO;

  m.def(
      "variants",
      [] {
        py::list rows;
        for (const Variant& variant : variants()) {
          py::dict row;
          row["name"] = variant.name;
          row["op"] = op_name(variant.op);
          row["arch"] = variant.arch;
          row["dtype"] = dtype_name(variant.dtype);
          row["head_dim"] = variant.head_dim;
          row["head_dim_v"] = variant.head_dim_v;
          row["tile"] = py::make_tuple(variant.block_m, variant.block_n);
          rows.append(row);
        }
        return rows;
      },
      "The compiled variants, one dict a row of csrc/rows.");

  m.def(
      "device_info",
      [](const std::string& name) {
        const DeviceInfo info = device_info_from_name(name);
        return std::make_tuple(info.arch, info.num_sms, info.smem_bytes);
      },
      "(architecture, SMs, shared memory a CTA may opt in to) of a named device such as 'sm90:132'.", py::arg("name"));

  bind_plan<plan_fwd>(m, "plan_fwd", "The plan of a forward call. Layouts are (sizes, strides in elements, base_aligned); num_sequences: of packed "
                      "tensors, whose layouts have three dimensions; num_parts: of the keys, 0 without split_boundaries.");
  bind_fp8_plan(m);
  bind_kvcache_plan(m);
  bind_plan<plan_bwd>(m, "plan_bwd", "The plan of a backward call; arguments as plan_fwd, wanted: bits of gradients as of the op.");

  m.def(
      "plan_bwd_preprocess",
      [](const std::string& device, const std::string& dtype, int64_t head_dim_v) -> std::string {
        const Variant* variant =
            plan_bwd_preprocess(dtype_from_name(dtype), head_dim_v, device_info_from_name(device));
        return variant ? variant->name : "";
      },
      "The variant of the backward's first step, '' when there is none.", py::kw_only(), py::arg("device"),
      py::arg("dtype"), py::arg("head_dim_v"));
}

}  // namespace
}  // namespace flash_ext
