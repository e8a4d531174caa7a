#include "host/plan.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "common/dq_blocks.cuh"
#include "common/params.h"

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

// sm_90a code runs on 9.0 alone; the sm80 group's PTX on everything from 8.0 up.
bool device_runs(const DeviceInfo& device, int arch) {
  return arch == 90 ? device.arch == 90 : device.arch >= arch;
}

// The least general mask that the options come to. Sides that hide no key are unbounded, and an unbounded left side with
// right = 0 is the causal mask. Lengths of packed sequences are not known, only that of all together.
}  // namespace

Mask mask_of(const FwdProblem& problem) {
  if (problem.block_mask) return Mask::k_blocks;
  if (problem.grouped) return Mask::k_segments;
  const bool left = problem.window_left >= 0 && problem.window_left < problem.seqlen_k() - 1;
  const bool right = problem.window_right >= 0 && problem.window_right < problem.seqlen_q() - 1;
  if (left) return Mask::k_local;
  if (!right) return Mask::k_full;
  return problem.window_right == 0 ? Mask::k_causal : Mask::k_local;
}

Score score_of(const FwdProblem& problem) {
  return problem.softcap > 0 || problem.alibi || problem.k_bias ? Score::k_modified : Score::k_plain;
}

namespace {

// What a call asks of a row. A more general row can stand in: of mask and score, never of the dtype.
struct Wanted {
  Mask mask;
  Score score;
};

// What of the problem a row does not cover, as bits: a plan is made at every call, its words only where somebody asks.
enum Mismatch : unsigned { kDtype = 1, kHeadDim = 2, kMask = 4, kScore = 8, kGradients = 16 };

// Rows of the backward that form some of the gradients (rows/bwd.py).
bool forms_dq_alone(const Variant& row) { return row.op == Op::k_bwd && row.kind == std::string_view("dq"); }
bool forms_dkv_alone(const Variant& row) { return row.op == Op::k_bwd && row.kind == std::string_view("dkv"); }

bool forms_wanted(const Variant& row, int64_t wanted) {
  return !(forms_dq_alone(row) && wanted & (kWantDk | kWantDv | kWantDkBias)) && !(forms_dkv_alone(row) && wanted & kWantDq);
}

unsigned mismatches(const Variant& row, const FwdProblem& problem, const Wanted& wanted) {
  const auto covers = [](int largest, int64_t dim) { return dim <= largest && dim % 8 == 0; };
  const bool dims = covers(row.head_dim, problem.head_dim()) && covers(row.head_dim_v, problem.head_dim_v());
  const bool exactly = wanted.mask >= Mask::k_blocks || row.mask >= Mask::k_blocks;
  const bool mask = exactly ? row.mask != wanted.mask : row.mask < wanted.mask;
  return kDtype * (row.dtype != problem.dtype) | kHeadDim * !dims | kMask * mask | kScore * (row.score < wanted.score) |
         kGradients * !forms_wanted(row, problem.wanted);
}

std::vector<std::string> describe(unsigned mismatch, const FwdProblem& problem, const Wanted& wanted) {
  std::vector<std::string> reasons;
  if (mismatch & kDtype) reasons.push_back(std::string("no compiled kernel takes ") + dtype_name(problem.dtype));
  if (mismatch & kHeadDim) {
    const int64_t dim = problem.head_dim(), dim_v = problem.head_dim_v();
    reasons.push_back("no compiled kernel has head_dim " + std::to_string(dim) +
                      (dim == dim_v ? "" : " with head_dim_v " + std::to_string(dim_v)) +
                      (dim % 8 != 0 || dim_v % 8 != 0 ? ": they must be multiples of 8" : ""));
  }
  if (mismatch & kMask) {
    reasons.push_back(wanted.mask == Mask::k_blocks     ? "no compiled kernel has a block_mask"
                      : wanted.mask == Mask::k_segments ? "no compiled kernel has groups"
                      : wanted.mask == Mask::k_local
                          ? "no compiled kernel has window_size (" + std::to_string(problem.window_left) + ", " +
                                std::to_string(problem.window_right) + ")"
                          : std::string("no compiled kernel has the ") +
                                (wanted.mask == Mask::k_full ? "full" : "causal") + " mask");
  }
  if (mismatch & kScore) {
    std::string what;
    for (const auto& [asked, name] : {std::pair(problem.softcap > 0, "softcap"), std::pair(problem.alibi, "alibi_slopes"),
                                      std::pair(problem.k_bias, "k_bias")}) {
      if (asked) what += (what.empty() ? "" : " or ") + std::string(name);
    }
    reasons.push_back("no compiled kernel has " + what);
  }
  if (mismatch & kGradients) reasons.push_back("no compiled kernel has all the gradients that are wanted");
  return reasons;
}

// Rows of the backward whose items are two tiles of keys, for two CTAs.
bool is_paired(const Variant& row) { return row.op == Op::k_bwd && std::string_view(row.kind) == "pair"; }
int ctas_of_item(const Variant& row) { return is_paired(row) ? 2 : 1; }


int64_t num_key_items(const FwdProblem& problem, int64_t block_n);

// Whether a row of pairs may run a call. By count (docs/bwd_sm90.md) pairs save a tenth of a trip at head_dim 256, where the float32
// sum of dQ weighs most, and too little at 128 to take them untimed. They want every SM to have a partner with work, and
// sequences so long that tiles beyond the keys, or masked for one of the two, are few. Not measured.
constexpr int64_t kFewestKeysOfPairs = 2048;

bool takes_pairs(const FwdProblem& problem, const Variant& row, const DeviceInfo& device) {
  if (problem.pairs != Pairs::kByRule) return problem.pairs == Pairs::kAlways;
  return row.head_dim == 256 && !problem.packed() && problem.seqlen_k() >= kFewestKeysOfPairs && device.num_sms >= 2 &&
         2 * num_key_items(problem, 2 * row.block_n) >= device.num_sms;
}

// Whether row a does less work than row b: fewer columns first, then the less general score, fewer gradients, the less general
// mask, then pairs, where they are taken at all, then the larger tile.
bool is_smaller(const Variant& a, const Variant& b) {
  const auto cost = [](const Variant& row) {
    return std::tuple(row.head_dim + row.head_dim_v, static_cast<int>(row.score),
                      !forms_dq_alone(row) && !forms_dkv_alone(row), static_cast<int>(row.mask), !is_paired(row), -row.smem_bytes);
  };
  return cost(a) < cost(b);
}

// The row of this backend that covers the problem with the least work, or the reasons against the one that comes closest.
const Variant* find_row(const KernelBackend& backend, Op op, const FwdProblem& problem, const DeviceInfo& device,
                        const char* direction, std::vector<std::string>* reasons) {
  const Wanted wanted{mask_of(problem), score_of(problem)};
  const Variant* smallest = nullptr;
  std::optional<unsigned> closest;
  for (const Variant& row : variants()) {
    if (row.op != op || row.arch != backend.arch || row.smem_bytes > device.smem_bytes) continue;
    if (is_paired(row) && !takes_pairs(problem, row, device)) continue;
    const unsigned mismatch = mismatches(row, problem, wanted);
    if (mismatch == 0 && (smallest == nullptr || is_smaller(row, *smallest))) smallest = &row;
    if (!closest || std::popcount(mismatch) < std::popcount(*closest)) closest = mismatch;
  }
  if (smallest != nullptr) return smallest;
  if (closest) {
    *reasons = describe(*closest, problem, wanted);
  } else {
    *reasons = {not_built(direction, backend.name)};
  }
  return nullptr;
}

// Query heads of one KV head that share a tile ("packed GQA"): all of them, rounded up to a power of two, where that leaves
// at most three quarters of the tiles. One head a tile otherwise: its rows are copied and stored in larger pieces. Not measured.
int heads_per_tile(const FwdProblem& problem, const Variant& row) {
  if (problem.num_heads_kv() == 0 || problem.batch() == 0 || problem.block_mask) return 1;
  const int64_t group = problem.num_heads() / problem.num_heads_kv();
  if (group <= 1 || problem.q.strides[2] == 0) return 1;  // expanded heads: the copy engine gets one of them
  const int64_t heads = std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(group)), kMaxHeadsPerTile);
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t rows = problem.packed() ? ceil(problem.seqlen_q(), problem.batch()) : problem.seqlen_q();
  const int64_t unpacked = group * ceil(rows, row.block_m), packed = ceil(group, heads) * ceil(rows, row.block_m / heads);
  return 4 * packed <= 3 * unpacked ? static_cast<int>(heads) : 1;
}

