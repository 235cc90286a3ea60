// The TensorRT engine with stand-ins for TensorRT and CUDA: the logic around
// them, not what they compute.
//
// "GPU" memory is host memory that is kept count of, so the sanitizers see
// every byte that is read or written out of place. What is enqueued on a
// recording stream is kept and run when its graph is launched, with the
// addresses it had. The stand-in of the library computes what the golden `log`
// bundle computes.
#include <cstdlib>
#include <fstream>
#include <map>

#include "check.hpp"
#include "session.hpp"
#include "sha256.hpp"
#include "tensorrt_engine.hpp"

using namespace stca::core;

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

namespace {

// ---- CUDA
// -----------------------------------------------------------------------------------------------------------

struct Gpu {
  std::map<void*, std::size_t> memory, pinned;
  int streams = 0, contexts = 0, graphs = 0, executables = 0;  // alive
  int launches = 0, wrong = 0;                                 // graphs replayed; things that must not happen
  int major = 9, driver = CudaFunctions::success,
      thread = 0;  // the thread's current GPU
  int fail_next_allocations = 0;
  std::string fail;  // what fails from now on
  std::function<void()> while_recording;

  bool holds(const void* p, std::size_t bytes) const {
    const auto after = memory.upper_bound(const_cast<void*>(p));
    if (after == memory.begin()) return false;
    const auto block = std::prev(after);
    return static_cast<const char*>(p) + bytes <= static_cast<const char*>(block->first) + block->second;
  }
  bool empty() const { return memory.empty() && pinned.empty() && streams + contexts + graphs + executables == 0; }
};
Gpu gpu;

/// Does it, or keeps it for when the graph is launched.
int enqueue(CudaFunctions::Stream stream, std::function<bool()> work) {
  if (!stream->recording) return work() ? 0 : 1;
  stream->work.steps.push_back(std::move(work));
  return 0;
}

CudaFunctions fake_cuda() {
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
    if (gpu.memory.erase(p) == 0) return 1;
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
  return f;
}

// ---- TensorRT
// -------------------------------------------------------------------------------------------------------

struct Fake {
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

