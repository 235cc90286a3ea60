// Stand-ins for TensorRT and CUDA.
//
// "GPU" memory is host memory that is kept count of, so the sanitizers see every byte that is read or written out of
// place. What is enqueued on a recording stream is kept and run when its graph is launched, with the addresses it had.
// The stand-in of the library computes what the golden `log` bundle computes. Rows that the offsets leave out must be
// zeros, and it answers them with `left_out`.
#pragma once

#include <cstdlib>
#include <fstream>
#include <map>

#include "check.hpp"
#include "session.hpp"
#include "digest.hpp"
#include "tensorrt_engine.hpp"

/// What was recorded, and whether the contexts it came from are alive.
struct Work {
  std::vector<std::function<bool()>> steps;
  std::vector<std::shared_ptr<const bool>> contexts;
};
struct CUstream_st {
  bool recording = false;
  Work work;
};
struct CUgraph_st {
  Work work;
};
struct CUgraphExec_st {
  Work work;
};

namespace fake {

using namespace stca::core;

// ---- CUDA ----------------------------------------------------------------------------------------------------------

struct Gpu {
  std::map<void*, std::size_t> memory, pinned;
  std::size_t pooled = 0;  // freed, but not given back to the driver
  int streams = 0, contexts = 0, graphs = 0, executables = 0;  // alive
  int runs = 0, launches = 0, wrong = 0;  // of engines; graphs replayed; things that must not happen
  int major = 9, driver = CudaFunctions::success;
  int thread = 0;  // the thread's current GPU
  int fail_next_allocations = 0;
  std::string fail;  // what fails from now on
  std::function<void()> while_recording;

