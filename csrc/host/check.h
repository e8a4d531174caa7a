// Errors of the host side: one sentence that names the op, the argument and the values, or the CUDA call and the variant.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace flash_ext {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace flash_ext

// FX_CHECK(a == b, "fwd: k.head_dim must equal q.head_dim, got ", a, " and ", b);
#define FX_CHECK(condition, ...)                         \
  do {                                                   \
    if (!(condition)) ::flash_ext::fail(__VA_ARGS__);    \
  } while (false)

// what: the variant or call that failed.
#define FX_CUDA_CHECK(call, what)                                                                \
  do {                                                                                           \
    const cudaError_t error_ = (call);                                                           \
    if (error_ != cudaSuccess) {                                                                 \
      const std::string text_ = cudaGetErrorString(error_);                                      \
      (void)cudaGetLastError(); /* reported here: the next call starts clean */                  \
      ::flash_ext::fail(what, ": ", cudaGetErrorName(error_), ": ", text_);                      \
    }                                                                                            \
  } while (false)