  /// What a context is set to. A graph that was recorded from it keeps a copy,
  /// and knows when it was set again.
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
      entry->graph == "user_encoder" ? encode() : score();
      return true;
    }
    void encode() const {
      const std::int32_t last = data<std::int32_t>("history_offsets")[rows("user_segment")];
      for (std::int64_t i = last; i < rows("history_item"); ++i) {  // rows that the offsets leave out
        if (data<std::int64_t>("history_item")[i] != 0) ++gpu.wrong;
      }
      for (std::int64_t i = 0; i < rows("history_item"); ++i) {
        data<float>("token")[2 * i] = static_cast<float>(data<std::int64_t>("history_item")[i]);
        data<float>("token")[2 * i + 1] = static_cast<float>(data<std::int64_t>("history_action")[i]);
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
        if (spec.name == name) return dims_of<Fake>(shape);
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
      // What was recorded is tied to the context: it must be there, and set as
      // it was.
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
          if (spec.name == name && !retyped) return *tensorrt_type<Fake>(spec.dtype);
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

    /// A plan of the tests is the name of its graph, and what is wrong with it.
    ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) {
      const std::string plan(static_cast<const char*>(data), size), graph = plan.substr(0, plan.find(' '));
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

// ---- the tests' bundle
// ----------------------------------------------------------------------------------------------

/// The golden `log` bundle with plans of both halves, for histories of 1 to 4
/// and 1 to 6 tokens.
struct Plans {
  check::TemporaryFolder folder;
  std::shared_ptr<Bundle> bundle;

  explicit Plans(const std::string& wrong = "") : bundle(std::make_shared<Bundle>(*Bundle::load(STCA_GOLDEN "/log"))) {
    bundle->path = folder.path();
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

  auto create() const {
    return [b = bundle](Fake::ILogger& log) { return new Fake::IRuntime{log, b}; };
  }
  Engines engines(Replays replays = {}) const {
    Choice choice;
    choice.encoder = &bundle->manifest.engines[0], choice.scorer = &bundle->manifest.engines[1];
    return make_tensorrt_pair<Fake>(bundle, choice, fake_cuda(), create(), replays);
  }

  Model model(Replays replays = {}) const {
    auto pair = std::make_shared<Engines>(engines(replays));
    Options options;
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

float at(const Array& scores, std::size_t i) { return static_cast<const float*>(scores.data)[i]; }

}  // namespace

TEST(tensorrt_keeps_states_on_the_gpu) {
  {
    const Plans plans;
    const Model model = plans.model({0, 0, 0});
    const Log log(3);
    const Row row = log.row(model.door());
    const StateCache::State state = model.encode(row);
    for (const Array& tensor : state->tensors) CHECK(tensor.device && gpu.holds(tensor.data, tensor.bytes()));
    CHECK_EQUAL(state->bytes(), 3u * 8 + 8 + 8 + 8);
    const std::size_t blocks = gpu.memory.size(), pinned = gpu.pinned.size();
    for (int i = 0; i < 3; ++i) {
      const Array scores = model.score({state}, {row});
      CHECK_EQUAL(scores.shape.text(), "[2, 2]");
      CHECK_EQUAL(at(scores, 0), log.first());
      CHECK_EQUAL(at(scores, 3), 100 + 3 + 0.25f + 0.5f);
    }
    CHECK_EQUAL(gpu.memory.size(),
                blocks);  // a hit allocates nothing on the GPU, nor page-locked memory
    CHECK_EQUAL(gpu.pinned.size(), pinned);
  }
  CHECK(gpu.empty());
}

TEST(tensorrt_joins_states_up_to_the_engines_requests) {
  const Plans plans;
  const Model model = plans.model();
  const Log logs[] = {Log(2), Log(1), Log(0), Log(3), Log(1)};
  std::vector<StateCache::State> states;
  std::vector<Row> rows;
  for (const Log& log : logs) {
    rows.push_back(log.row(model.door()));
    states.push_back(model.encode(rows.back()));
  }
  const Array scores = model.score(states, rows);  // three requests, then two
  CHECK_EQUAL(scores.shape.text(), "[10, 2]");
  for (std::size_t i = 0; i < 5; ++i) CHECK_EQUAL(at(scores, 4 * i), logs[i].first());
}

TEST(tensorrt_appends_on_the_gpu) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(4), more(3);
  const Row row = log.row(model.door());
  Row added;
  const std::vector<stca_tensor> events = more.events();
  model.door().admit_events({events.data(), events.size()}, added);
  const StateCache::State longer = model.extend(*model.encode(row), *model.encode(added));
  CHECK_EQUAL(longer->tokens, 6);  // the bundle's window
  CHECK(longer->tensors[0].device && !longer->tensors[1].device);
  CHECK_EQUAL(at(model.score({longer}, {row}), 0), Log(6).first());
}

TEST(tensorrt_runs_an_empty_history_as_one_token_left_out) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(0);
  const Row row = log.row(model.door());
  const StateCache::State state = model.encode(row);
  CHECK_EQUAL(gpu.wrong, 0);
  CHECK_EQUAL(state->tensors[0].shape.text(), "[0, 2]");
  CHECK_EQUAL(at(model.score({state}, {row}), 0), log.first());
  Log nothing(0);
  nothing.targets = {}, nothing.prices = {};
  CHECK_EQUAL(model.score({state}, {nothing.row(model.door())}).shape.text(), "[0, 2]");
}

TEST(tensorrt_says_what_a_run_exceeds) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(1);
  const Row row = log.row(model.door());
  const StateCache::State state = model.encode(row);
  const auto with_targets = [&](std::size_t count) {
    Log many(1);
    many.targets.assign(count, 1), many.prices.assign(2 * count, 0);
    model.score({state}, {many.row(model.door())});
  };
  CHECK_THROWS(with_targets(9), Error, "N_t is 9, target_scorer.plan was built for at most 8");
  CHECK_THROWS(with_targets(5), Error, "target_item of shape [5] is refused");
  CHECK_EQUAL(at(model.score({state}, {row}), 0), log.first());  // and goes on
}

TEST(tensorrt_says_when_the_gpu_is_full) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(2);
  const Row row = log.row(model.door());
  const auto code_without_memory = [](auto&& f) {
    gpu.fail_next_allocations = 1;
    try {
      f();
    } catch (const Error& e) {
      CHECK(check::contains(e.what(), "the GPU is out of memory"));
      return e.code;
    }
    return STCA_OK;
  };
  CHECK_EQUAL(code_without_memory([&] { model.encode(row); }), STCA_ENGINE_ERROR);
  const StateCache::State state = model.encode(row);
  CHECK_EQUAL(code_without_memory([&] { model.score({state, state}, {row, row}); }),
              STCA_ENGINE_ERROR);  // to join them
  CHECK_EQUAL(code_without_memory([&] { plans.engines(); }), STCA_BUILD_ERROR);
  CHECK_EQUAL(at(model.score({state}, {row}), 0), log.first());
}

TEST(tensorrt_says_why_a_plan_is_refused) {
  const Plans plans;
  gpu.driver = CudaFunctions::error_no_device;
  CHECK_THROWS(plans.engines(), Error, "no usable NVIDIA GPU or driver (cudaErrorOfTheTest)");
  CHECK_THROWS(Device::current_sm(fake_cuda()), GpuError, "no usable NVIDIA GPU or driver (cudaErrorOfTheTest)");
  gpu.driver = CudaFunctions::success;
  CHECK_EQUAL(Device::current_sm(fake_cuda()), 90);
  CHECK_THROWS(Plans("refused").engines(), Error, "user_encoder.plan cannot be loaded: the plan has the wrong magic");
  CHECK_THROWS(Plans("retyped").engines(), Error, "has another type");
  gpu.fail = "context";
  CHECK_THROWS(plans.engines(), Error, "user_encoder.plan cannot be loaded: TensorRT gives no reason");
  gpu.fail = "";
  std::ofstream(plans.folder.path() / "user_encoder.plan") << "user_encoder of someone else";
  CHECK_THROWS(plans.engines(), Error, "user_encoder.plan was changed");
  CHECK(gpu.empty());
}

TEST(tensorrt_says_when_sizes_make_no_sense) {
  const auto refused = [](const std::string& why, auto&& change) {
    const Plans plans;
    change(plans.encoder());
    CHECK_THROWS(plans.engines(), Error, "user_encoder.plan cannot be served: " + why);
  };
  refused("it has no profiles", [](EngineEntry& e) { e.profiles.clear(); });
  refused("a profile says nothing of N_h", [](EngineEntry& e) { e.profiles[1].erase("N_h"); });
  refused("a profile has no sizes for B", [](EngineEntry& e) { e.profiles[0]["B"] = {3, 2}; });
  refused("a profile has no sizes for B", [](EngineEntry& e) { e.profiles[0]["B"] = {-1, 2}; });
  refused("history_item is larger than any memory",
          [](EngineEntry& e) { e.profiles[0]["N_h"].second = std::int64_t{1} << 60; });
  refused("no input has the N_x rows of token", [](EngineEntry& e) { e.spec.outputs[0].shape[0].symbol = "N_x"; });

  const Plans plans;
  const Model model = plans.model();
  gpu.fail = "shape";  // nothing must be written where there is no room
  CHECK_THROWS(model.encode(Log(2).row(model.door())), Error, "the plan gives token as [3, 2], not [2, 2]");
  gpu.fail = "";
}

TEST(tensorrt_leaves_threads_their_gpu) {
  const Plans plans;
  const Model model = plans.model();
  gpu.thread = 1;  // the caller's own
  const Log log(2);
  const Row row = log.row(model.door());
  for (int i = 0; i < 3; ++i)
    CHECK_EQUAL(at(model.score({model.encode(row), model.encode(row)}, {row, row}), 0), log.first());
  CHECK_EQUAL(gpu.thread, 1);
  // Bundles are loaded on the thread's GPU. States stay on theirs, so those of
  // another one are not taken for its own.
  const Model other = plans.model();
  CHECK_EQUAL(other.engine(true).name(), "tensorrt 11.4.0.106 (SM 90, fp32, GPU 1)");
  CHECK(!(other.state_kind() == model.state_kind()));
  gpu.thread = 0;
}

TEST(tensorrt_keeps_apart_states_of_different_engines) {
  const Plans plans;
  const StateKind kind = plans.model().state_kind();
  CHECK(kind == plans.model().state_kind());
  const auto differs = [&](auto&& change) {
    const Plans changed;
    change(*changed.bundle);
    return !(changed.model().state_kind() == kind);
  };
  CHECK(differs([](Bundle& b) { b.manifest.engines[0].precision = "fp16"; }));
  CHECK(differs([](Bundle& b) { b.manifest.engines[0].sm = 80; }));
  CHECK(differs([](Bundle& b) { b.manifest.engines[0].version = "11.5.0.1"; }));
  CHECK(differs([](Bundle& b) { b.manifest.max_history = 5; }));
  CHECK(differs([](Bundle& b) { b.manifest.weights = "other"; }));
  CHECK(differs([](Bundle& b) { b.manifest.files[b.manifest.graph("user_encoder").file].sha256 = "other"; }));
  CHECK(!differs([](Bundle& b) { b.manifest.files[b.manifest.graph("target_scorer").file].sha256 = "other"; }));
}

// ---- CUDA graphs
// ----------------------------------------------------------------------------------------------------

namespace {

/// A user with `tokens` tokens that are like no other's, scored.
struct User {
  Log log;
  Row row;
  StateCache::State state;
  float first;