  bool holds(const void* p, std::size_t bytes) const {
    const auto after = memory.upper_bound(const_cast<void*>(p));
    if (after == memory.begin()) return false;
    const auto block = std::prev(after);
    return static_cast<const char*>(p) + bytes <= static_cast<const char*>(block->first) + block->second;
  }
  bool empty() const { return pooled == 0 && memory.empty() && pinned.empty() && streams + contexts + graphs + executables == 0; }
};
inline Gpu gpu;

/// Does it, or keeps it for when the graph is launched.
inline int enqueue(CudaFunctions::Stream stream, std::function<bool()> work) {
  if (!stream->recording) return work() ? 0 : 1;
  stream->work.steps.push_back(std::move(work));
  return 0;
}

inline CudaFunctions cuda() {
  using F = CudaFunctions;
  F f{};
  f.get_error_name = [](int) { return "cudaErrorOfTheTest"; };
  f.get_last_error = [] { return 0; };
  f.get_device = [](int* device) { return *device = gpu.thread, gpu.driver; };
  f.set_device = [](int device) { return device < 2 ? (gpu.thread = device, 0) : 101; };
  f.device_get_attribute = [](int* value, int attribute, int) {
    *value = attribute == F::capability_major ? gpu.major : 0;
    return 0;
  };
  f.device_get_default_pool = [](F::MemoryPool* pool, int) { return *pool = nullptr, 0; };
  f.pool_set_attribute = [](F::MemoryPool, int, void*) { return 0; };
  f.pool_trim = [](F::MemoryPool, std::size_t least) { return gpu.pooled = least, 0; };
  f.stream_create = [](F::Stream* stream, unsigned) { return ++gpu.streams, *stream = new CUstream_st, 0; };
  f.stream_destroy = [](F::Stream stream) { return --gpu.streams, delete stream, 0; };
  f.stream_synchronize = [](F::Stream stream) { return stream->recording ? 1 : 0; };
  f.stream_begin_capture = [](F::Stream stream, int) {
    if (gpu.fail == "begin" || stream->recording) return 1;
    return stream->recording = true, 0;
  };
  f.stream_end_capture = [](F::Stream stream, F::Graph* graph) {
    if (!stream->recording) return 1;
    stream->recording = false;
    Work work = std::exchange(stream->work, {});
    if (gpu.fail == "end") return 1;
    return ++gpu.graphs, *graph = new CUgraph_st{std::move(work)}, 0;
  };
  f.graph_instantiate = [](F::GraphExec* executable, F::Graph graph, unsigned long long) {
    if (gpu.fail == "instantiate") return 1;
    return ++gpu.executables, *executable = new CUgraphExec_st{graph->work}, 0;
  };
  f.graph_destroy = [](F::Graph graph) { return --gpu.graphs, delete graph, 0; };
  f.graph_exec_destroy = [](F::GraphExec executable) {
    for (const auto& alive : executable->work.contexts) gpu.wrong += *alive ? 0 : 1;  // a graph goes before its context
    return --gpu.executables, delete executable, 0;
  };
  f.graph_launch = [](F::GraphExec executable, F::Stream stream) {
    ++gpu.launches;
    for (const auto& step : executable->work.steps) {
      if (stream->recording || !step()) return ++gpu.wrong, 1;
    }
    return 0;
  };
  f.malloc_async = [](void** p, std::size_t bytes, F::Stream stream) {
    if (gpu.fail_next_allocations > 0) return --gpu.fail_next_allocations, F::error_memory_allocation;
    gpu.wrong += stream->recording ? 1 : 0;
    std::memset(*p = std::malloc(bytes), 0xCD, bytes);
    gpu.memory[*p] = bytes;
    return 0;
  };
  f.free_async = [](void* p, F::Stream stream) {
    gpu.wrong += stream->recording ? 1 : 0;
    const auto freed = gpu.memory.find(p);
    if (freed == gpu.memory.end()) return 1;
    gpu.pooled += freed->second;
    gpu.memory.erase(freed);
    std::free(p);
    return 0;
  };
  f.host_alloc = [](void** p, std::size_t bytes, unsigned) {
    std::memset(*p = std::malloc(bytes), 0xCD, bytes);
    gpu.pinned[*p] = bytes;
    return 0;
  };
  f.free_host = [](void* p) {
    if (gpu.pinned.erase(p) == 0) return 1;
    std::free(p);
    return 0;
  };
  f.memcpy_async = [](void* to, const void* from, std::size_t bytes, int kind, F::Stream stream) {
    return enqueue(stream, [=] {
      const bool to_gpu = gpu.holds(to, bytes), from_gpu = gpu.holds(from, bytes);
      if (to_gpu != (kind != F::device_to_host) || from_gpu != (kind != F::host_to_device)) return false;
      std::memcpy(to, from, bytes);
      return true;
    });
  };
  f.memset_async = [](void* p, int value, std::size_t bytes, F::Stream stream) {
    return enqueue(stream, [=] { return gpu.holds(p, bytes) && std::memset(p, value, bytes) == p; });
  };
  return f;
}

// ---- TensorRT ------------------------------------------------------------------------------------------------------

struct Trt {
  enum class DataType { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kBF16, kINT64 };
  enum class TensorIOMode { kNONE, kINPUT, kOUTPUT };
  enum class TensorLocation { kDEVICE, kHOST };
  enum class TensorFormat { kLINEAR, kOTHER };
  enum class ExecutionContextAllocationStrategy { kSTATIC, kUSER_MANAGED };
  struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
  };
  struct ILogger {
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING };
    virtual ~ILogger() = default;
    virtual void log(Severity severity, const char* message) noexcept = 0;
  };

  static constexpr float left_out = -1e30f;

  /// What a context is set to. A graph that was recorded from it keeps a copy, and knows when it was set again.
  struct Setting {
    const EngineEntry* entry;
    std::map<std::string, Shape> shapes;  // of the inputs
    std::map<std::string, void*> addresses;
    int profile = -1;
    void* scratch = nullptr;

    Sizes sizes() const {
      Sizes sizes;
      for (const TensorSpec& spec : entry->spec.inputs) {
        const Shape& shape = shapes.at(spec.name);
        for (int i = 0; i < shape.rank; ++i) sizes[spec.shape[static_cast<std::size_t>(i)].symbol] = shape[i];
      }
      return sizes;
    }
    template <class T>
    T* data(const char* name) const {
      return static_cast<T*>(addresses.at(name));
    }
    std::int64_t rows(const char* name) const { return shapes.at(name)[0]; }

    bool run() const {
      if (profile < 0 || !gpu.holds(scratch, entry->graph == "user_encoder" ? 1000 : 2000)) return false;
      const Sizes all = sizes();
      for (const auto* specs : {&entry->spec.inputs, &entry->spec.outputs}) {
        for (const TensorSpec& spec : *specs) {
          if (!gpu.holds(addresses.at(spec.name), bytes_of(spec, all))) return false;
        }
      }
      ++gpu.runs;
      entry->graph == "user_encoder" ? encode() : score();
      return true;
    }
    void encode() const {
      const std::int32_t last = data<std::int32_t>("history_offsets")[rows("user_segment")];
      const auto *item = data<std::int64_t>("history_item"), *action = data<std::int64_t>("history_action");
      for (std::int64_t i = 0; i < rows("history_item"); ++i) {
        gpu.wrong += i >= last && (item[i] != 0 || action[i] != 0) ? 1 : 0;
        data<float>("token")[2 * i] = i < last ? static_cast<float>(item[i]) : left_out;
        data<float>("token")[2 * i + 1] = i < last ? static_cast<float>(action[i]) : left_out;
      }
      const std::int64_t users = rows("user_segment");
      std::memcpy(data<void>("state_history_offsets"), data<void>("history_offsets"),
                  static_cast<std::size_t>(4 * (users + 1)));
      std::memcpy(data<void>("state_user_segment"), data<void>("user_segment"), static_cast<std::size_t>(8 * users));
      std::memcpy(data<void>("state_user_profile"), data<void>("user_profile"), static_cast<std::size_t>(8 * users));
    }
    void score() const {
      const auto *history = data<std::int32_t>("state_history_offsets"), *bounds = data<std::int32_t>("target_offsets");
      for (std::int64_t r = 0; r < rows("state_user_segment"); ++r) {
        float left = 10 * static_cast<float>(data<std::int64_t>("state_user_segment")[r]);
        float right = 100 * static_cast<float>(data<std::int64_t>("request_device")[r]);
        for (std::int32_t i = history[r]; i < history[r + 1]; ++i) {
          left += data<float>("token")[2 * i];
          right += data<float>("token")[2 * i + 1];
        }
        for (std::int32_t t = bounds[r]; t < bounds[r + 1]; ++t) {
          data<float>("scores")[2 * t] = left + static_cast<float>(data<std::int64_t>("target_item")[t]);
          data<float>("scores")[2 * t + 1] =
              right + data<float>("target_price")[2 * t] + data<float>("state_user_profile")[2 * r];
        }
      }
      const std::int64_t users = rows("state_user_segment");
      for (std::int64_t i = 2 * history[users]; i < 2 * rows("token"); ++i) gpu.wrong += data<float>("token")[i] != 0;
      for (std::int64_t t = bounds[users]; t < rows("target_item"); ++t) {
        const auto* price = data<float>("target_price") + 2 * t;
        gpu.wrong += data<std::int64_t>("target_item")[t] != 0 || price[0] != 0 || price[1] != 0;
        data<float>("scores")[2 * t] = data<float>("scores")[2 * t + 1] = left_out;
      }
    }
  };

  struct IExecutionContext {
    struct Shared {
      Setting setting;
      int changes = 0;
      bool alive = true, settled = false;  // settled: has run since it was set
    };
    std::shared_ptr<Shared> shared;

    explicit IExecutionContext(const EngineEntry* entry) : shared(new Shared{{entry, {}, {}}}) { ++gpu.contexts; }
    ~IExecutionContext() { shared->alive = false, --gpu.contexts; }

    Setting& change() {
      ++shared->changes;
      shared->settled = false;
      return shared->setting;
    }
    bool setInputShape(const char* name, const Dims& dims) {
      Shape& shape = change().shapes[name] = {};
      for (int i = 0; i < dims.nbDims; ++i) shape[shape.rank++] = dims.d[i];
      return dims.d[0] != 5;
    }
    Dims getTensorShape(const char* name) const {
      for (const TensorSpec& spec : shared->setting.entry->spec.outputs) {
        Shape shape = shape_of(spec, shared->setting.sizes());
        if (gpu.fail == "shape") ++shape[0];
        if (spec.name == name) return dims_of<Trt>(shape);
      }
      return {-1, {}};
    }
    bool setTensorAddress(const char* name, void* p) { return change().addresses[name] = p, gpu.holds(p, 1); }
    bool setInputTensorAddress(const char* name, const void* p) { return setTensorAddress(name, const_cast<void*>(p)); }
    bool setOptimizationProfileAsync(int index, CudaFunctions::Stream) { return change().profile = index, true; }
    void setDeviceMemoryV2(void* p, std::int64_t bytes) {
      change().scratch = gpu.holds(p, static_cast<std::size_t>(bytes)) ? p : nullptr;
    }
    bool enqueueV3(CudaFunctions::Stream stream) {
      if (!stream->recording) return shared->settled = shared->setting.run();
      if (gpu.while_recording) gpu.while_recording();
      if (gpu.fail == "enqueue") return false;
      if (!shared->settled) ++gpu.wrong;  // its first run since it was set must not be recorded
      // What was recorded is tied to the context: it must be there, and set as it was.
      stream->work.contexts.emplace_back(shared, &shared->alive);
      stream->work.steps.push_back([now = shared, then = shared->setting, changes = shared->changes] {
        return now->alive && now->changes == changes && then.run();
      });
      return true;
    }
  };

  struct ICudaEngine {
    const EngineEntry& entry;
    bool retyped;

    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) {
      return gpu.fail == "context" ? nullptr : new IExecutionContext(&entry);
    }
    int getNbIOTensors() const { return static_cast<int>(entry.spec.inputs.size() + entry.spec.outputs.size()); }
    int getNbOptimizationProfiles() const { return 2; }
    std::int64_t getDeviceMemorySizeV2() const { return entry.graph == "user_encoder" ? 1000 : 2000; }
    TensorIOMode getTensorIOMode(const char* name) const {
      for (const TensorSpec& spec : entry.spec.inputs) {
        if (spec.name == name) return TensorIOMode::kINPUT;
      }
      return TensorIOMode::kOUTPUT;
    }
    DataType getTensorDataType(const char* name) const {
      for (const auto* specs : {&entry.spec.inputs, &entry.spec.outputs}) {
        for (const TensorSpec& spec : *specs) {
          if (spec.name == name && !retyped) return *tensorrt_type<Trt>(spec.dtype);
        }
      }
      return DataType::kBOOL;
    }
    TensorLocation getTensorLocation(const char*) const { return TensorLocation::kDEVICE; }
    TensorFormat getTensorFormat(const char*) const { return TensorFormat::kLINEAR; }
  };

  struct IRuntime {
    ILogger& log;
    std::shared_ptr<const Bundle> bundle;
    bool host_code = false;

    void setEngineHostCodeAllowed(bool allowed) noexcept { host_code = allowed; }

    /// A plan of the tests is the name of its graph, and what is wrong with it.
    ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) {
      const std::string plan(static_cast<const char*>(data), size), graph = plan.substr(0, plan.find(' '));
      if (check::contains(plan, "library") != host_code) {
        log.log(ILogger::Severity::kERROR, "host code");
        return nullptr;
      }
      if (check::contains(plan, "refused")) {
        log.log(ILogger::Severity::kERROR, "the plan has\nthe wrong magic");
        return nullptr;
      }
      for (const EngineEntry& entry : bundle->manifest.engines) {
        if (entry.graph == graph) return new ICudaEngine{entry, check::contains(plan, "retyped")};
      }
      return nullptr;
    }
  };
};

