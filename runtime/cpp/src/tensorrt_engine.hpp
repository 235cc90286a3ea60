// A half in TensorRT.
//
// States stay on the GPU, where the encoder leaves them and the scorer reads them. What a request brings goes through
// page-locked buffers that are made once, as large as the profiles allow; per run, only a state's own memory is
// allocated, from CUDA's pool. Both halves share one stream, one scratch memory and a lock: they run by turns.
//
// Shapes that come again are recorded as CUDA graphs, each with an execution context of its own; all share the scratch
// memory. The sizes of a graph are filled up to the next of a few (`bucket`), where the build has shown that rows beyond
// the offsets change no other (`padded`): it reads zeros there, and what it makes of them is not copied out. A graph
// reads and writes one place, so states are copied within the GPU before and after it; runs with more than
// `most_copied` of them are not recorded. docs/cpp_runtime.md tells what that costs, replays.hpp which graphs are kept.
// Tested with stand-ins for TensorRT and CUDA; it has not run on a GPU yet.
#pragma once

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "contract.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "gpu_device.hpp"
#include "plan.hpp"
#include "replays.hpp"
#include "tensorrt_interface.hpp"

namespace stca::core {

/// See tensorrt_interface.hpp for `Trt`.
template <class Trt>
class TensorRtEngine final : public Engine {
 public:
  using CreateRuntime = std::function<typename Trt::IRuntime*(typename Trt::ILogger&)>;

  TensorRtEngine(std::shared_ptr<const Bundle> bundle, const EngineEntry& entry, const CreateRuntime& create,
                 std::shared_ptr<Device> device, const ReplayLimits& limits = {})
      : bundle_(std::move(bundle)),
        entry_(entry),
        device_(std::move(device)),
        most_copied_(limits.most_copied),
        replays_(limits) {
    check_sizes(entry_);
    const std::string plan = read_plan(*bundle_, entry_);
    const GpuScope scope = device_->use();
    runtime_.reset(create(log_));
    if (runtime_ == nullptr) fail(STCA_BUILD_ERROR, "TensorRT cannot start: ", log_.take());
    if (entry_.lowering == "plugin") runtime_->setEngineHostCodeAllowed(true);  // the plan carries our library
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) refuse();
    if (const std::string why = difference<Trt>(*engine_, entry_); !why.empty()) {
      fail(STCA_BUILD_ERROR, entry_.file, " is not what the manifest says: ", why,
           "; run `stca build --engine tensorrt` again");
    }
    context_ = new_context();
    if (context_ == nullptr) refuse();
    const Sizes largest = largest_sizes(entry_);
    for (auto* specs : {&entry_.spec.inputs, &entry_.spec.outputs}) {
      for (const TensorSpec& spec : *specs) {
        Buffer& buffer = buffers_.emplace_back(Buffer{&spec, is_state(spec.name), {}, {}});
        if (buffer.state) continue;  // made when it is needed
        reserve(buffer.host, bytes_of(spec, largest), true);
        reserve(buffer.gpu, bytes_of(spec, largest), false);
      }
    }
    device_->scratch(scratch_bytes());  // now, so that it does not move while requests run
  }
  TensorRtEngine(const TensorRtEngine&) = delete;
  TensorRtEngine& operator=(const TensorRtEngine&) = delete;
  ~TensorRtEngine() override {
    const GpuScope scope = device_->use();
    settle(device_->stream());
    replays_.clear();
    context_.reset();
    engine_.reset();
    runtime_.reset();
    buffers_.clear();
    device_->trim();
  }

  std::string name() const override {
    // States of one GPU must not be taken for another's.
    const std::string gpu = device_->index() == 0 ? "" : ", GPU " + std::to_string(device_->index());
    return "tensorrt " + entry_.version + " (SM " + std::to_string(entry_.sm) + ", " + entry_.precision + gpu + ")";
  }
  const GraphSpec& spec() const override { return entry_.spec; }
  RunSize largest_run() const override {
    const Sizes largest = largest_sizes(entry_);
    const auto most = [&](std::string_view symbol) {
      const auto found = largest.find(std::string(symbol));
      return found == largest.end() ? no_limit : found->second;
    };
    return {entry_.requests > 0 ? entry_.requests : no_limit, most(tokens_symbol), most(targets_symbol)};
  }
  Memory& memory() override { return *device_; }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    Sizes sizes = sizes_of(entry_, inputs);
    if (const auto targets = sizes.find(std::string(targets_symbol)); targets != sizes.end() && targets->second == 0) {
      return empty_outputs(sizes);
    }
    // An engine's smallest history is one token: an empty one is run as a token of zeros that the offsets leave out.
    const auto tokens = sizes.find(std::string(tokens_symbol));
    const bool empty = tokens != sizes.end() && tokens->second == 0;
    if (empty) tokens->second = 1;
    const int profile = choose_profile(entry_, sizes);