  User(const Model& model, std::int64_t tokens, std::int64_t item) : log(tokens) {
    std::fill(log.items.begin(), log.items.end(), item);
    row = log.row(model.door());
    state = model.encode(row);
    first = 20 + 7 + static_cast<float>(tokens * item);
  }
  bool right(const Model& model) const { return at(model.score({state}, {row}), 0) == first; }
};

}  // namespace

TEST(tensorrt_replays_a_shape_that_comes_again) {
  {
    const Plans plans;
    const Model model = plans.model();
    std::vector<User> users;
    gpu.launches = 0;
    for (std::int64_t item = 1; item <= 5; ++item) users.emplace_back(model, 3, item);
    CHECK_EQUAL(gpu.launches, 3);  // the encoder's; the first of a shape is run,
                                   // the second run and recorded
    CHECK_EQUAL(gpu.executables, 1);
    CHECK_EQUAL(gpu.contexts, 3);
    gpu.launches = 0;
    for (const User& user : users) CHECK(user.right(model));  // each state lies elsewhere
    CHECK_EQUAL(gpu.launches, 3);
    CHECK_EQUAL(gpu.executables, 2);
    CHECK_EQUAL(gpu.contexts, 4);
    CHECK_EQUAL(gpu.graphs, 0);  // made into executables and gone

    // Nothing is allocated by a replay but the memory of the state it makes.
    const std::size_t blocks = gpu.memory.size(), pinned = gpu.pinned.size();
    for (const User& user : users) CHECK(user.right(model));
    CHECK_EQUAL(gpu.memory.size(), blocks);
    const User more(model, 3, 9);
    CHECK_EQUAL(gpu.memory.size(), blocks + more.state->tensors.size());
    CHECK_EQUAL(gpu.pinned.size(), pinned);
    CHECK(more.right(model));

    // Other shapes in between go through the one context that changes, and
    // leave the graphs' own alone.
    for (std::int64_t tokens : {1, 3, 6, 3, 4, 3}) {
      const User user(model, tokens, 5);
      CHECK(user.right(model) && user.right(model));
    }
    CHECK_EQUAL(gpu.wrong, 0);
  }
  CHECK(gpu.empty());
}

TEST(tensorrt_replays_an_empty_history) {
  const Plans plans;
  const Model model = plans.model();
  const User one(model, 1, 8), none(model, 0, 1);
  CHECK_EQUAL(gpu.executables,
              1);  // an empty history is one token to the engine: the same shape
  gpu.launches = 0;
  for (int i = 0; i < 3; ++i) CHECK(one.right(model) && none.right(model));
  const User again(model, 0, 1);
  CHECK_EQUAL(again.state->tensors[0].shape.text(), "[0, 2]");
  CHECK(again.right(model) && gpu.launches > 0);
  CHECK_EQUAL(gpu.wrong, 0);
}

TEST(tensorrt_keeps_so_many_graphs) {
  const Plans plans;
  {
    const Model model = plans.model({2, 1 << 20, 3});
    const User one(model, 1, 1), two(model, 2, 1), six(model, 6, 1);
    const auto replayed = [&](const User& user) {
      gpu.launches = 0;
      CHECK(user.right(model));
      return gpu.launches == 1;
    };
    for (const User* user : {&six, &six, &one, &one}) CHECK(!replayed(*user));
    for (int i = 0; i < 5; ++i) CHECK(replayed(six) && replayed(one) && !replayed(two));  // both are in use: they stay
    CHECK_EQUAL(gpu.executables, 2);
    int runs = 0;
    while (runs < 20 && replayed(one) && !replayed(two)) ++runs;
    CHECK_EQUAL(runs, 2);  // `six` was not used in more than three runs: it goes, with its context
    CHECK_EQUAL(gpu.executables, 2);
    CHECK_EQUAL(gpu.contexts, 4);
    CHECK(replayed(one) && replayed(two) && !replayed(six));
    CHECK_EQUAL(gpu.wrong, 0);
  }
  {
    const Model model = plans.model({1, 1 << 20, 1});
    const User one(model, 1, 1), two(model, 2, 1), three(model, 3, 1), four(model, 4, 1), six(model, 6, 1);
    for (const User* user : {&one, &two, &three, &four, &six}) CHECK(user->right(model));
    CHECK(one.right(model));  // what comes once is forgotten after four others
    CHECK_EQUAL(gpu.executables, 0);
    CHECK(three.right(model));
    CHECK_EQUAL(gpu.executables, 1);
  }
  const Model without = plans.model({0, 1 << 20, 1});
  const User user(without, 2, 1);
  gpu.launches = 0;
  for (int i = 0; i < 4; ++i) CHECK(user.right(without));
  CHECK_EQUAL(gpu.launches + gpu.executables, 0);
}

TEST(tensorrt_does_not_copy_large_states_for_a_replay) {
  const Plans plans;
  const Model model = plans.model({16, 3 * 8 + 8 + 8 + 8, 1});  // a state of three tokens, and no more
  gpu.launches = 0;
  const User small(model, 3, 1), large(model, 4, 1);
  for (int i = 0; i < 4; ++i) CHECK(large.right(model));
  CHECK_EQUAL(gpu.launches, 0);
  for (int i = 0; i < 4; ++i) CHECK(small.right(model));
  CHECK_EQUAL(gpu.launches, 2);
}

TEST(tensorrt_runs_without_graphs_where_none_can_be_recorded) {
  for (const char* what : {"begin", "enqueue", "end", "instantiate", "context"}) {
    {
      const Plans plans;
      const Model model = plans.model();
      const User one(model, 1, 1), two(model, 2, 1), three(model, 3, 1);
      CHECK(one.right(model) && one.right(model));
      CHECK_EQUAL(gpu.executables, 1);
      gpu.fail = what;
      CHECK(two.right(model) && two.right(model));
      CHECK_EQUAL(gpu.executables, 0);
      CHECK_EQUAL(gpu.contexts, 2);
      gpu.fail = "";
      gpu.launches = 0;
      for (int i = 0; i < 3; ++i) CHECK(one.right(model) && two.right(model) && three.right(model));
      CHECK_EQUAL(gpu.launches + gpu.executables + gpu.graphs,
                  0);  // and never tries again
      // The other half has an opinion of its own.
      const User more(model, 2, 7), and_more(model, 2, 8);
      CHECK(more.right(model) && gpu.executables == 1);
    }
    CHECK(gpu.empty());
  }
  const Plans plans;  // out of memory is no different
  const Model model = plans.model();
  const User one(model, 1, 1);
  CHECK(one.right(model));
  gpu.fail_next_allocations = 1;
  CHECK(one.right(model) && one.right(model));
  CHECK_EQUAL(gpu.fail_next_allocations + gpu.executables, 0);
}

TEST(tensorrt_records_nothing_of_other_threads) {
  const Plans plans;
  const Model model = plans.model();
  const User one(model, 2, 1);
  Memory& memory = const_cast<Engine&>(model.engine(true)).memory();
  int times = 0;
  gpu.while_recording = [&] {  // what another thread may do with its states meanwhile
    const auto a = memory.allocate(10), b = memory.allocate(10);
    memory.copy(a.get(), b.get(), 10);
    ++times;
  };
  for (int i = 0; i < 4; ++i) CHECK(one.right(model));
  gpu.while_recording = nullptr;
  CHECK_EQUAL(times, 1);
  CHECK_EQUAL(gpu.executables, 1);
  CHECK_EQUAL(gpu.wrong, 0);
}

TEST(tensorrt_records_anew_when_memory_moves) {
  const Plans plans;
  const auto device = std::make_shared<Device>(fake_cuda());
  const EngineEntry& entry = plans.bundle->manifest.engines[1];
  TensorRtEngine<Fake> scorer(plans.bundle, entry, plans.create(), device);
  TensorRtEngine<Fake> encoder(plans.bundle, plans.encoder(), plans.create(), device);
  const Door door(plans.bundle->manifest, false);
  const auto score = [&](std::int64_t tokens) {
    const Log log(tokens);
    const Row row = log.row(door);
    const auto input = [&](const char* name) { return row.arrays[static_cast<std::size_t>(door.find(name))]; };
    const Array offsets = offsets_array(STCA_INT32, {tokens});
    const auto state = encoder.run(
        {input("history_item"), input("history_action"), offsets, input("user_segment"), input("user_profile")});
    std::vector<Array> feeds;
    for (const TensorSpec& spec : entry.spec.inputs) {
      if (spec.name == "target_offsets") {
        feeds.push_back(offsets_array(STCA_INT32, {2}));
        continue;
      }
      const auto& outputs = plans.encoder().spec.outputs;
      const auto found =
          std::find_if(outputs.begin(), outputs.end(), [&](const auto& o) { return o.name == spec.name; });
      feeds.push_back(found == outputs.end() ? input(spec.name.c_str())
                                             : state[static_cast<std::size_t>(found - outputs.begin())]);
    }
    gpu.launches = 0;
    CHECK_EQUAL(at(scorer.run(feeds)[0], 0), log.first());
    return gpu.launches;
  };
  for (int expected : {0, 0, 1, 1}) CHECK_EQUAL(score(2), expected);
  device->scratch(5000);  // as another engine that needs more of it
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(2), expected);
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(6), expected);  // the graphs' own place for states grows
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(2), expected);
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(4), expected);  // there is room for it now
  CHECK_EQUAL(score(2), 1);
  CHECK_EQUAL(gpu.wrong, 0);
}
