// Host code as an extension has it; every function returns a cudaError_t.
#include <cuda_runtime.h>

#define TRY(call)                                       \
  do {                                                  \
    if (const cudaError_t error = (call)) return error; \
  } while (0)

// Returns an error and forgets it, so that it is not blamed on the next call.
static int forget(cudaError_t error) {
  (void)cudaGetLastError();
  return error;
}

extern "C" __global__ void twice(int* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = static_cast<unsigned>(x[i]) << 1;
}

extern "C" __global__ void __launch_bounds__(256) bounded(int* x) {
  if (x) atomicAdd(x, 1);
}

extern "C" __global__ void __launch_bounds__(256, 2) two_per_sm(int* x) {
  __shared__ int box[256];
  box[threadIdx.x] = threadIdx.x;
  __syncthreads();
  x[threadIdx.x] = box[255 - threadIdx.x];
}

// Like `bounded`, but the host changes its attributes.
extern "C" __global__ void __launch_bounds__(256) tuned(int* x) {
  if (x) x[threadIdx.x] = 1;
}

__device__ int counter = 5;
__constant__ int table[4];

extern "C" __global__ void use_variables(int* out) {
  out[0] = counter;
  counter += 1;
  out[1] = table[2];
}

template <class Function>
static int on_device(int* out, int n, Function&& function) {
  int* device;
  TRY(cudaMalloc(&device, n * sizeof(int)));
  TRY(cudaMemset(device, 0, n * sizeof(int)));
  const cudaError_t error = function(device);
  TRY(cudaMemcpy(out, device, (n < 64 ? n : 64) * sizeof(int), cudaMemcpyDeviceToHost));
  TRY(cudaFree(device));
  return error;
}

extern "C" int device(int* out) {
  cudaDeviceProp p;
  TRY(cudaGetDeviceProperties(&p, 0));
  int attribute = 0;
  TRY(cudaDeviceGetAttribute(&attribute, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  if (static_cast<size_t>(attribute) != p.sharedMemPerBlockOptin) return -1;
  const int values[] = {p.major,
                        p.minor,
                        p.multiProcessorCount,
                        attribute,
                        static_cast<int>(p.sharedMemPerMultiprocessor),
                        p.maxThreadsPerMultiProcessor,
                        p.maxBlocksPerMultiProcessor,
                        p.clusterLaunch};
  for (int i = 0; i < 8; ++i) out[i] = values[i];
  TRY(cudaGetDeviceCount(out + 8));
  TRY(cudaGetDevice(out + 9));
  out[10] = p.warpSize;
  out[11] = p.regsPerMultiprocessor;
  return cudaSuccess;
}

extern "C" int other_device() { return forget(cudaSetDevice(1)); }

extern "C" int round_trip(int* out, int n) {
  int* device;
  TRY(cudaMalloc(&device, n * sizeof(int)));
  int* host = new int[n];
  for (int i = 0; i < n; ++i) host[i] = i;
  TRY(cudaMemcpy(device, host, n * sizeof(int), cudaMemcpyHostToDevice));
  const int block = n < 128 ? n : 128, grid = (n + 127) / 128;
  twice<<<grid, block>>>(device, n);
  const cudaError_t error = cudaGetLastError();
  TRY(cudaMemcpy(host, device, n * sizeof(int), cudaMemcpyDeviceToHost));
  for (int i = 0; i < 64 && i < n; ++i) out[i] = host[i];
  delete[] host;
  TRY(cudaFree(device));
  return error;
}

// Four kinds of launch, 64 threads each, one counter each.
extern "C" int launch_ways(int* out) {
  return on_device(out, 4, [](int* x) {
    bounded<<<2, 32>>>(x);
    TRY(cudaGetLastError());
    int* second = x + 1;
    void* arguments[] = {&second};
    TRY(cudaLaunchKernel(reinterpret_cast<const void*>(bounded), dim3(1), dim3(64), arguments, 0, nullptr));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = 2;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2);
    config.blockDim = dim3(32);
    config.attrs = attributes;
    config.numAttrs = 2;
    TRY(cudaLaunchKernelEx(&config, bounded, x + 2));
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    return cudaLaunchKernelEx(&config, bounded, x + 3);
  });
}

extern "C" int variables(int* out) {
  const int values[4] = {0, 0, 70, 0};
  TRY(cudaMemcpyToSymbol(table, values, sizeof(values)));
  size_t size = 0;
  TRY(cudaGetSymbolSize(&size, table));
  int results[2];
  TRY(static_cast<cudaError_t>(on_device(results, 2, [](int* x) {
    use_variables<<<1, 1>>>(x);
    return cudaGetLastError();
  })));
  out[0] = results[0];
  TRY(cudaMemcpyFromSymbol(out + 1, counter, sizeof(int)));
  out[2] = static_cast<int>(size);
  out[3] = results[1];
  const int again = 5;
  return cudaMemcpyToSymbol(counter, &again, sizeof(int));
}

extern "C" int occupancy(int* out) {
  TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(out, tuned, 256, 0));
  TRY(cudaFuncSetAttribute(tuned, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024));
  TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(out + 1, tuned, 256, 100 * 1024));
  TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(out + 2, two_per_sm, 256, 0));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(64);
  config.blockDim = dim3(256);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(out + 3, two_per_sm, &config);
}

