// A half in TensorRT.
//
// States stay on the GPU, where the encoder leaves them and the scorer reads them. What a request brings goes through
// page-locked buffers that are made once, as large as the profiles allow; per run, only a state's own memory is
// allocated, from CUDA's pool. Both halves share one stream, one scratch memory and a lock: they run by turns.
//
// Tested with stand-ins for TensorRT and CUDA; it has not run on a GPU yet.
#pragma once

#include <algorithm>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "engine.hpp"
#include "error.hpp"
#include "gpu_device.hpp"
#include "library.hpp"
#include "sha256.hpp"

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
      last_ = one_line(message);
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

/// One input or output: page-locked on the host, and on the GPU. A state's buffers stay empty until they are needed.
struct Buffer {
  std::shared_ptr<void> host, gpu;
  std::size_t bytes = 0;

  void reserve(Device& device, std::size_t wanted) {
    wanted = std::max<std::size_t>(wanted, 1);
    if (wanted <= bytes) return;
    bytes = 0;
    gpu = device.allocate(wanted);
    host = device.pinned(wanted);
    bytes = wanted;
  }
};

using Sizes = std::map<std::string, std::int64_t>;

/// `Trt` is TensorRT's interface: the real one in tensorrt_engine.cpp, stand-ins of the same names in tests.
template <class Trt>
class TensorRtEngine final : public Engine {
 public:
  using CreateRuntime = std::function<typename Trt::IRuntime*(typename Trt::ILogger&)>;

  TensorRtEngine(std::shared_ptr<const Bundle> bundle, const EngineEntry& entry, const CreateRuntime& create,
                 std::shared_ptr<Device> device)
      : bundle_(std::move(bundle)), entry_(entry), device_(std::move(device)) {
    const std::string plan = read_plan();
    runtime_.reset(create(log_));
    if (runtime_ == nullptr) refuse();
    device_->use();
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) refuse();
    context_.reset(engine_->createExecutionContext(Trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (context_ == nullptr) refuse();
    check_tensors(entry_.spec.inputs, Trt::TensorIOMode::kINPUT);
    check_tensors(entry_.spec.outputs, Trt::TensorIOMode::kOUTPUT);
    if (engine_->getNbIOTensors() != static_cast<int>(entry_.spec.inputs.size() + entry_.spec.outputs.size()) ||
        engine_->getNbOptimizationProfiles() != static_cast<int>(entry_.profiles.size())) {
      disagree("it has other tensors or profiles");
    }
    Sizes largest;
    for (const Profile& profile : entry_.profiles) {
      for (const auto& [symbol, limits] : profile) largest[symbol] = std::max(largest[symbol], limits.second);
    }
    for (auto* specs : {&entry_.spec.inputs, &entry_.spec.outputs}) {
      for (const TensorSpec& spec : *specs) {
        Buffer& buffer = buffers_.emplace_back();
        if (is_state(spec.name)) continue;
        buffer.reserve(*device_, shape_of(spec, largest).elements() * item_bytes(spec.dtype));
      }
    }
  }

  std::string name() const override {
    return "tensorrt " + entry_.version + " (SM " + std::to_string(entry_.sm) + ", " + entry_.precision + ")";
  }
  const GraphSpec& spec() const override { return entry_.spec; }
  std::int64_t max_requests() const override { return entry_.requests; }
  Memory& memory() override { return *device_; }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    const std::vector<TensorSpec>& specs = entry_.spec.inputs;
    Sizes sizes;
    for (std::size_t i = 0; i < specs.size(); ++i) measure(specs[i], inputs[i], sizes);
    if (const auto targets = sizes.find(std::string(targets_symbol)); targets != sizes.end() && targets->second == 0) {
      return empty_outputs(sizes);
    }
    // An engine's smallest history is one token: an empty one is run as a token of zeros that the offsets leave out.
    const auto tokens = sizes.find(std::string(tokens_symbol));
    const bool empty = tokens != sizes.end() && tokens->second == 0;
    if (empty) tokens->second = 1;
    const int profile = choose_profile(sizes);

    const std::lock_guard lock(device_->mutex);
    try {
      return execute(inputs, sizes, profile, empty);
    } catch (const Error& e) {
      if (e.code == STCA_BUILD_ERROR) fail_run(e.what());  // CUDA failed, and not while an engine was made
      throw;
    }
  }

