// Op bodies of attention with a BlockMask: problem -> plan -> launch, or the reference with the reasons why.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "common/block_list.cuh"
#include "host/check.h"
#include "host/emulator.h"
#include "host/launch_bwd.h"
#include "host/launch_fwd.h"
#include "host/ops.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// One direction of a mask, its three tensors: rows of q's blocks or columns of k's.
struct Lists {
  const Tensor &offsets, &num_partial, &entries, &order;
};

// Memory safety: shapes and dtypes. The values are clamped on the device. seqlen: of the lines' own sequence.
BlockListParams block_list_params(const Lists& lists, const Tensor& bits, const FwdProblem& problem, int64_t seqlen,
                                  int64_t other_seqlen, const char* name) {
  using TorchType = torch::headeronly::ScalarType;
  for (const Tensor* tensor : {&lists.offsets, &lists.num_partial, &lists.entries, &lists.order, &bits}) {
    FX_CHECK(tensor->scalar_type() == TorchType::Int && tensor->is_contiguous(), "attention: the tensors of ", name,
             " must be contiguous and int32");
  }
  const Tensor& partial = lists.num_partial;
  const int64_t blocks = ceil_div<int64_t>(seqlen, kMaskBlock);
  FX_CHECK(partial.dim() == 3 && (partial.size(0) == 1 || partial.size(0) == problem.batch()) &&
               (partial.size(1) == 1 || partial.size(1) == problem.num_heads()) && partial.size(2) == blocks &&
               lists.offsets.dim() == 1 && lists.offsets.numel() == partial.numel() + 1 && lists.order.dim() == 1 &&
               lists.order.numel() == blocks,
           "attention: ", name, " was built for another call");
  FX_CHECK(lists.entries.dim() == 2 && lists.entries.size(1) == 2 && lists.entries.size(0) <= std::numeric_limits<int>::max(),
           "attention: the entries of ", name, " must be (entries, 2)");
  FX_CHECK(bits.dim() == 4 && bits.size(1) == 2 && bits.size(2) == kMaskBlock && bits.size(3) == kMaskWords,
           "attention: bits of a block_mask must be (partial blocks, 2, ", kMaskBlock, ", ", kMaskWords, ")");
  const int64_t heads = partial.size(1);
  FX_CHECK(heads * blocks <= std::numeric_limits<int>::max(), "attention: ", name, " has too many lines");
  return {.offsets = static_cast<const int*>(lists.offsets.data_ptr()),
          .num_partial = static_cast<const int*>(partial.data_ptr()),
          .entries = static_cast<const BlockEntry*>(lists.entries.data_ptr()),
          .bits = static_cast<const uint32_t*>(bits.data_ptr()),
          .turns = nullptr,
          .order = static_cast<const int*>(lists.order.data_ptr()),
          .num_own_blocks = static_cast<int>(blocks),
          .batch_stride = partial.size(0) == 1 ? 0 : heads * blocks,
          .head_stride = heads == 1 ? 0 : static_cast<int>(blocks),
          .num_entries = static_cast<int>(lists.entries.size(0)),
          .num_bits = static_cast<int>(bits.size(0)),
          .num_blocks = static_cast<int>(ceil_div<int64_t>(other_seqlen, kMaskBlock))};
}

void add_lists(OpMemory& memory, const Lists& lists, const Tensor& bits) {
  memory.add(lists.offsets, MemoryRole::kIn, "offsets");
  memory.add(lists.num_partial, MemoryRole::kIn, "num_partial");
  memory.add(lists.entries, MemoryRole::kIn, "entries");
  memory.add(lists.order, MemoryRole::kIn, "order");
  memory.add(bits, MemoryRole::kIn, "bits");
}

