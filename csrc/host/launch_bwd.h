// What every op body of the backward does once there is a plan: workspace, results, params, launches.
#pragma once

#include <tuple>

#include "common/block_list.cuh"
#include "host/emulator.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dsinks, dk_bias

// blocks: the lists, of a variant whose mask is lists. memory: holds what the caller's own params point to.
Gradients launch_bwd(const std::optional<Tensor>& dout, const std::optional<Tensor>& dlse, const AttentionInputs& inputs,
                     const Tensor& out, const Tensor& lse, const FwdProblem& problem, const FwdPlan& plan,
                     const DeviceInfo& device, const BlockListParams& blocks, OpMemory& memory);

}  // namespace flash_ext
