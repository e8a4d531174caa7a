// One forward kernel of CUTLASS's example 88 (TMA, warp-specialised, two consumer warpgroups), causal,
// fp16, head_dim 64, callable from Python.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/kernel_hardware_info.h"

#include "collective/fmha_fusion.hpp"
#include "device/device_universal.hpp"
#include "kernel/fmha_kernel_builder.hpp"

using namespace cute;

namespace {

using Half = cutlass::half_t;
using Strides = cute::tuple<int, _1, cute::tuple<int, int>>;  // row, element, (batch, head)
using Kernel = cutlass::fmha::kernel::FmhaBuilder<Half, float, float, Shape<_128, _64, _64>, Strides, Strides, Strides,
                                                  cutlass::fmha::collective::CausalFusion,
                                                  cutlass::gemm::KernelTmaWarpSpecializedCooperative>::Kernel;
using Operation = cutlass::device::Universal<Kernel>;

constexpr int kHeadDim = 64;

Strides strides(int heads, int rows) { return {kHeadDim, _1{}, {heads * rows * kHeadDim, rows * kHeadDim}}; }

}  // namespace

// All tensors are (batch, head, row, head_dim), lse is (batch, head, row).
extern "C" int run_fmha(int batch, int heads, int seqlen_q, int seqlen_k, void* q, void* k, void* v, void* out,
                        float* lse, int num_sms) {
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = num_sms;
  const Strides q_strides = strides(heads, seqlen_q), kv_strides = strides(heads, seqlen_k);
  typename Operation::Arguments arguments{
      {batch, heads, seqlen_q, seqlen_k, kHeadDim},
      {static_cast<Half*>(q), q_strides, static_cast<Half*>(k), kv_strides, static_cast<Half*>(v), kv_strides},
      {static_cast<Half*>(out), q_strides, lse, {_1{}, {heads * seqlen_q, seqlen_q}}},
      hardware};
  Operation operation;
  if (operation.can_implement(arguments) != cutlass::Status::kSuccess) return -1;
  if (Operation::get_workspace_size(arguments) != 0) return -2;
  if (operation.initialize(arguments, nullptr) != cutlass::Status::kSuccess) return -3;
  if (operation.run() != cutlass::Status::kSuccess) return cudaGetLastError() ? cudaErrorLaunchFailure : -4;
  return cudaGetLastError();
}