// Work items of a call whose tiles hold so many positions, as the kernels' schedule counts them.
int64_t num_items(const FwdProblem& problem, int64_t positions, int64_t heads_per_tile) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t heads = problem.num_heads_kv() == 0
                            ? 0
                            : problem.num_heads_kv() * ceil(problem.num_heads() / problem.num_heads_kv(), heads_per_tile);
  if (problem.packed()) return heads * (problem.seqlen_q() / positions + problem.batch());
  return heads * ceil(problem.seqlen_q(), positions) * problem.batch() * std::max<int64_t>(problem.num_parts, 1);
}

// Work items of the backward: tiles of keys of the KV heads.
int64_t num_key_items(const FwdProblem& problem, int64_t block_n) {
  if (problem.packed()) return problem.num_heads_kv() * num_slots(problem.seqlen_k(), problem.batch(), block_n);
  return problem.num_heads_kv() * ceil_div(problem.seqlen_k(), block_n) * problem.batch();
}

// Row statistics, the float32 sum of dQ and its turns.
int64_t bwd_workspace_bytes(const FwdProblem& problem, const Variant& row, bool deterministic) {
  const int64_t rows = bwd_stats_rows(problem) * problem.num_heads() * (problem.packed() ? 1 : problem.batch());
  const int64_t column_blocks = problem.wanted & kWantDq ? num_slabs(row.head_dim) : 0;
  return 4 * rows * (2 + column_blocks * kDqBlockColumns) + (deterministic ? 4 * rows / kDqBlockRows * column_blocks : 0);
}

}  // namespace