 private:
  std::vector<Array> execute(const std::vector<Array>& inputs, const Sizes& sizes, int profile, bool empty) {
    const std::vector<TensorSpec>& specs = entry_.spec.inputs;
    device_->use();
    select(profile);
    for (std::size_t i = 0; i < specs.size(); ++i) feed(specs[i], inputs[i], buffers_[i], shape_of(specs[i], sizes));
    std::vector<Array> outputs;
    for (const TensorSpec& spec : entry_.spec.outputs) outputs.push_back(prepare_output(spec, outputs.size(), sizes));
    if (!context_->enqueueV3(device_->stream())) fail_run(log_.take());
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (outputs[i].device) continue;
      const Buffer& buffer = buffers_[specs.size() + i];
      device_->copy_async(buffer.host.get(), buffer.gpu.get(), outputs[i].bytes(), CudaFunctions::device_to_host);
    }
    device_->synchronize();
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].device) {
        std::memcpy(const_cast<void*>(outputs[i].data), buffers_[specs.size() + i].host.get(), outputs[i].bytes());
      }
      if (empty && entry_.spec.outputs[i].rows_are(tokens_symbol)) outputs[i] = rows(outputs[i], 0, 0);
    }
    return outputs;
  }

  /// A plan is code to TensorRT: its bytes, as they are when they are handed over, must be those of the manifest.
  std::string read_plan() const {
    const auto file = bundle_->manifest.files.find(entry_.file);
    if (file == bundle_->manifest.files.end()) {
      bundle_error(entry_.file, ": is not among the manifest's files; build the engine again");
    }
    std::ifstream in(bundle_->path / entry_.file, std::ios::binary);
    std::string plan{std::istreambuf_iterator<char>(in), {}};
    Sha256 digest;
    digest.update(plan);
    if (digest.hex() != file->second.sha256) bundle_error(entry_.file, " was changed; copy the bundle again");
    return plan;
  }

  [[noreturn]] void refuse() {
    fail(STCA_BUILD_ERROR, entry_.file, " cannot be loaded: ", log_.take(),
         "; run `stca build --engine tensorrt` again");
  }
  [[noreturn]] void disagree(const std::string& why) const {
    fail(STCA_BUILD_ERROR, entry_.file, " is not what the manifest says: ", why,
         "; run `stca build --engine tensorrt` again");
  }
  [[noreturn]] void fail_run(const std::string& why) const {
    fail(STCA_ENGINE_ERROR, name(), " failed on ", entry_.graph, ": ", why);
  }

  bool is_state(const std::string& name) const {
    const auto& state = bundle_->manifest.state;
    return std::any_of(state.begin(), state.end(), [&](const StateSpec& spec) { return spec.name == name; });
  }

  void check_tensors(const std::vector<TensorSpec>& specs, typename Trt::TensorIOMode mode) const {
    for (const TensorSpec& spec : specs) {
      const char* tensor = spec.name.c_str();
      if (engine_->getTensorIOMode(tensor) != mode) disagree("it has no " + spec.name);
      if (tensorrt_type<Trt>(spec.dtype) != engine_->getTensorDataType(tensor))
        disagree(spec.name + " has another type");
      if (engine_->getTensorLocation(tensor) != Trt::TensorLocation::kDEVICE) disagree(spec.name + " is on the host");
      if (engine_->getTensorFormat(tensor) != Trt::TensorFormat::kLINEAR) disagree(spec.name + " is not row-major");
    }
  }

  void measure(const TensorSpec& spec, const Array& array, Sizes& sizes) const {
    bool fits = array.dtype == spec.dtype && array.shape.rank == static_cast<int>(spec.shape.size());
    for (int i = 0; fits && i < array.shape.rank; ++i) {
      const Axis& axis = spec.shape[static_cast<std::size_t>(i)];
      const std::int64_t expected =
          axis.symbol.empty() ? axis.size : sizes.emplace(axis.symbol, array.shape[i]).first->second;
      fits = array.shape[i] == expected;
    }
    if (!fits) {
      request_error(spec.name, ": has shape ", array.shape.text(), " of ", dtype_name(array.dtype),
                    ", the engine takes ", spec.shape_text(), " of ", dtype_name(spec.dtype),
                    entry_.requests == 1 ? " and serves one request per run" : "");
    }
  }

  static Shape shape_of(const TensorSpec& spec, const Sizes& sizes) {
    Shape shape;
    for (const Axis& axis : spec.shape) {
      const auto found = sizes.find(axis.symbol);
      shape[shape.rank++] = found == sizes.end() ? std::max<std::int64_t>(axis.size, 0) : found->second;
    }
    return shape;
  }

  static typename Trt::Dims dims_of(const Shape& shape) {
    typename Trt::Dims dims{};
    dims.nbDims = shape.rank;
    for (int i = 0; i < shape.rank; ++i) dims.d[i] = shape[i];
    return dims;
  }

  /// The tightest profile that admits these sizes.
  int choose_profile(const Sizes& sizes) const {
    int best = -1;
    double best_volume = 0;
    for (std::size_t p = 0; p < entry_.profiles.size(); ++p) {
      bool fits = true;
      double volume = 1;
      for (const auto& [symbol, limits] : entry_.profiles[p]) {
        const auto size = sizes.find(symbol);
        fits = fits && (size == sizes.end() || (limits.first <= size->second && size->second <= limits.second));
        volume *= static_cast<double>(limits.second);
      }
      if (!fits || (best >= 0 && volume >= best_volume)) continue;
      best = static_cast<int>(p);
      best_volume = volume;
    }
    if (best >= 0) return best;
    for (const auto& [symbol, size] : sizes) {
      std::int64_t most = 0;
      for (const Profile& profile : entry_.profiles) {
        if (const auto found = profile.find(symbol); found != profile.end())
          most = std::max(most, found->second.second);
      }
      if (most > 0 && size > most) {
        request_error(symbol, " is ", size, ", ", entry_.file, " was built for at most ", most,
                      "; send less, or build for more");
      }
    }
    request_error("no profile of ", entry_.file, " admits this request's sizes; build with a profile for them");
  }

  void select(int profile) {
    const std::int64_t bytes = engine_->getDeviceMemorySizeV2();
    void* scratch = device_->scratch(static_cast<std::size_t>(bytes));
    if (scratch != scratch_) context_->setDeviceMemoryV2(scratch_ = scratch, bytes);
    if (profile == profile_) return;
    if (!context_->setOptimizationProfileAsync(profile, device_->stream())) fail_run(log_.take());
    profile_ = profile;
  }

  /// Tells the context where an input lies, after copying it to the GPU unless it is there already. A row that is
  /// missing, that of an empty history, is zeros.
  void feed(const TensorSpec& spec, const Array& array, Buffer& buffer, const Shape& shape) {
    const std::size_t bytes = shape.elements() * item_bytes(spec.dtype), given = array.bytes();
    const void* address = array.data;
    if (!array.device || given < bytes) {
      buffer.reserve(*device_, bytes);
      address = buffer.gpu.get();
      std::memset(buffer.host.get(), 0, bytes);
      if (!array.device && given > 0) std::memcpy(buffer.host.get(), array.data, given);
      device_->copy_async(buffer.gpu.get(), buffer.host.get(), bytes, CudaFunctions::host_to_device);
    }
    if (!context_->setInputShape(spec.name.c_str(), dims_of(shape)) ||
        !context_->setInputTensorAddress(spec.name.c_str(), address)) {
      fail_run(spec.name + " of shape " + shape.text() + " is refused: " + log_.take());
    }
  }

  /// Memory for an output: a state's own on the GPU, or the host's that its buffer is copied to.
  Array prepare_output(const TensorSpec& spec, std::size_t index, const Sizes& sizes) {
    const Shape shape = shape_of(spec, sizes);
    const bool state = is_state(spec.name);
    NewArray made = make_array(state ? *device_ : Memory::host(), spec.dtype, shape);
    Buffer& buffer = buffers_[entry_.spec.inputs.size() + index];
    if (!state) buffer.reserve(*device_, made.array.bytes());
    if (!context_->setTensorAddress(spec.name.c_str(), state ? made.data : buffer.gpu.get())) fail_run(log_.take());
    return made.array;
  }

  std::vector<Array> empty_outputs(const Sizes& sizes) const {
    std::vector<Array> outputs;
    for (const TensorSpec& spec : entry_.spec.outputs) {
      auto [array, data] = make_array(Memory::host(), spec.dtype, shape_of(spec, sizes));
      std::memset(data, 0, array.bytes());
      outputs.push_back(array);
    }
    return outputs;
  }

  std::shared_ptr<const Bundle> bundle_;  // keeps entry_ alive
  const EngineEntry& entry_;
  std::shared_ptr<Device> device_;
  TensorRtLog<Trt> log_;
  std::unique_ptr<typename Trt::IRuntime> runtime_;
  std::unique_ptr<typename Trt::ICudaEngine> engine_;
  std::unique_ptr<typename Trt::IExecutionContext> context_;
  std::vector<Buffer> buffers_;  // of the inputs, then of the outputs
  void* scratch_ = nullptr;
  int profile_ = -1;
};

