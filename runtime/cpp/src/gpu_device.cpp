#include "gpu_device.hpp"

#include <algorithm>
#include <utility>

#include "library.hpp"

namespace stca::core {

CudaFunctions CudaFunctions::load(int major) {
  const Library library(("libcudart.so." + std::to_string(major)).c_str(), "STCA_CUDART_LIBRARY");
  CudaFunctions all{};
  const auto get = [&](auto& function, const char* name) {
    function = library.get<std::decay_t<decltype(function)>>(name);
  };
  get(all.get_error_name, "cudaGetErrorName");
  get(all.get_last_error, "cudaGetLastError");
  get(all.get_device, "cudaGetDevice");
  get(all.set_device, "cudaSetDevice");
  get(all.device_get_attribute, "cudaDeviceGetAttribute");
  get(all.device_get_default_pool, "cudaDeviceGetDefaultMemPool");
  get(all.pool_set_attribute, "cudaMemPoolSetAttribute");
  get(all.pool_trim, "cudaMemPoolTrimTo");
  get(all.stream_create, "cudaStreamCreateWithFlags");
  get(all.stream_destroy, "cudaStreamDestroy");
  get(all.stream_synchronize, "cudaStreamSynchronize");
  get(all.stream_begin_capture, "cudaStreamBeginCapture");
  get(all.stream_end_capture, "cudaStreamEndCapture");
  get(all.graph_instantiate, "cudaGraphInstantiateWithFlags");
  get(all.graph_destroy, "cudaGraphDestroy");
  get(all.graph_exec_destroy, "cudaGraphExecDestroy");
  get(all.graph_launch, "cudaGraphLaunch");
  get(all.malloc_async, "cudaMallocAsync");
  get(all.free_async, "cudaFreeAsync");
  get(all.host_alloc, "cudaHostAlloc");
  get(all.free_host, "cudaFreeHost");
  get(all.memcpy_async, "cudaMemcpyAsync");
  get(all.memset_async, "cudaMemsetAsync");
  return all;
}

std::int64_t Device::current_sm(const CudaFunctions& functions) {
  int index = 0, major = 0, minor = 0;
  check(functions, functions.get_device(&index), "cudaGetDevice");
  for (auto [value, attribute] :
       {std::pair{&major, CudaFunctions::capability_major}, {&minor, CudaFunctions::capability_minor}}) {
    check(functions, functions.device_get_attribute(value, attribute, index), "cudaDeviceGetAttribute");
  }
  return 10 * major + minor;
}

Device::Device(const CudaFunctions& functions) : cuda_(functions) {
  check(cuda_.get_device(&index_), "cudaGetDevice");
  // Unless told otherwise, the pool gives free memory back to the driver at each synchronization, that is after each
  // run, and the next state has to be mapped anew.
  CudaFunctions::MemoryPool pool = nullptr;
  std::uint64_t keep = UINT64_MAX;
  check(cuda_.device_get_default_pool(&pool, index_), "cudaDeviceGetDefaultMemPool");
  check(cuda_.pool_set_attribute(pool, CudaFunctions::pool_release_threshold, &keep), "cudaMemPoolSetAttribute");
  check(cuda_.stream_create(&stream_, CudaFunctions::stream_non_blocking), "cudaStreamCreateWithFlags");
  const CudaFunctions::Error error = cuda_.stream_create(&recording_stream_, CudaFunctions::stream_non_blocking);
  if (error != CudaFunctions::success) cuda_.stream_destroy(stream_);
  check(error, "cudaStreamCreateWithFlags");
}

Device::~Device() {
  const GpuScope scope = use();
  if (scratch_ != nullptr) cuda_.free_async(scratch_, stream_);
  trim();
  cuda_.stream_destroy(recording_stream_);
  cuda_.stream_destroy(stream_);
}

void Device::trim() noexcept {
  const GpuScope scope = use();
  cuda_.stream_synchronize(stream_);  // what is freed there is free from then on
  CudaFunctions::MemoryPool pool = nullptr;
  if (cuda_.device_get_default_pool(&pool, index_) == CudaFunctions::success) cuda_.pool_trim(pool, 0);
}

std::shared_ptr<void> Device::allocate(std::size_t bytes) {
  return {take(bytes), [self = shared_from_this()](void* memory) {
            const GpuScope scope = self->use();
            self->cuda_.free_async(memory, self->stream_);
          }};
}

void Device::copy(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  const GpuScope scope = use();
  copy_async(to, from, bytes, CudaFunctions::device_to_device, stream_);
  synchronize(stream_);
}

std::shared_ptr<void> Device::pinned(std::size_t bytes) {
  void* memory = nullptr;
  const GpuScope scope = use();
  check(cuda_.host_alloc(&memory, std::max<std::size_t>(bytes, 1), CudaFunctions::host_alloc_default), "cudaHostAlloc");
  return {memory, [self = shared_from_this()](void* host) { self->cuda_.free_host(host); }};
}

void* Device::scratch(std::size_t bytes) {
  if (bytes > scratch_bytes_) {
    const GpuScope scope = use();
    scratch_bytes_ = 0;
    if (scratch_ != nullptr) check(cuda_.free_async(std::exchange(scratch_, nullptr), stream_), "cudaFreeAsync");
    scratch_ = take(bytes);
    scratch_bytes_ = bytes;
  }
  return scratch_;
}

void Device::copy_async(void* to, const void* from, std::size_t bytes, int kind, Stream stream) {
  if (bytes > 0) check(cuda_.memcpy_async(to, from, bytes, kind, stream), "cudaMemcpyAsync");
}

void Device::zero_async(void* memory, std::size_t bytes, Stream stream) {
  if (bytes > 0) check(cuda_.memset_async(memory, 0, bytes, stream), "cudaMemsetAsync");
}

void Device::synchronize(Stream stream) const { check(cuda_.stream_synchronize(stream), "cudaStreamSynchronize"); }

Device::Recording Device::record(const std::function<void()>& work) {
  // Of this thread alone: others may go on allocating while it lasts.
  check(cuda_.stream_begin_capture(recording_stream_, CudaFunctions::capture_thread_local), "cudaStreamBeginCapture");
  CudaFunctions::Graph raw = nullptr;
  try {
    work();
  } catch (...) {
    cuda_.stream_end_capture(recording_stream_, &raw);  // else the stream would go on recording
    if (raw != nullptr) cuda_.graph_destroy(raw);
    cuda_.get_last_error();
    throw;
  }
  check(cuda_.stream_end_capture(recording_stream_, &raw), "cudaStreamEndCapture");
  CudaFunctions::GraphExec executable = nullptr;
  const CudaFunctions::Error error = cuda_.graph_instantiate(&executable, raw, 0);
  cuda_.graph_destroy(raw);
  check(error, "cudaGraphInstantiateWithFlags");
  return {executable, [self = shared_from_this()](CudaFunctions::GraphExec held) {
            const GpuScope scope = self->use();
            self->cuda_.graph_exec_destroy(held);
          }};
}

void Device::launch(const Recording& recording, Stream stream) {
  check(cuda_.graph_launch(recording.get(), stream), "cudaGraphLaunch");
}

void* Device::take(std::size_t bytes) const {
  void* memory = nullptr;
  const GpuScope scope = use();
  check(cuda_.malloc_async(&memory, std::max<std::size_t>(bytes, 1), stream_), "cudaMallocAsync");
  return memory;
}

void Device::check(const CudaFunctions& cuda, CudaFunctions::Error error, const char* function) {
  if (error == CudaFunctions::success) return;
  cuda.get_last_error();  // it stays until it is taken, and TensorRT would take it for its own
  const std::string name = cuda.get_error_name(error);
  switch (error) {
    case CudaFunctions::error_memory_allocation:
      throw GpuError("the GPU is out of memory; lower cache_bytes, or build for smaller sizes");
    case CudaFunctions::error_no_device:
    case CudaFunctions::error_insufficient_driver: throw GpuError("no usable NVIDIA GPU or driver (" + name + ")");
    default: throw GpuError("CUDA failed in " + std::string(function) + ": " + name);
  }
}

}  // namespace stca::core