std::string not_built(const char* kernels, const char* backend) {
  return std::string("this build has no ") + kernels + " kernel for " + backend +
         " (TORCH_CUDA_ARCH_LIST and FLASH_EXT_VARIANTS chose what was built)";
}

void fill_launch(FwdPlan* plan, const FwdProblem& problem, const DeviceInfo& device, Op op, bool packs_heads) {
  plan->num_splits = static_cast<int>(std::max<int64_t>(1, problem.num_parts));
  int64_t items;
  if (op == Op::k_bwd) {
    const int64_t ctas = ctas_of_item(*plan->variant);
    items = ctas * num_key_items(problem, ctas * plan->variant->block_n);
    plan->workspace_bytes = bwd_workspace_bytes(problem, *plan->variant, problem.deterministic);
  } else {
    plan->heads_per_tile = packs_heads ? heads_per_tile(problem, *plan->variant) : 1;
    items = num_items(problem, plan->variant->block_m / plan->heads_per_tile, plan->heads_per_tile);
  }
  // Hopper's kernels are persistent, a CTA an SM; the others take one item a CTA.
  const int64_t fewest = ctas_of_item(*plan->variant);
  const int64_t most = plan->variant->arch == 90 ? device.num_sms / fewest * fewest : items;
  plan->grid = {std::max<int64_t>(fewest, std::min<int64_t>(most, items)), 1, 1};
  const std::pair<const char*, const TensorLayout*> inputs[] = {{"q", &problem.q}, {"k", &problem.k}, {"v", &problem.v}};
  for (const auto& [name, layout] : inputs) {
    const char* reason = why_copied(*layout, problem.dtype);
    if (reason == nullptr) continue;
    plan->copies.push_back(std::string(name) + ": " + reason);
    plan->workspace_bytes += element_size(problem.dtype) * layout->sizes[0] * layout->sizes[1] * layout->sizes[2] *
                             layout->sizes[3];
  }
}

