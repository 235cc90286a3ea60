// A GPU as the runtime sees it: memory for states, a stream, page-locked buffers, and work that is recorded and
// replayed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "error.hpp"
#include "tensor.hpp"

// CUDA's own names.
struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUmemPoolHandle_st;

namespace stca::core {

/// What is used of the CUDA runtime, declared as its C ABI has it: the library is loaded when the first engine is made,
/// so neither its headers nor the library itself are needed to build this one, and tests put stand-ins here.
struct CudaFunctions {
  using Error = int;
  using Stream = CUstream_st*;
  using Graph = CUgraph_st*;
  using GraphExec = CUgraphExec_st*;
  using MemoryPool = CUmemPoolHandle_st*;

  const char* (*get_error_name)(Error);
  Error (*get_last_error)();
  Error (*get_device)(int* device);
  Error (*set_device)(int device);
  Error (*device_get_attribute)(int* value, int attribute, int device);
  Error (*device_get_default_pool)(MemoryPool* pool, int device);
  Error (*pool_set_attribute)(MemoryPool pool, int attribute, void* value);
  Error (*pool_trim)(MemoryPool pool, std::size_t least);
  Error (*stream_create)(Stream* stream, unsigned flags);
  Error (*stream_destroy)(Stream stream);
  Error (*stream_synchronize)(Stream stream);
  Error (*stream_begin_capture)(Stream stream, int mode);
  Error (*stream_end_capture)(Stream stream, Graph* graph);
  Error (*graph_instantiate)(GraphExec* executable, Graph graph, unsigned long long flags);
  Error (*graph_destroy)(Graph graph);
  Error (*graph_exec_destroy)(GraphExec executable);
  Error (*graph_launch)(GraphExec executable, Stream stream);
  Error (*malloc_async)(void** memory, std::size_t bytes, Stream stream);
  Error (*free_async)(void* memory, Stream stream);
  Error (*host_alloc)(void** memory, std::size_t bytes, unsigned flags);
  Error (*free_host)(void* memory);
  Error (*memcpy_async)(void* to, const void* from, std::size_t bytes, int kind, Stream stream);
  Error (*memset_async)(void* memory, int value, std::size_t bytes, Stream stream);

  // CUDA's numbers, held against its headers where tensorrt_engine.cpp is compiled.
  static constexpr Error success = 0, error_memory_allocation = 2, error_insufficient_driver = 35,
                         error_no_device = 100;
  static constexpr int capability_major = 75, capability_minor = 76;
  static constexpr int host_to_device = 1, device_to_host = 2, device_to_device = 3;
  static constexpr int capture_thread_local = 1, pool_release_threshold = 4;
  static constexpr unsigned stream_non_blocking = 1, host_alloc_default = 0;

  /// The real ones. Throws BuildError when the CUDA runtime of this major version cannot be loaded.
  static CudaFunctions load(int major);
};

/// A CUDA call failed. While requests run that is an EngineError; whoever makes engines turns it into a BuildError.
class GpuError final : public Error {
 public:
  explicit GpuError(const std::string& message) : Error(STCA_ENGINE_ERROR, message) {}
};

/// Makes a GPU the calling thread's for a while; then the thread has back the one it had.
class GpuScope {
 public:
  GpuScope(const CudaFunctions& cuda, int index) noexcept : cuda_(cuda) {
    // A failure shows in whatever is called next: streams and memory belong to one GPU.
    changed_ = cuda_.get_device(&before_) == CudaFunctions::success && before_ != index;
    if (changed_) cuda_.set_device(index);
  }
  GpuScope(const GpuScope&) = delete;
  GpuScope& operator=(const GpuScope&) = delete;
  ~GpuScope() {
    if (changed_) cuda_.set_device(before_);
  }

 private:
  const CudaFunctions& cuda_;
  int before_ = 0;
  bool changed_ = false;
};

/// A GPU, a stream on it, and what the engines on that stream share. They run by turns, under `mutex`.
class Device : public Memory, public std::enable_shared_from_this<Device> {
 public:
  using Stream = CudaFunctions::Stream;
  /// Recorded work, ready to be launched.
  using Recording = std::shared_ptr<CUgraphExec_st>;

  /// Compute capability of the calling thread's current GPU, 90 for 9.0. Throws GpuError when there is none.
  static std::int64_t current_sm(const CudaFunctions& functions);

  /// The calling thread's current GPU. Throws GpuError when there is none.
  explicit Device(const CudaFunctions& functions);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() override;

  bool device() const override { return true; }
  std::shared_ptr<void> allocate(std::size_t bytes) override;
  void copy(void* to, const void* from, std::size_t bytes) override;

  /// Page-locked memory of the host.
  std::shared_ptr<void> pinned(std::size_t bytes);
  /// At least `bytes` on the GPU that engines use by turns. It moves when more is asked for than ever before.
  void* scratch(std::size_t bytes);
  /// Copies between host and GPU, in the stream's order.
  void copy_async(void* to, const void* from, std::size_t bytes, int kind, Stream stream);
  /// Zeros on the GPU, in the stream's order.
  void zero_async(void* memory, std::size_t bytes, Stream stream);
  void synchronize(Stream stream) const;
  /// Gives the pool's free memory back to the driver, as when engines go: it keeps what it once took otherwise.
  void trim() noexcept;
  /// Keeps this the calling thread's GPU for as long as the result lives.
  [[nodiscard]] GpuScope use() const { return {cuda_, index_}; }

  /// What `work` does on `recording_stream()`, recorded and not run. Throws what `work` throws, or GpuError when it
  /// cannot be recorded; the stream can be used again after either.
  Recording record(const std::function<void()>& work);
  void launch(const Recording& recording, Stream stream);

  int index() const { return index_; }
  /// Where everything runs.
  Stream stream() const { return stream_; }
  /// Used under `mutex` alone. States come and go on the other one in any thread, and must not get into a recording.
  Stream recording_stream() const { return recording_stream_; }
  std::mutex mutex;

 private:
  void* take(std::size_t bytes) const;
  void check(CudaFunctions::Error error, const char* function) const { check(cuda_, error, function); }
  static void check(const CudaFunctions& cuda, CudaFunctions::Error error, const char* function);

  const CudaFunctions cuda_;
  int index_ = 0;
  Stream stream_ = nullptr, recording_stream_ = nullptr;
  void* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
};

}  // namespace stca::core