    const std::lock_guard lock(device_->mutex);
    const GpuScope scope = device_->use();
    try {
      std::vector<Array> outputs = execute(inputs, sizes, profile);
      for (std::size_t i = 0; empty && i < outputs.size(); ++i) {
        if (entry_.spec.outputs[i].rows_are(tokens_symbol)) outputs[i] = rows(outputs[i], 0, 0);
      }
      return outputs;
    } catch (const GpuError& e) {
      fail_run(e.what());
    }
  }

 private:
  using Context = typename Trt::IExecutionContext;
  using Stream = Device::Stream;
  using Key = typename Replays<Context>::Key;

  /// Memory that grows when more is asked for.
  struct Block {
    std::shared_ptr<void> memory;
    std::size_t bytes = 0;
  };
  /// One input or output: page-locked on the host, and on the GPU. Those of states are used when a state comes from the
  /// host, and for replays.
  struct Buffer {
    const TensorSpec* spec;
    bool state;
    Block host, gpu;
  };
  std::vector<Array> execute(const std::vector<Array>& inputs, const Sizes& sizes, int profile) {
    const Sizes full = filled_up(entry_, sizes, profile);
    Key key{profile};
    for (const auto& [symbol, size] : full) key.push_back(size);
    use_scratch();
    std::vector<Array> outputs;
    for (std::size_t i = 0; i < entry_.spec.outputs.size(); ++i) {
      Memory& memory = output(i).state ? *device_ : Memory::host();
      outputs.push_back(make_array(memory, output(i).spec->dtype, shape_of(*output(i).spec, sizes)).array);
    }
    const auto* replay = replays_.find(key);
    stage_all(inputs, replay != nullptr ? full : sizes);
    if (replay != nullptr) {
      copy_states_in(inputs, full, device_->stream());
      device_->launch(replay->graph, device_->stream());
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        if (!output(i).state) continue;
        device_->copy_async(written(outputs[i]), output(i).gpu.memory.get(), outputs[i].bytes(),
                            CudaFunctions::device_to_device, device_->stream());
      }
    } else {
      run_once(inputs, outputs, sizes, profile);
    }
    device_->synchronize(device_->stream());
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (!output(i).state) std::memcpy(written(outputs[i]), output(i).host.memory.get(), outputs[i].bytes());
    }
    if (replay == nullptr && worth_copying(full) && replays_.wants(key)) record(key, inputs, full, profile);
    return outputs;
  }

  /// A run through the one context whose shapes change, with states where they lie.
  void run_once(const std::vector<Array>& inputs, const std::vector<Array>& outputs, const Sizes& sizes, int profile) {
    std::vector<const void*> places;
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      const bool input = i < inputs.size();
      const Array* state = !buffers_[i].state ? nullptr : input ? &inputs[i] : &outputs[i - inputs.size()];
      if (state != nullptr && input && !lies_whole(*state, bytes_of(*buffers_[i].spec, sizes))) {
        copy_state_in(i, *state, sizes, device_->stream());
        state = nullptr;
      }
      places.push_back(state != nullptr ? state->data : buffers_[i].gpu.memory.get());
    }
    if (profile != profile_) {
      profile_ = -1;
      if (!context_->setOptimizationProfileAsync(profile, device_->stream())) fail_run(log_.take());
      profile_ = profile;
    }
    bind(*context_, places, sizes);
    enqueue(*context_, sizes, device_->stream());
  }

  /// Keeps the run just done, with rows added up to `sizes`, as a graph. Where that fails, for whatever reason, nothing
  /// is recorded ever again: the request has its outputs, and those to come can do without.
  void record(const Key& key, const std::vector<Array>& inputs, const Sizes& sizes, int profile) {
    try {
      replays_.make_room();
      const Stream stream = device_->recording_stream();
      std::vector<const void*> places;
      for (Buffer& buffer : buffers_) {
        if (buffer.state) own(buffer, bytes_of(*buffer.spec, sizes));
        places.push_back(buffer.gpu.memory.get());
      }
      device_->synchronize(device_->stream());  // until then, new memory is that stream's alone
      stage_all(inputs, sizes);
      copy_states_in(inputs, sizes, stream);

      std::unique_ptr<Context> context = new_context();
      if (context == nullptr) fail_run(log_.take());
      context->setDeviceMemoryV2(scratch_, static_cast<std::int64_t>(scratch_bytes()));
      if (!context->setOptimizationProfileAsync(profile, stream)) fail_run(log_.take());
      bind(*context, places, sizes);
      enqueue(*context, sizes, stream);  // what a context does on its first run only must not be recorded
      device_->synchronize(stream);
      Device::Recording graph = device_->record([&] { enqueue(*context, sizes, stream); });
      replays_.keep(key, std::move(context), std::move(graph));
    } catch (const std::exception&) {
      settle(device_->recording_stream());
      replays_.stop();
      log_.take();
    }
  }

  /// Copies in, the engine, copies out. States are in their places already.
  void enqueue(Context& context, const Sizes& sizes, Stream stream) {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      if (i == entry_.spec.inputs.size() && !context.enqueueV3(stream)) fail_run(log_.take());
      const Buffer& buffer = buffers_[i];
      if (buffer.state) continue;
      const bool input = i < entry_.spec.inputs.size();
      void *host = buffer.host.memory.get(), *gpu = buffer.gpu.memory.get();
      device_->copy_async(input ? gpu : host, input ? host : gpu, bytes_of(*buffer.spec, sizes),
                          input ? CudaFunctions::host_to_device : CudaFunctions::device_to_host, stream);
    }
  }

  /// Tells a context the shapes and where the tensors lie. Outputs come last, when TensorRT knows their shapes: it must
  /// not write more than there is room for.
  void bind(Context& context, const std::vector<const void*>& places, const Sizes& sizes) {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      const TensorSpec& spec = *buffers_[i].spec;
      const char* name = spec.name.c_str();
      const Shape shape = shape_of(spec, sizes);
      const auto dims = dims_of<Trt>(shape);
      if (i < entry_.spec.inputs.size()) {
        if (context.setInputShape(name, dims) && context.setInputTensorAddress(name, places[i])) continue;
      } else {
        const auto theirs = context.getTensorShape(name);
        if (theirs.nbDims != dims.nbDims || !std::equal(dims.d, dims.d + dims.nbDims, theirs.d)) {
          fail_run("the plan gives " + spec.name + " as " + text_of<Trt>(theirs) + ", not " + shape.text());
        }
        if (context.setTensorAddress(name, const_cast<void*>(places[i]))) continue;
      }
      fail_run(spec.name + " of shape " + shape.text() + " is refused: " + log_.take());
    }
  }

  // ---- replays --------------------------------------------------------------------------------------------------

  bool worth_copying(const Sizes& sizes) const {
    std::size_t bytes = 0;
    for (const Buffer& buffer : buffers_) bytes += buffer.state ? bytes_of(*buffer.spec, sizes) : 0;
    return bytes <= most_copied_;
  }

  /// Graphs hold the address of the scratch memory: they go with it, should another engine make it grow.
  void use_scratch() {
    void* scratch = device_->scratch(scratch_bytes());
    if (scratch == scratch_) return;
    replays_.clear();
    context_->setDeviceMemoryV2(scratch_ = scratch, static_cast<std::int64_t>(scratch_bytes()));
  }

  /// Waits for what a run that failed may have left on a stream.
  void settle(Stream stream) noexcept {
    try {
      device_->synchronize(stream);
    } catch (const std::exception&) {  // it has ended, whichever way
    }
  }

  // ---- memory ---------------------------------------------------------------------------------------------------

  Buffer& output(std::size_t i) { return buffers_[entry_.spec.inputs.size() + i]; }
  static void* written(const Array& array) { return const_cast<void*>(array.data); }

  void reserve(Block& block, std::size_t bytes, bool host) {
    bytes = std::max<std::size_t>(bytes, 1);
    if (bytes <= block.bytes) return;
    bytes = std::max(bytes, 2 * block.bytes);
    block = {};
    block.memory = host ? device_->pinned(bytes) : device_->allocate(bytes);
    block.bytes = bytes;
  }

  /// Makes our own memory for a state's tensor at least so large. Graphs hold its address, so they go when it moves.
  void own(Buffer& buffer, std::size_t bytes) {
    if (std::max<std::size_t>(bytes, 1) > buffer.gpu.bytes) replays_.clear();
    reserve(buffer.gpu, bytes, false);
  }

  /// Puts what came from the host into page-locked memory. Rows that are added are zeros.
  void stage(Buffer& buffer, const Array& array, std::size_t bytes) {
    reserve(buffer.host, bytes, true);
    auto* to = static_cast<std::byte*>(buffer.host.memory.get());
    const std::size_t given = array.bytes();
    if (given > 0) std::memcpy(to, array.data, given);
    std::memset(to + given, 0, bytes - given);
  }
  void stage_all(const std::vector<Array>& inputs, const Sizes& sizes) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (!buffers_[i].state) stage(buffers_[i], inputs[i], bytes_of(*buffers_[i].spec, sizes));
    }
  }

  /// Whether an engine can read a state's tensor where it is.
  static bool lies_whole(const Array& array, std::size_t bytes) { return array.device && array.bytes() == bytes; }

  /// Copies a state's tensor into our own memory, with zeros over the rows of whoever was there before.
  void copy_state_in(std::size_t i, const Array& array, const Sizes& sizes, Stream stream) {
    Buffer& buffer = buffers_[i];
    const std::size_t bytes = bytes_of(*buffer.spec, sizes);
    own(buffer, bytes);
    auto* to = static_cast<std::byte*>(buffer.gpu.memory.get());
    if (array.device) {
      device_->copy_async(to, array.data, array.bytes(), CudaFunctions::device_to_device, stream);
      device_->zero_async(to + array.bytes(), bytes - array.bytes(), stream);
    } else {
      stage(buffer, array, bytes);
      device_->copy_async(to, buffer.host.memory.get(), bytes, CudaFunctions::host_to_device, stream);
    }
  }
  void copy_states_in(const std::vector<Array>& inputs, const Sizes& sizes, Stream stream) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (buffers_[i].state) copy_state_in(i, inputs[i], sizes, stream);
    }
  }

  // ---- the plan -------------------------------------------------------------------------------------------------

  std::unique_ptr<Context> new_context() {
    return std::unique_ptr<Context>(
        engine_->createExecutionContext(Trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  }
  std::size_t scratch_bytes() const {
    return static_cast<std::size_t>(std::max<std::int64_t>(engine_->getDeviceMemorySizeV2(), 0));
  }

  [[noreturn]] void refuse() {
    fail(STCA_BUILD_ERROR, entry_.file, " cannot be loaded: ", log_.take(),
         "; run `stca build --engine tensorrt` again");
  }
  [[noreturn]] void fail_run(const std::string& why) const {
    fail(STCA_ENGINE_ERROR, name(), " failed on ", entry_.graph, ": ", why);
  }

  bool is_state(const std::string& name) const {
    const auto& state = bundle_->manifest.state;
    return std::any_of(state.begin(), state.end(), [&](const StateSpec& spec) { return spec.name == name; });
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
  std::unique_ptr<Context> context_;
  std::vector<Buffer> buffers_;  // of the inputs, then of the outputs
  void* scratch_ = nullptr;
  int profile_ = -1;
  const std::size_t most_copied_;
  Replays<Context> replays_;
};

/// Both halves in TensorRT, on one device.
template <class Trt>
Engines make_tensorrt_pair(const std::shared_ptr<const Bundle>& bundle, const Choice& choice, const CudaFunctions& cuda,
                           const typename TensorRtEngine<Trt>::CreateRuntime& create, const ReplayLimits& limits = {}) {
  try {
    const auto device = std::make_shared<Device>(cuda);
    const auto half = [&](const EngineEntry* entry) {
      check_signature(shown(entry->file), as_built(bundle->manifest, *entry), {entry->spec.inputs, entry->spec.outputs},
                      true, "run `stca build --engine tensorrt` again");
      return std::make_unique<TensorRtEngine<Trt>>(bundle, *entry, create, device, limits);
    };
    return {half(choice.encoder), half(choice.scorer), "", ""};
  } catch (const GpuError& e) {
    fail(STCA_BUILD_ERROR, e.what());
  }
}

}  // namespace stca::core