// Items of the tile schedule and rows of a head are 32-bit numbers in the kernels, and sums of rows, windows and a tile
// must be too; offsets are 64-bit.
constexpr int64_t kMaxItems = (int64_t{1} << 30) - 512;

bool kernel_sizes_fit(const FwdProblem& problem) {
  constexpr int kFewestRows = 64;  // of a tile
  return num_items(problem, kFewestRows, 1) < kMaxItems && problem.seqlen_q() < kMaxItems && problem.seqlen_k() < kMaxItems;
}

namespace {

FwdPlan plan_attention(const FwdProblem& problem, const DeviceInfo& device, Op op, const char* direction) {
  FwdPlan plan;
  for (const KernelBackend& backend : kKernelBackends) {
    std::vector<std::string> reasons;
    const Variant* row = nullptr;
    if (device.arch == 0) {
      reasons.push_back("the tensors are not on a CUDA device");
    } else {
      row = find_row(backend, op, problem, device, direction, &reasons);
      if (!device_runs(device, backend.arch)) {
        reasons.push_back("needs compute capability " + capability(backend.arch) +
                          (backend.arch == 90 ? "" : " or later") + ", this GPU has " + capability(device.arch));
      }
      if (!kernel_sizes_fit(problem)) reasons.push_back("batch * num_heads * seqlen is beyond the kernels' 32-bit tile numbers");
    }
    const bool wanted = problem.backend.empty() || problem.backend == backend.name;
    if (reasons.empty() && wanted && plan.backend.empty()) {
      plan.backend = backend.name;
      plan.variant = row;
      fill_launch(&plan, problem, device, op, /*packs_heads=*/true);
      continue;
    }
    if (reasons.empty()) reasons.push_back(wanted ? plan.backend + " is preferred" : "backend '" + problem.backend + "' was asked for");
    plan.rejected.push_back({backend.name, std::move(reasons)});
  }
  const bool reference = problem.backend.empty() || problem.backend == "reference";
  if (!plan.backend.empty()) {
    plan.rejected.push_back({"reference", {plan.backend + " is preferred"}});
  } else if (reference) {
    plan.backend = "reference";
  }
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
  return plan_attention(problem, device, Op::k_fwd, "forward");
}

FwdPlan plan_bwd(const FwdProblem& problem, const DeviceInfo& device) {
  return plan_attention(problem, device, Op::k_bwd, "backward");
}

int64_t bwd_stats_rows(const FwdProblem& problem) {
  const int64_t slots = problem.packed() ? num_slots(problem.seqlen_q(), problem.batch(), kStatsRowAlignment)
                                         : ceil_div<int64_t>(problem.seqlen_q(), kStatsRowAlignment);
  return slots * kStatsRowAlignment;
}

const Variant* plan_bwd_postprocess(ScalarType dtype, int arch) {
  for (const Variant& variant : variants()) {
    if (variant.op == Op::k_bwd_postprocess && variant.arch == arch && variant.dtype == dtype) return &variant;
  }
  return nullptr;
}

const Variant* plan_bwd_sinks(int arch) {
  for (const Variant& variant : variants()) {
    if (variant.op == Op::k_bwd_sinks && variant.arch == arch) return &variant;
  }
  return nullptr;
}

const Variant* plan_fill_unused(const DeviceInfo& device) {
  for (const KernelBackend& backend : kKernelBackends) {
    if (!device_runs(device, backend.arch)) continue;
    for (const Variant& variant : variants()) {
      if (variant.op == Op::k_fill_unused && variant.arch == backend.arch) return &variant;
    }
  }
  return nullptr;
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

const Variant* plan_mask_blocks(const DeviceInfo& device) {
  for (const KernelBackend& backend : kKernelBackends) {
    if (!device_runs(device, backend.arch)) continue;
    for (const Variant& variant : variants()) {
      if (variant.op == Op::k_mask_blocks && variant.arch == backend.arch) return &variant;
    }
  }
  return nullptr;
}

}  // namespace flash_ext
