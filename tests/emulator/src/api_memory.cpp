// The runtime API, part 3: memory. Device memory is host memory; copies and fills happen at once.
#include <cuda_runtime_api.h>

#include <cstring>

#include "emulator_api.h"
#include "runtime.h"

using namespace flash_ext::emulator;

namespace {

// Start of `bytes` bytes at `offset` in a device variable.
char* symbol_range(const void* symbol, size_t offset, size_t bytes) {
  size_t size = 0;
  char* const address = static_cast<char*>(Runtime::get().symbol_address(symbol, &size));
  if (offset > size || bytes > size - offset) {
    throw ApiError(cudaErrorInvalidValue, "bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) +
                                              " of a variable of " + std::to_string(size) + " bytes");
  }
  return address + offset;
}

// Memory that the host may write directly counts as initialised: role kInOut.
cudaError_t allocate(void** pointer, size_t bytes, Role role, const char* name) {
  return guarded([&] {
    if (!pointer) throw ApiError(cudaErrorInvalidValue, "null argument");
    *pointer = bytes ? Runtime::get().memory().allocate(bytes, role, name) : nullptr;
    if (bytes && !*pointer) throw ApiError(cudaErrorMemoryAllocation, "the host has no memory left");
  });
}

cudaError_t release(void* pointer) {
  return guarded([&] {
    if (pointer && !Runtime::get().memory().release(pointer)) {
      throw ApiError(cudaErrorInvalidValue, "freed a pointer that was not allocated, or freed already");
    }
  });
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  return guarded([&] {
    if (bytes && (!to || !from)) throw ApiError(cudaErrorInvalidValue, "copy from or to a null pointer");
    if (bytes) std::memmove(to, from, bytes);
    Runtime::get().memory().host_write(to, bytes);
  });
}

cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height) {
  if (width > to_pitch || width > from_pitch) {
    return fail(cudaErrorInvalidPitchValue, "rows are wider than the pitch");
  }
  for (size_t row = 0; row < height; ++row) {
    const cudaError_t error =
        copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    if (error) return error;
  }
  return cudaSuccess;
}

cudaError_t fill(void* to, int value, size_t bytes) {
  return guarded([&] {
    if (bytes && !to) throw ApiError(cudaErrorInvalidValue, "fill of a null pointer");
    if (bytes) std::memset(to, value, bytes);
    Runtime::get().memory().host_write(to, bytes);
  });
}

}  // namespace

extern "C" {

void flash_ext_emulator_register(const void* ptr, size_t bytes, int role, const char* name) {
  Runtime::get().memory().add(ptr, bytes, static_cast<Role>(role), name ? name : "");
}

void flash_ext_emulator_clear() { Runtime::get().memory().clear(); }

const char* flash_ext_emulator_message() { return thread_errors().message.c_str(); }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate(pointer, bytes, Role::kWorkspace, "cudaMalloc");
}

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes, Role::kWorkspace, "cudaMallocAsync");
}

cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, Role::kInOut, "cudaMallocManaged");
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return allocate(pointer, bytes, Role::kInOut, "cudaMallocHost");
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, Role::kInOut, "cudaHostAlloc");
}

cudaError_t cudaFree(void* pointer) { return release(pointer); }

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }

cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{16} << 30;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind) {
  return copy_rows(to, to_pitch, from, from_pitch, width, height);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  return copy_rows(to, to_pitch, from, from_pitch, width, height);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) { return fill(to, value, bytes); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return fill(to, value, bytes); }

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return guarded([&] { *address = symbol_range(symbol, 0, 0); });
}

cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) {
  return guarded([&] { Runtime::get().symbol_address(symbol, size); });
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  return guarded([&] { std::memcpy(symbol_range(symbol, offset, bytes), from, bytes); });
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}

cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  return guarded([&] { std::memcpy(to, symbol_range(symbol, offset, bytes), bytes); });
}

cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind,
                                      cudaStream_t) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  return guarded([&] {
    const bool known = Runtime::get().memory().find_allocation(pointer).has_value();
    *out = {};
    out->type = known ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    out->devicePointer = known ? const_cast<void*>(pointer) : nullptr;
    out->hostPointer = const_cast<void*>(pointer);
  });
}

}  // extern "C"