// ---- the tests' bundle ---------------------------------------------------------------------------------------------

/// The golden `log` bundle with plans of both halves, for histories of 1 to 4 and 1 to 6 tokens.
struct Plans {
  check::TemporaryFolder folder;
  std::shared_ptr<Bundle> bundle;

  explicit Plans(const std::string& wrong = "") : bundle(std::make_shared<Bundle>(*Bundle::load(STCA_GOLDEN "/log"))) {
    bundle->path = folder.path();
    bundle->folder = std::make_shared<const Folder>(folder.path());
    for (const char* graph : {"user_encoder", "target_scorer"}) {
      EngineEntry entry;
      entry.graph = graph, entry.flavour = "tensorrt", entry.file = std::string(graph) + ".plan";
      entry.precision = "fp32", entry.sm = 90, entry.version = "11.4.0.106", entry.requests = 3;
      entry.spec = bundle->manifest.graph(graph);
      entry.profiles = {{{"N_h", {1, 6}}, {"N_t", {1, 8}}, {"B", {1, 3}}, {"B_plus_1", {2, 4}}},
                        {{"N_h", {1, 4}}, {"N_t", {1, 8}}, {"B", {1, 3}}, {"B_plus_1", {2, 4}}}};
      const std::string plan = graph + (" " + wrong);
      std::ofstream(folder.path() / entry.file) << plan;
      Sha256 digest;
      digest.update(plan);
      bundle->manifest.files[entry.file] = {static_cast<std::int64_t>(plan.size()), digest.hex()};
      bundle->manifest.engines.push_back(entry);
    }
  }
  EngineEntry& encoder() const { return bundle->manifest.engines[0]; }
  EngineEntry& scorer() const { return bundle->manifest.engines[1]; }

