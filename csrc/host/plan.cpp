#include "host/plan.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace flash_ext {
namespace {

struct NamedDevice {
  std::string_view name;
  DeviceInfo info;  // SMs of a well-known card: A100, RTX 3090, RTX 4090, H100/H200, B200, RTX 5090
};
constexpr int kKiB = 1024;
const NamedDevice kNamedDevices[] = {
    {"cpu", {0, 0, 0}},
    {"sm80", {80, 108, 163 * kKiB}},
    {"sm86", {86, 82, 99 * kKiB}},
    {"sm89", {89, 128, 99 * kKiB}},
    {"sm90", {90, 132, 227 * kKiB}},
    {"sm100", {100, 148, 227 * kKiB}},
    {"sm120", {120, 170, 99 * kKiB}},
};

std::string capability(int arch) { return std::to_string(arch / 10) + "." + std::to_string(arch % 10); }

struct KernelBackend {
  const char* name;
  int arch;
};
// In the order of preference.
constexpr KernelBackend kKernelBackends[] = {{"sm90", 90}, {"sm80", 80}};

bool device_runs(const DeviceInfo& device, int arch) {
  return arch == 90 ? device.arch == 90 : device.arch >= arch;  // sm_90a code runs on 9.0 alone
}

// Why a backend's kernels cannot run this problem at all, whatever the variant.
std::vector<std::string> reasons_against(const KernelBackend& backend, const FwdProblem& problem,
                                         const DeviceInfo& device) {
  if (device.arch == 0) return {"the tensors are not on a CUDA device"};
  std::vector<std::string> reasons;
  if (!device_runs(device, backend.arch)) {
    reasons.push_back("needs compute capability " + capability(backend.arch) + (backend.arch == 90 ? "" : " or later") +
                      ", this GPU has " + capability(device.arch));
  }
  if (problem.dtype == ScalarType::kFloat32 || problem.dtype == ScalarType::kFloat64) {
    reasons.push_back(std::string("kernels take bfloat16 and float16, got ") + dtype_name(problem.dtype));
  }
  return reasons;
}

FwdPlan plan_attention(const FwdProblem& problem, const DeviceInfo& device, const char* direction) {
  FwdPlan plan;
  for (const KernelBackend& backend : kKernelBackends) {
    std::vector<std::string> reasons = reasons_against(backend, problem, device);
    if (device.arch != 0) {
      reasons.push_back(std::string("this build has no ") + direction + " kernel for " + backend.name);
    }
    plan.rejected.push_back({backend.name, std::move(reasons)});
  }
  if (problem.backend.empty() || problem.backend == "reference") plan.backend = "reference";
  return plan;
}

}  // namespace

DeviceInfo device_info_from_name(std::string_view name) {
  std::string known;
  for (const NamedDevice& device : kNamedDevices) known += (known.empty() ? "" : ", ") + std::string(device.name);
  const auto fail = [&] {
    throw std::invalid_argument("device_info must be one of " + known + ", optionally followed by ':SMS', got '" +
                                std::string(name) + "'");
  };
  std::vector<std::string_view> fields;
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find(':', begin), name.size());
    fields.push_back(name.substr(begin, end - begin));
    begin = end + 1;
  }
  const auto parse = [&](std::string_view text) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value <= 0) fail();
    return value;
  };
  DeviceInfo info;
  bool found = false;
  for (const NamedDevice& device : kNamedDevices) {
    if (device.name == fields[0]) info = device.info, found = true;
  }
  // A GPU outside the table is named in full: 'sm103:148:232448'.
  if (!found && (fields.size() != 3 || !fields[0].starts_with("sm"))) fail();
  if (!found) info.arch = parse(fields[0].substr(2));
  if (fields.size() > 3 || (fields.size() > 1 && info.arch == 0)) fail();
  if (fields.size() > 1) info.num_sms = parse(fields[1]);
  if (fields.size() > 2) info.smem_bytes = parse(fields[2]);
  return info;
}

std::string FwdPlan::rejections_as_text() const {
  std::string text;
  for (const Rejection& rejection : rejected) {
    text += (text.empty() ? "" : "; ") + rejection.backend + ": ";
    for (size_t i = 0; i < rejection.reasons.size(); ++i) text += (i ? ", " : "") + rejection.reasons[i];
  }
  return text;
}

FwdPlan plan_fwd(const FwdProblem& problem, const DeviceInfo& device) {
  return plan_attention(problem, device, "forward");
}

FwdPlan plan_bwd(const FwdProblem& problem, const DeviceInfo& device) {
  return plan_attention(problem, device, "backward");
}

const Variant* plan_bwd_preprocess(ScalarType dtype, int64_t head_dim_v, const DeviceInfo& device) {
  for (const KernelBackend& backend : kKernelBackends) {
    if (!device_runs(device, backend.arch)) continue;
    const Variant* smallest = nullptr;
    for (const Variant& variant : variants()) {
      const bool covers = variant.op == Op::k_bwd_preprocess && variant.arch == backend.arch &&
                          variant.dtype == dtype && variant.head_dim_v >= head_dim_v;
      if (covers && (smallest == nullptr || variant.head_dim_v < smallest->head_dim_v)) smallest = &variant;
    }
    if (smallest != nullptr) return smallest;
  }
  return nullptr;
}

}  // namespace flash_ext
