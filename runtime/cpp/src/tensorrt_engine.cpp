// The TensorRT engine on NVIDIA's interface. Compiled where NvInferRuntime.h and the CUDA headers are given; the
// libraries are loaded when the first engine is made.
#include "tensorrt_engine.hpp"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include "library.hpp"

namespace stca::core {
namespace {

struct Nvidia {
  using ILogger = nvinfer1::ILogger;
  using IRuntime = nvinfer1::IRuntime;
  using ICudaEngine = nvinfer1::ICudaEngine;
  using IExecutionContext = nvinfer1::IExecutionContext;
  using ExecutionContextAllocationStrategy = nvinfer1::ExecutionContextAllocationStrategy;
  using DataType = nvinfer1::DataType;
  using Dims = nvinfer1::Dims;
  using TensorFormat = nvinfer1::TensorFormat;
  using TensorIOMode = nvinfer1::TensorIOMode;
  using TensorLocation = nvinfer1::TensorLocation;
};

using C = CudaFunctions;
static_assert(C::success == cudaSuccess && C::error_memory_allocation == cudaErrorMemoryAllocation &&
              C::error_insufficient_driver == cudaErrorInsufficientDriver && C::error_no_device == cudaErrorNoDevice);
static_assert(C::capability_major == cudaDevAttrComputeCapabilityMajor &&
              C::capability_minor == cudaDevAttrComputeCapabilityMinor);
static_assert(C::host_to_device == cudaMemcpyHostToDevice && C::device_to_host == cudaMemcpyDeviceToHost &&
              C::device_to_device == cudaMemcpyDeviceToDevice);
static_assert(C::stream_non_blocking == cudaStreamNonBlocking && C::host_alloc_default == cudaHostAllocDefault);
static_assert(C::capture_thread_local == cudaStreamCaptureModeThreadLocal &&
              C::pool_release_threshold == cudaMemPoolAttrReleaseThreshold);
static_assert(sizeof(cudaError_t) == sizeof(C::Error) && sizeof(cudaStream_t) == sizeof(C::Stream));

/// The CUDA runtime. Throws BuildError when there is none; the next one to ask tries again.
const CudaFunctions& cuda() {
  static const CudaFunctions functions = CudaFunctions::load(CUDART_VERSION / 1000);
  return functions;
}

/// What is used of libnvinfer, loaded as the CUDA runtime is.
struct TensorRt {
  void* (*create_runtime)(void*, std::int32_t) = nullptr;
  std::string version;

  TensorRt() {
    const Library library(("libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)).c_str(), "STCA_TENSORRT_LIBRARY");
    create_runtime = library.get<decltype(create_runtime)>("createInferRuntime_INTERNAL");
    for (const char* part : {"Major", "Minor", "Patch", "Build"}) {
      const std::string function = "getInferLib" + std::string(part) + "Version";
      version += (version.empty() ? "" : ".") + std::to_string(library.get<std::int32_t (*)()>(function.c_str())());
    }
  }
  static const TensorRt& get() {
    static const TensorRt library;
    return library;
  }
};

}  // namespace

Machine tensorrt_machine() {
  Machine machine{true, 0, "", "", ""};
  try {
    machine.sm = Device::current_sm(cuda());
  } catch (const Error& e) {
    machine.no_gpu = e.what();
    return machine;
  }
  try {
    machine.tensorrt = TensorRt::get().version;
  } catch (const Error& e) {
    machine.no_tensorrt = e.what();
  }
  return machine;
}

Engines make_tensorrt_engines(const std::shared_ptr<const Bundle>& bundle, const Choice& choice, int cuda_graphs) {
  const auto create = [](nvinfer1::ILogger& log) -> nvinfer1::IRuntime* {
    void* runtime = TensorRt::get().create_runtime(&log, NV_TENSORRT_VERSION);
    // Where CUDA cannot be started, 11.4 gives 0x228 and not null.
    if (reinterpret_cast<std::uintptr_t>(runtime) < 4096) return nullptr;
    return static_cast<nvinfer1::IRuntime*>(runtime);
  };
  ReplayLimits limits;
  limits.graphs = cuda_graphs;
  return make_tensorrt_pair<Nvidia>(bundle, choice, cuda(), create, limits);
}

}  // namespace stca::core