  /// Histories of up to 40 and 100 tokens and 48 targets, to which rows may be added.
  void pad() const {
    bundle->manifest.max_history = 100;
    for (EngineEntry& entry : bundle->manifest.engines) {
      entry.padded =
          entry.graph == "user_encoder" ? std::vector<std::string>{"N_h"} : std::vector<std::string>{"N_h", "N_t"};
      for (std::size_t p : {0u, 1u}) {
        entry.profiles[p]["N_h"].second = p == 0 ? 100 : 40;
        entry.profiles[p]["N_t"].second = 48;
      }
    }
  }

  auto create() const {
    return [b = bundle](Trt::ILogger& log) { return new Trt::IRuntime{log, b}; };
  }
  Engines engines(const ReplayLimits& limits = {}) const {
    Choice choice;
    choice.encoder = &bundle->manifest.engines[0], choice.scorer = &bundle->manifest.engines[1];
    return make_tensorrt_pair<Trt>(bundle, choice, cuda(), create(), limits);
  }

  Model model(const ReplayLimits& limits = {}, bool truncate = false) const {
    auto pair = std::make_shared<Engines>(engines(limits));
    Options options;
    options.truncate = truncate;
    options.make = [pair](const auto&, const std::string& graph) {
      return std::move(graph == "user_encoder" ? pair->encoder : pair->scorer);
    };
    return Model(bundle, options);
  }
};

