#include "gpu_device.hpp"

#include <algorithm>
#include <utility>

#include "error.hpp"
#include "library.hpp"

namespace stca::core {

CudaFunctions CudaFunctions::load(int major) {
  const Library library(("libcudart.so." + std::to_string(major)).c_str(), "STCA_CUDART_LIBRARY");
  CudaFunctions all{};
  const auto get = [&](auto& function, const char* name) {
    function = library.get<std::decay_t<decltype(function)>>(name);
  };
  get(all.get_error_name, "cudaGetErrorName");
  get(all.get_device, "cudaGetDevice");
  get(all.set_device, "cudaSetDevice");
  get(all.device_get_attribute, "cudaDeviceGetAttribute");
  get(all.stream_create, "cudaStreamCreateWithFlags");
  get(all.stream_destroy, "cudaStreamDestroy");
  get(all.stream_synchronize, "cudaStreamSynchronize");
  get(all.malloc_async, "cudaMallocAsync");
  get(all.free_async, "cudaFreeAsync");
  get(all.host_alloc, "cudaHostAlloc");
  get(all.free_host, "cudaFreeHost");
  get(all.memcpy_async, "cudaMemcpyAsync");
  return all;
}

Device::Device(const CudaFunctions& functions) : cuda_(functions) {
  check(cuda_.get_device(&index_), "cudaGetDevice");
  int major = 0, minor = 0;
  check(cuda_.device_get_attribute(&major, CudaFunctions::capability_major, index_), "cudaDeviceGetAttribute");
  check(cuda_.device_get_attribute(&minor, CudaFunctions::capability_minor, index_), "cudaDeviceGetAttribute");
  sm_ = 10 * major + minor;
  check(cuda_.stream_create(&stream_, CudaFunctions::stream_non_blocking), "cudaStreamCreateWithFlags");
}

Device::~Device() {
  cuda_.set_device(index_);
  if (scratch_ != nullptr) cuda_.free_async(scratch_, stream_);
  cuda_.stream_destroy(stream_);
}

std::shared_ptr<void> Device::allocate(std::size_t bytes) {
  return {take(bytes), [self = shared_from_this()](void* memory) {
            self->cuda_.set_device(self->index_);
            self->cuda_.free_async(memory, self->stream_);
          }};
}

void Device::copy(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  use();
  copy_async(to, from, bytes, CudaFunctions::device_to_device);
  synchronize();
}

std::shared_ptr<void> Device::pinned(std::size_t bytes) {
  void* memory = nullptr;
  use();
  check(cuda_.host_alloc(&memory, std::max<std::size_t>(bytes, 1), CudaFunctions::host_alloc_default), "cudaHostAlloc");
  return {memory, [self = shared_from_this()](void* host) { self->cuda_.free_host(host); }};
}

void* Device::scratch(std::size_t bytes) {
  if (bytes > scratch_bytes_) {
    scratch_bytes_ = 0;
    if (scratch_ != nullptr) check(cuda_.free_async(std::exchange(scratch_, nullptr), stream_), "cudaFreeAsync");
    scratch_ = take(bytes);
    scratch_bytes_ = bytes;
  }
  return scratch_;
}

void Device::copy_async(void* to, const void* from, std::size_t bytes, int kind) {
  if (bytes > 0) check(cuda_.memcpy_async(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
}

void Device::synchronize() const { check(cuda_.stream_synchronize(stream_), "cudaStreamSynchronize"); }
void Device::use() const { check(cuda_.set_device(index_), "cudaSetDevice"); }

void* Device::take(std::size_t bytes) const {
  void* memory = nullptr;
  use();
  check(cuda_.malloc_async(&memory, std::max<std::size_t>(bytes, 1), stream_), "cudaMallocAsync");
  return memory;
}

void Device::check(CudaFunctions::Error error, const char* function) const {
  switch (error) {
    case CudaFunctions::success: return;
    case CudaFunctions::error_memory_allocation:
      fail(STCA_BUILD_ERROR, "the GPU is out of memory; lower cache_bytes, or build for smaller sizes");
    case CudaFunctions::error_no_device:
    case CudaFunctions::error_insufficient_driver:
      fail(STCA_BUILD_ERROR, "no usable NVIDIA GPU or driver here (", cuda_.get_error_name(error),
           "); serve with ONNX Runtime");
    default: fail(STCA_BUILD_ERROR, "CUDA failed in ", function, ": ", cuda_.get_error_name(error));
  }
}

}  // namespace stca::core
