// Kernels of one call behind one another (programmatic dependent launch, compute capability 9.0): a dependent kernel is put on
// the SMs while the one before it in the stream ends, and waits there, so that its launch costs no time of its own.
//
//   before    allow_next_kernel() as soon as its successor may take what SMs have left; without it, when its CTAs end
//   dependent wait_for_previous_kernel() by every thread, before it touches global memory: all that the kernels before have
//             written is visible behind it. Where it is launched in the usual way both do nothing.
#pragma once

#include <cuda_runtime.h>

namespace flash_ext {

#ifdef __CUDACC__
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// dependent: only for kernels compiled for 9.0 and later that call wait_for_previous_kernel(). Its own status, not
// cudaGetLastError(): that would blame this launch for an earlier call's error.
inline cudaError_t launch_kernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                 cudaStream_t stream, bool dependent) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace flash_ext
