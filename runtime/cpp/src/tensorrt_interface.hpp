// TensorRT's words and ours: types, shapes, what it logs, and whether a plan is what the manifest says of it.
//
// `Trt` is TensorRT's interface: the real one in tensorrt_engine.cpp, stand-ins of the same names in tests.
#pragma once

#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "bundle.hpp"
#include "library.hpp"
#include "tensor.hpp"

namespace stca::core {

/// TensorRT's name of a dtype; nothing where it has none.
template <class Trt>
std::optional<typename Trt::DataType> tensorrt_type(DType dtype) {
  switch (dtype) {
    case STCA_BOOL: return Trt::DataType::kBOOL;
    case STCA_INT8: return Trt::DataType::kINT8;
    case STCA_UINT8: return Trt::DataType::kUINT8;
    case STCA_INT32: return Trt::DataType::kINT32;
    case STCA_INT64: return Trt::DataType::kINT64;
    case STCA_FLOAT16: return Trt::DataType::kHALF;
    case STCA_BFLOAT16: return Trt::DataType::kBF16;
    case STCA_FLOAT32: return Trt::DataType::kFLOAT;
    default: return std::nullopt;
  }
}

/// Keeps what TensorRT says when something goes wrong.
template <class Trt>
class TensorRtLog final : public Trt::ILogger {
 public:
  void log(typename Trt::ILogger::Severity severity, const char* message) noexcept override {
    if (severity > Trt::ILogger::Severity::kERROR) return;
    try {
      const std::lock_guard lock(mutex_);
      last_ = said(message);
    } catch (const std::exception&) {  // no memory for a message: go on without it
    }
  }
  std::string take() {
    const std::lock_guard lock(mutex_);
    return last_.empty() ? "TensorRT gives no reason" : std::exchange(last_, "");
  }

 private:
  std::mutex mutex_;
  std::string last_;
};

template <class Trt>
typename Trt::Dims dims_of(const Shape& shape) {
  typename Trt::Dims dims{};
  dims.nbDims = shape.rank;
  for (int i = 0; i < shape.rank; ++i) dims.d[i] = shape[i];
  return dims;
}

/// "[3, 2]"; -1 where TensorRT does not know.
template <class Trt>
std::string text_of(const typename Trt::Dims& dims) {
  Shape shape;
  for (int i = 0; i < dims.nbDims && i < STCA_MAX_RANK; ++i) shape[shape.rank++] = dims.d[i];
  return shape.text();
}

/// What of a plan is not as the manifest says; empty when all is. Shapes are compared when they are known, at each run.
template <class Trt>
std::string difference(const typename Trt::ICudaEngine& engine, const EngineEntry& entry) {
  for (const auto* specs : {&entry.spec.inputs, &entry.spec.outputs}) {
    const auto mode = specs == &entry.spec.inputs ? Trt::TensorIOMode::kINPUT : Trt::TensorIOMode::kOUTPUT;
    for (const TensorSpec& spec : *specs) {
      const char* tensor = spec.name.c_str();
      if (engine.getTensorIOMode(tensor) != mode) return "it has no " + spec.name;
      if (tensorrt_type<Trt>(spec.dtype) != engine.getTensorDataType(tensor)) return spec.name + " has another type";
      if (engine.getTensorLocation(tensor) != Trt::TensorLocation::kDEVICE) return spec.name + " is on the host";
      if (engine.getTensorFormat(tensor) != Trt::TensorFormat::kLINEAR) return spec.name + " is not row-major";
    }
  }
  if (engine.getNbIOTensors() != static_cast<int>(entry.spec.inputs.size() + entry.spec.outputs.size()) ||
      engine.getNbOptimizationProfiles() != static_cast<int>(entry.profiles.size())) {
    return "it has other tensors or profiles";
  }
  return "";
}

}  // namespace stca::core
