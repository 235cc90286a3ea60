// A GPU as the runtime sees it: memory for states, one stream, and page-locked buffers.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "tensor.hpp"

struct CUstream_st;  // CUDA's own name

namespace stca::core {

/// What is used of the CUDA runtime, declared as its C ABI has it: the library is loaded when the first engine is made,
/// so neither its headers nor the library itself are needed to build this one, and tests put stand-ins here.
struct CudaFunctions {
  using Error = int;
  using Stream = CUstream_st*;

  const char* (*get_error_name)(Error);
  Error (*get_device)(int* device);
  Error (*set_device)(int device);
  Error (*device_get_attribute)(int* value, int attribute, int device);
  Error (*stream_create)(Stream* stream, unsigned flags);
  Error (*stream_destroy)(Stream stream);
  Error (*stream_synchronize)(Stream stream);
  Error (*malloc_async)(void** memory, std::size_t bytes, Stream stream);
  Error (*free_async)(void* memory, Stream stream);
  Error (*host_alloc)(void** memory, std::size_t bytes, unsigned flags);
  Error (*free_host)(void* memory);
  Error (*memcpy_async)(void* to, const void* from, std::size_t bytes, int kind, Stream stream);

  // CUDA's numbers, held against its headers where tensorrt_engine.cpp is compiled.
  static constexpr Error success = 0, error_memory_allocation = 2, error_insufficient_driver = 35,
                         error_no_device = 100;
  static constexpr int capability_major = 75, capability_minor = 76;
  static constexpr int host_to_device = 1, device_to_host = 2, device_to_device = 3;
  static constexpr unsigned stream_non_blocking = 1, host_alloc_default = 0;

  /// The real ones. Throws BuildError when the CUDA runtime of this major version cannot be loaded.
  static CudaFunctions load(int major);
};

/// A GPU, one stream on it, and what the engines on that stream share. They run by turns, under `mutex`.
class Device : public Memory, public std::enable_shared_from_this<Device> {
 public:
  /// The calling thread's current GPU. Throws BuildError when there is none.
  explicit Device(const CudaFunctions& functions);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() override;

  bool device() const override { return true; }
  std::shared_ptr<void> allocate(std::size_t bytes) override;
  void copy(void* to, const void* from, std::size_t bytes) override;

  /// Page-locked memory of the host.
  std::shared_ptr<void> pinned(std::size_t bytes);
  /// At least `bytes` on the GPU that engines use by turns.
  void* scratch(std::size_t bytes);
  /// Copies between host and GPU, in the stream's order.
  void copy_async(void* to, const void* from, std::size_t bytes, int kind);
  void synchronize() const;
  /// Makes this the calling thread's GPU.
  void use() const;

  /// Compute capability, 90 for 9.0.
  std::int64_t sm() const { return sm_; }
  CudaFunctions::Stream stream() const { return stream_; }
  std::mutex mutex;

 private:
  void* take(std::size_t bytes) const;
  void check(CudaFunctions::Error error, const char* function) const;

  const CudaFunctions cuda_;
  int index_ = 0;
  std::int64_t sm_ = 0;
  CudaFunctions::Stream stream_ = nullptr;
  void* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
};

}  // namespace stca::core
