// What every op body of the forward does once there is a plan: copies, results, params, launch.
#pragma once

#include <tuple>

#include "common/block_list.cuh"
#include "host/emulator.h"
#include "host/plan.h"
#include "host/tensor.h"

namespace flash_ext {

using FwdResults = std::tuple<Tensor, Tensor, Tensor>;  // out, lse, max_logit

// blocks: the lists, of a variant whose mask is lists. memory: holds what the caller's own params point to.
FwdResults launch_fwd(const AttentionInputs& inputs, const FwdProblem& problem, const FwdPlan& plan, const DeviceInfo& device,
                      bool return_max_logit, const BlockListParams& blocks, OpMemory& memory);

}  // namespace flash_ext
