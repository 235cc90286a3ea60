// The TensorRT engine on NVIDIA's interface. Compiled where NvInferRuntime.h and the CUDA headers are given; the
// libraries are loaded when the first engine is made.
#include "tensorrt_engine.hpp"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

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
static_assert(sizeof(cudaError_t) == sizeof(C::Error) && sizeof(cudaStream_t) == sizeof(C::Stream));

struct Libraries {
  CudaFunctions cuda = CudaFunctions::load(CUDART_VERSION / 1000);
  Library tensorrt{("libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)).c_str(), "STCA_TENSORRT_LIBRARY"};
  void* (*create_runtime)(void*, std::int32_t) = nullptr;
  std::int32_t (*version)() = nullptr;

  Libraries() {
    create_runtime = tensorrt.get<decltype(create_runtime)>("createInferRuntime_INTERNAL");
    version = tensorrt.get<decltype(version)>("getInferLibVersion");
  }
};

}  // namespace

Engines make_tensorrt_engines(const std::shared_ptr<const Bundle>& bundle) {
  static const Libraries libraries;
  const auto create = [](nvinfer1::ILogger& log) {
    return static_cast<nvinfer1::IRuntime*>(libraries.create_runtime(&log, NV_TENSORRT_VERSION));
  };
  return make_tensorrt_pair<Nvidia>(bundle, std::make_shared<Device>(libraries.cuda), version_text(libraries.version()),
                                    create);
}

}  // namespace stca::core