struct Log {
  std::vector<std::int64_t> items, actions, segment{2}, device{1}, targets{7, 999};
  std::vector<float> profile{0.5f, 1.0f}, prices{1.5f, 2.0f, 0.25f, 0.0f};

  explicit Log(std::int64_t tokens)
      : items(static_cast<std::size_t>(tokens), 100), actions(static_cast<std::size_t>(tokens), 1) {}

  template <class T>
  static stca_tensor tensor(const char* name, stca_dtype dtype, const std::vector<T>& values, std::int64_t width = 0) {
    const auto count = static_cast<std::int64_t>(values.size());
    if (width == 0) return {name, values.data(), dtype, 1, {count}};
    return {name, values.data(), dtype, 2, {count / width, width}};
  }
  std::vector<stca_tensor> events() const {
    return {tensor("history_item", STCA_INT64, items), tensor("history_action", STCA_INT64, actions)};
  }
  Row row(const Door& door) const {
    std::vector<stca_tensor> all = events();
    all.push_back(tensor("user_segment", STCA_INT64, segment));
    all.push_back(tensor("user_profile", STCA_FLOAT32, profile, 2));
    all.push_back(tensor("request_device", STCA_INT64, device));
    all.push_back(tensor("target_item", STCA_INT64, targets));
    all.push_back(tensor("target_price", STCA_FLOAT32, prices, 2));
    Row row;
    door.admit({all.data(), all.size()}, STCA_REQUEST | STCA_TARGET, STCA_USER, row);
    door.admit({all.data(), all.size()}, STCA_USER, STCA_REQUEST | STCA_TARGET, row);
    return row;
  }
  /// Score of the first target and the first task.
  float first() const { return 20 + 7 + 100 * static_cast<float>(items.size()); }
};

inline float at(const Array& scores, std::size_t i) { return static_cast<const float*>(scores.data)[i]; }

}  // namespace fake