/// "11.4.0" of 110400.
inline std::string version_text(std::int64_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

/// Why a plan cannot run here; empty when it can.
inline std::string obstacle(const EngineEntry& entry, std::int64_t sm, const std::string& version) {
  if (entry.sm != sm) return "is for SM " + std::to_string(entry.sm) + ", this GPU is SM " + std::to_string(sm);
  // A plan names four numbers, the library three.
  if (entry.version != version && entry.version.rfind(version + ".", 0) != 0) {
    return "was built with TensorRT " + entry.version + ", here is " + version;
  }
  return "";
}

/// Both halves in TensorRT, from the pair of plans that fits this GPU and this version of the library.
template <class Trt>
Engines make_tensorrt_pair(const std::shared_ptr<const Bundle>& bundle, const std::shared_ptr<Device>& device,
                           const std::string& version, const typename TensorRtEngine<Trt>::CreateRuntime& create) {
  std::string passed_over;
  for (const char* precision : {"bf16", "fp16", "fp32"}) {  // the fastest first; a state has the precision's type
    std::map<std::string, const EngineEntry*> pair;
    for (const EngineEntry& entry : bundle->manifest.engines) {
      if (entry.flavour != "tensorrt" || entry.precision != precision) continue;
      const std::string why = obstacle(entry, device->sm(), version);
      if (why.empty()) {
        pair[entry.graph] = &entry;
      } else {
        passed_over += "; " + entry.file + " " + why;
      }
    }
    if (pair.count("user_encoder") == 0 || pair.count("target_scorer") == 0) continue;
    return {std::make_unique<TensorRtEngine<Trt>>(bundle, *pair["user_encoder"], create, device),
            std::make_unique<TensorRtEngine<Trt>>(bundle, *pair["target_scorer"], create, device)};
  }
  fail(STCA_BUILD_ERROR, "no TensorRT engines of both halves run here (SM ", device->sm(), ", TensorRT ", version,
       passed_over, "); run `stca build --engine tensorrt --sm ", device->sm(), "` with that version");
}

}  // namespace stca::core
