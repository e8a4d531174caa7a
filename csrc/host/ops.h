// The op bodies. Schemas, shapes and errors: flash_ext/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace flash_ext {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal, int64_t window_left,
                               int64_t window_right, double softcap, bool deterministic,
                               std::optional<std::string> backend);

std::tuple<Tensor, Tensor, Tensor> bwd(std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                                       Tensor out, Tensor lse, double softmax_scale, bool causal, int64_t window_left,
                                       int64_t window_right, double softcap, bool deterministic,
                                       std::optional<std::string> backend);

std::tuple<Tensor, Tensor> bwd_preprocess(Tensor out, Tensor dout, Tensor lse, std::optional<Tensor> dlse);

}  // namespace flash_ext