AttentionInputs dense_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sinks,
                             const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& k_bias,
                             double softmax_scale, double softcap) {
  return {.q = q, .k = k, .v = v, .cu_seqlens_q = {}, .cu_seqlens_k = {}, .seqused_q = {}, .seqused_k = {}, .leftpad_q = {},
          .leftpad_k = {}, .sinks = sinks, .alibi_slopes = alibi_slopes, .k_bias = k_bias, .softmax_scale = softmax_scale,
          .causal = false, .window_left = -1, .window_right = -1, .softcap = softcap, .split_boundaries = {}};
}

// Appends the arguments of the reference ops from row_offsets to softcap.
template <class... Arguments>
void push_all(std::vector<StableIValue>* stack, const Arguments&... arguments) {
  (stack->push_back(from(arguments)), ...);
}

}  // namespace

FwdResults fwd_block_mask(Tensor q, Tensor k, Tensor v, FX_BLOCK_MASK_PARAMETERS, bool return_max_logit,
                          bool /*deterministic*/, std::optional<std::string> backend) {
  const AttentionInputs inputs = dense_inputs(q, k, v, sinks, alibi_slopes, k_bias, softmax_scale, softcap);
  FwdProblem problem = problem_from_inputs(inputs, backend);
  problem.block_mask = true;
  const DeviceInfo& device = device_info_of(q);
  const FwdPlan plan = plan_fwd(problem, device);
  FX_CHECK(!plan.backend.empty(), "attention: backend '", problem.backend, "' cannot run this call; ",
           plan.rejections_as_text());
  const Lists rows{row_offsets, row_partial, row_entries, row_order};
  const BlockListParams blocks = block_list_params(rows, bits, problem, problem.seqlen_q(), problem.seqlen_k(), "block_mask.rows");
  if (plan.variant == nullptr) {
    std::vector<StableIValue> stack;
    push_all(&stack, q, k, v, FX_BLOCK_MASK_NAMES, return_max_logit,
             problem.backend.empty() ? plan.rejections_as_text() : std::string());
    call_op("flash_ext::reference_fwd_block_mask", stack.data());
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
  OpMemory memory;
  add_lists(memory, rows, bits);
  return launch_fwd(inputs, problem, plan, device, return_max_logit, blocks, memory);
}

Gradients bwd_block_mask(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                         Tensor lse, FX_BLOCK_MASK_PARAMETERS, bool deterministic, int64_t wanted,
                         std::optional<std::string> backend) {
  const AttentionInputs inputs = dense_inputs(q, k, v, sinks, alibi_slopes, k_bias, softmax_scale, softcap);
  FwdProblem problem = problem_from_inputs(inputs, backend);
  problem.block_mask = true;
  problem.deterministic = deterministic;
  problem.wanted = wanted;
  const DeviceInfo& device = device_info_of(q);
  const FwdPlan plan = plan_bwd(problem, device);
  if (plan.variant != nullptr) {
    const Lists columns{column_offsets, column_partial, column_entries, column_order};
    BlockListParams blocks =
        block_list_params(columns, bits, problem, problem.seqlen_k(), problem.seqlen_q(), "block_mask.columns");
    FX_CHECK(turns.scalar_type() == torch::headeronly::ScalarType::Int && turns.is_contiguous() && turns.dim() == 1 &&
                 turns.numel() == blocks.num_entries,
             "attention: turns of a block_mask must be contiguous and int32, one for each entry of its columns");
    blocks.turns = static_cast<const int*>(turns.data_ptr());
    OpMemory memory;
    add_lists(memory, columns, bits);
    memory.add(turns, MemoryRole::kIn, "turns");
    return launch_bwd(dout, dlse, inputs, out, lse, problem, plan, device, blocks, memory);
  }
  const std::string reason = backend == "reference" ? "" : plan.rejections_as_text();
  std::vector<StableIValue> stack;
  push_all(&stack, dout, dlse, q, k, v, out, lse, FX_BLOCK_MASK_NAMES, deterministic, wanted, reason);
  call_op("flash_ext::reference_bwd_block_mask", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

}  // namespace flash_ext