extern "C" int function_attributes(int* out) {
  cudaFuncAttributes a;
  TRY(cudaFuncGetAttributes(&a, two_per_sm));
  out[0] = a.maxThreadsPerBlock;
  out[1] = static_cast<int>(a.sharedSizeBytes);
  out[2] = a.maxDynamicSharedSizeBytes;
  TRY(cudaFuncSetAttribute(two_per_sm, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024));
  TRY(cudaFuncGetAttributes(&a, two_per_sm));
  out[3] = a.maxDynamicSharedSizeBytes;
  out[4] = a.numRegs;
  return cudaSuccess;
}

extern "C" int streams(int* out) {
  cudaStream_t stream;
  cudaEvent_t start, stop;
  float milliseconds = -1;
  TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  TRY(cudaEventCreate(&start));
  TRY(cudaEventCreate(&stop));
  out[1] = cudaEventElapsedTime(&milliseconds, start, stop) == cudaErrorInvalidResourceHandle;
  (void)cudaGetLastError();
  TRY(cudaEventRecord(start, stream));
  const int code = on_device(out + 8, 1, [&](int* x) {
    bounded<<<1, 32, 0, stream>>>(x);
    return cudaStreamSynchronize(stream);
  });
  TRY(cudaEventRecord(stop, stream));
  TRY(cudaEventSynchronize(stop));
  TRY(cudaEventElapsedTime(&milliseconds, start, stop));
  out[0] = milliseconds >= 0 && code == 0 && out[8] == 32;
  TRY(cudaEventDestroy(start));
  TRY(cudaEventDestroy(stop));
  return cudaStreamDestroy(stream);
}

extern "C" int launch_config(int grid, int block, int shared, int cluster) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, bounded, static_cast<int*>(nullptr));
  return cudaGetLastError() == error ? error : -1;
}

extern "C" int set_shared_limit(int bytes) {
  return forget(cudaFuncSetAttribute(tuned, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

extern "C" int not_a_kernel() {
  const void* const function = reinterpret_cast<const void*>(&set_shared_limit);
  return forget(cudaLaunchKernel(function, dim3(1), dim3(1), nullptr, 0, nullptr));
}

extern "C" int on_pointer(int* x, int n) {
  twice<<<1, n>>>(x, n);
  return cudaGetLastError();
}

extern "C" int use_after_free() {
  int* x;
  TRY(cudaMalloc(&x, 256));
  TRY(cudaFree(x));
  twice<<<1, 64>>>(x, 64);
  return cudaGetLastError();
}

extern "C" int free_twice() {
  int* x;
  TRY(cudaMalloc(&x, 256));
  TRY(cudaFree(x));
  return forget(cudaFree(x));
}

extern "C" const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
