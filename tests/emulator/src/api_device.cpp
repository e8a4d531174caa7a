// The runtime API, part 2: the device, errors, streams, events and driver entry points.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <utility>

#include "runtime.h"
#include "tma.h"

using namespace flash_ext::emulator;

namespace {

constexpr int kCudaVersion = 13000;
constexpr size_t kTotalMemory = size_t{16} << 30;
constexpr int kClockKhz = 1500000;

const DeviceModel& device() { return device_model(static_cast<int>(Runtime::get().options().sm_version)); }

void require_device(int index) {
  if (index != 0) {
    throw ApiError(cudaErrorInvalidDevice, "device " + std::to_string(index) + " asked for, there is one");
  }
}

struct ErrorText {
  cudaError_t code;
  const char *name, *text;
};

// The codes that this runtime returns.
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration", "__global__ function call is not configured"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidPtx, "cudaErrorInvalidPtx", "a PTX JIT compilation failed"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge", "too many blocks in cooperative launch"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "invalid cluster size"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const ErrorText* find_error(cudaError_t code) {
  for (const ErrorText& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

// Attributes as cudaDeviceGetAttribute names them; the property structure is filled from the same.
int attribute_value(cudaDeviceAttr attribute) {
  const DeviceModel& d = device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return d.major();
    case cudaDevAttrComputeCapabilityMinor:
      return d.minor();
    case cudaDevAttrMultiProcessorCount:
      return static_cast<int>(Runtime::get().options().num_sms);
    case cudaDevAttrMaxThreadsPerBlock:
      return kMaxThreadsPerCta;
    case cudaDevAttrMaxBlockDimX:
      return 1024;
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 0x7fffffff;
    case cudaDevAttrMaxGridDimY:
      return 65535;
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kSharedPerCta;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return d.shared_per_cta_optin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return d.shared_per_sm;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return kReservedSharedPerCta;
    case cudaDevAttrTotalConstantMemory:
      return 65536;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
      return kRegistersPerSm;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return kRegistersPerSm;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return d.threads_per_sm;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return d.ctas_per_sm;
    case cudaDevAttrL2CacheSize:
      return d.l2_bytes;
    case cudaDevAttrClockRate:
      return kClockKhz;
    case cudaDevAttrMemoryClockRate:
      return kClockKhz;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrClusterLaunch:
      return d.has_clusters();
    case cudaDevAttrCooperativeLaunch:
      return 1;
    case cudaDevAttrConcurrentKernels:
      return 0;
    case cudaDevAttrUnifiedAddressing:
      return 1;
    case cudaDevAttrManagedMemory:
      return 1;
    case cudaDevAttrConcurrentManagedAccess:
      return 1;
    case cudaDevAttrMemoryPoolsSupported:
      return 0;
    case cudaDevAttrComputePreemptionSupported:
      return 1;
    case cudaDevAttrEccEnabled:
      return 0;
    case cudaDevAttrIntegrated:
      return 0;
    default:
      throw ApiError(cudaErrorNotSupported, "device attribute " + std::to_string(attribute) + " is not emulated");
  }
}

struct Event {
  std::chrono::steady_clock::time_point time;
  bool recorded = false;
};

Event& event_of(cudaEvent_t handle) {
  if (!handle) throw ApiError(cudaErrorInvalidResourceHandle, "null event");
  return *reinterpret_cast<Event*>(handle);
}

struct Stream {
  unsigned flags;
  int priority;
};

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const std::string refusal = encode_tensor_map(
      {static_cast<int>(type), rank, reinterpret_cast<uint64_t>(address), dims, strides, box, element_strides,
       static_cast<int>(interleave), static_cast<int>(swizzle), static_cast<int>(promotion), static_cast<int>(fill)},
      map);
  if (refusal.empty()) return CUDA_SUCCESS;
  ThreadErrors& errors = thread_errors();
  errors.message = "cuTensorMapEncodeTiled: " + refusal;
  errors.code = cudaErrorInvalidValue;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult error_string(CUresult result, const char** text) {
  const ErrorText* error = find_error(static_cast<cudaError_t>(result));
  *text = error ? error->text : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult driver_version(int* version) {
  *version = kCudaVersion;
  return CUDA_SUCCESS;
}

}  // namespace

void* flash_ext::emulator::driver_entry_point(const std::string& name) {
  if (name == "cuTensorMapEncodeTiled") return reinterpret_cast<void*>(&encode_tiled);
  if (name == "cuGetErrorString") return reinterpret_cast<void*>(&error_string);
  if (name == "cuDriverGetVersion") return reinterpret_cast<void*>(&driver_version);
  return nullptr;
}

extern "C" {

// -- errors

cudaError_t cudaGetLastError() { return std::exchange(thread_errors().last, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return thread_errors().last; }

const char* cudaGetErrorName(cudaError_t code) {
  const ErrorText* error = find_error(code);
  return error ? error->name : "unrecognized error code";
}

// For the thread's last failure the text goes on with what the emulator knows about it.
const char* cudaGetErrorString(cudaError_t code) {
  const ErrorText* error = find_error(code);
  const char* const text = error ? error->text : "unrecognized error code";
  const ThreadErrors& errors = thread_errors();
  if (code == cudaSuccess || code != errors.code || errors.message.empty()) return text;
  thread_local std::string full;
  full = std::string(text) + ": " + errors.message;
  return full.c_str();
}

// -- the device

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  return guarded([&] { require_device(index); });
}

cudaError_t cudaInitDevice(int index, unsigned, unsigned) { return cudaSetDevice(index); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  return guarded([&] {
    require_device(index);
    *value = attribute_value(attribute);
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int index) {
  return guarded([&] {
    require_device(index);
    const DeviceModel& d = device();
    *out = {};
    std::strncpy(out->name, d.name, sizeof(out->name) - 1);
    out->totalGlobalMem = kTotalMemory;
    out->sharedMemPerBlock = kSharedPerCta;
    out->regsPerBlock = out->regsPerMultiprocessor = kRegistersPerSm;
    out->warpSize = 32;
    out->maxThreadsPerBlock = kMaxThreadsPerCta;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
    out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = 0x7fffffff;
    out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->totalConstMem = 65536;
    out->major = d.major();
    out->minor = d.minor();
    out->multiProcessorCount = static_cast<int>(Runtime::get().options().num_sms);
    out->unifiedAddressing = out->managedMemory = out->cooperativeLaunch = 1;
    out->memoryBusWidth = 5120;
    out->l2CacheSize = d.l2_bytes;
    out->maxThreadsPerMultiProcessor = d.threads_per_sm;
    out->sharedMemPerMultiprocessor = d.shared_per_sm;
    out->sharedMemPerBlockOptin = d.shared_per_cta_optin;
    out->maxBlocksPerMultiProcessor = d.ctas_per_sm;
    out->reservedSharedMemPerBlock = kReservedSharedPerCta;
    out->clusterLaunch = d.has_clusters();
  });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaDeviceReset() { return cudaSuccess; }

cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  return guarded([&] {
    if (!symbol || !function) throw ApiError(cudaErrorInvalidValue, "null argument");
    *function = driver_entry_point(symbol);
    if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  });
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(symbol, function, kCudaVersion, flags, status);
}

// -- streams: everything has run by the time a call returns

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream{flags, priority});
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread) {
    return fail(cudaErrorInvalidResourceHandle, "the default stream cannot be destroyed");
  }
  delete reinterpret_cast<Stream*>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// -- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return guarded([&] { delete &event_of(event); });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return guarded([&] { event_of(event) = {std::chrono::steady_clock::now(), true}; });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return guarded([&] { event_of(event); });
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
  return guarded([&] {
    const Event &a = event_of(start), &b = event_of(stop);
    if (!a.recorded || !b.recorded) {
      throw ApiError(cudaErrorInvalidResourceHandle, "an event was never recorded");
    }
    *milliseconds = std::chrono::duration<float, std::milli>(b.time - a.time).count();
  });
}

}  // extern "C"
