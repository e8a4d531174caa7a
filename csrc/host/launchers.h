// From a variant's name to the function that launches it. Defined by the generated launchers.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "common/kvcache_params.h"
#include "common/fp8_params.h"
#include "common/params.h"
#include "common/quantize_params.h"

namespace flash_ext {

using FwdLauncher = cudaError_t (*)(const FwdParams&, cudaStream_t);
using FillUnusedLauncher = cudaError_t (*)(const FillUnusedParams&, cudaStream_t);
using MaskBlocksLauncher = cudaError_t (*)(const MaskBlocksParams&, cudaStream_t);
using BwdLauncher = cudaError_t (*)(const BwdParams&, cudaStream_t);
using BwdPostprocessLauncher = cudaError_t (*)(const BwdPostprocessParams&, cudaStream_t);
using BwdSinksLauncher = cudaError_t (*)(const BwdSinksParams&, cudaStream_t);
using BwdPreprocessLauncher = cudaError_t (*)(const BwdPreprocessParams&, cudaStream_t);
using AppendKvLauncher = cudaError_t (*)(const AppendKvParams&, cudaStream_t);
using FwdCacheLauncher = cudaError_t (*)(const FwdCacheParams&, cudaStream_t);
using CombineLauncher = cudaError_t (*)(const CombineParams&, cudaStream_t);
using FwdFp8Launcher = cudaError_t (*)(const FwdFp8Params&, cudaStream_t);
using FwdFp8CacheLauncher = cudaError_t (*)(const FwdFp8CacheParams&, cudaStream_t);
using QuantizeFp8Launcher = cudaError_t (*)(const QuantizeFp8Params&, cudaStream_t);

// Null when this build holds no such variant.
FwdLauncher find_fwd(std::string_view variant);
FillUnusedLauncher find_fill_unused(std::string_view variant);
BwdLauncher find_bwd(std::string_view variant);
BwdPostprocessLauncher find_bwd_postprocess(std::string_view variant);
BwdSinksLauncher find_bwd_sinks(std::string_view variant);
BwdPreprocessLauncher find_bwd_preprocess(std::string_view variant);
MaskBlocksLauncher find_mask_blocks(std::string_view variant);
AppendKvLauncher find_append_kv(std::string_view variant);
CombineLauncher find_combine(std::string_view variant);
FwdCacheLauncher find_fwd_cache(std::string_view variant);
FwdCacheLauncher find_fwd_cache_gather(std::string_view variant);
FwdCacheLauncher find_fwd_mla(std::string_view variant);
FwdCacheLauncher find_fwd_mla_gather(std::string_view variant);
FwdFp8Launcher find_fwd_fp8(std::string_view variant);
FwdFp8CacheLauncher find_fwd_fp8_cache(std::string_view variant);
FwdFp8CacheLauncher find_fwd_fp8_cache_gather(std::string_view variant);
QuantizeFp8Launcher find_quantize_fp8(std::string_view variant);

}  // namespace flash_ext
