// The TensorRT engine with stand-ins for TensorRT and CUDA: the logic around them, not what they compute.
//
// "GPU" memory is host memory that is kept count of, so the sanitizers see every byte that is read or written out of
// place. The stand-in of the library computes what the golden `log` bundle computes.
#include <cstdlib>
#include <fstream>
#include <map>

#include "check.hpp"
#include "session.hpp"
#include "tensorrt_engine.hpp"

using namespace stca::core;

namespace {

// ---- CUDA -----------------------------------------------------------------------------------------------------------

struct Gpu {
  std::map<void*, std::size_t> memory, pinned;
  int streams = 0, major = 9, fail_next_allocations = 0, driver = CudaFunctions::success;

  bool holds(const void* p, std::size_t bytes) const {
    const auto after = memory.upper_bound(const_cast<void*>(p));
    if (after == memory.begin()) return false;
    const auto block = std::prev(after);
    return static_cast<const char*>(p) + bytes <= static_cast<const char*>(block->first) + block->second;
  }
};
Gpu gpu;

CudaFunctions fake_cuda() {
  using Stream = CudaFunctions::Stream;
  CudaFunctions f{};
  f.get_error_name = [](int) { return "cudaErrorOfTheTest"; };
  f.get_device = [](int* device) { return *device = 0, gpu.driver; };
  f.set_device = [](int device) { return device == 0 ? 0 : 101; };
  f.device_get_attribute = [](int* value, int attribute, int) {
    *value = attribute == CudaFunctions::capability_major ? gpu.major : 0;
    return 0;
  };
  f.stream_create = [](Stream* stream, unsigned) { return ++gpu.streams, *stream = reinterpret_cast<Stream>(&gpu), 0; };
  f.stream_destroy = [](Stream) { return --gpu.streams, 0; };
  f.stream_synchronize = [](Stream) { return 0; };
  f.malloc_async = [](void** p, std::size_t bytes, Stream) {
    if (gpu.fail_next_allocations > 0) return --gpu.fail_next_allocations, CudaFunctions::error_memory_allocation;
    gpu.memory[*p = std::malloc(bytes)] = bytes;
    return 0;
  };
  f.free_async = [](void* p, Stream) {
    if (gpu.memory.erase(p) == 0) return 1;
    std::free(p);
    return 0;
  };
  f.host_alloc = [](void** p, std::size_t bytes, unsigned) { return gpu.pinned[*p = std::malloc(bytes)] = bytes, 0; };
  f.free_host = [](void* p) {
    if (gpu.pinned.erase(p) == 0) return 1;
    std::free(p);
    return 0;
  };
  f.memcpy_async = [](void* to, const void* from, std::size_t bytes, int kind, Stream) {
    const bool to_gpu = gpu.holds(to, bytes), from_gpu = gpu.holds(from, bytes);
    if (to_gpu != (kind != CudaFunctions::device_to_host) || from_gpu != (kind != CudaFunctions::host_to_device))
      return 1;
    std::memcpy(to, from, bytes);
    return 0;
  };
  return f;
}

// ---- TensorRT -------------------------------------------------------------------------------------------------------

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

  struct Tensor {
    TensorIOMode mode;
    DataType type;
    Dims shape{};
    void* address = nullptr;
  };
  using Tensors = std::map<std::string, Tensor>;

  struct IExecutionContext {
    bool encoder;
    Tensors tensors;
    int profile = -1;
    void* scratch = nullptr;

    bool setInputShape(const char* name, const Dims& dims) { return tensors.at(name).shape = dims, dims.d[0] != 5; }
    bool setTensorAddress(const char* name, void* p) { return tensors.at(name).address = p, gpu.holds(p, 1); }
    bool setInputTensorAddress(const char* name, const void* p) { return setTensorAddress(name, const_cast<void*>(p)); }
    bool setOptimizationProfileAsync(int index, CudaFunctions::Stream) { return profile = index, true; }
    void setDeviceMemoryV2(void* p, std::int64_t bytes) {
      scratch = gpu.holds(p, static_cast<std::size_t>(bytes)) ? p : nullptr;
    }
    bool enqueueV3(CudaFunctions::Stream) {
      if (profile < 0 || scratch == nullptr) return false;
      encoder ? encode() : score();
      return true;
    }

    template <class T>
    T* data(const char* name) {
      return static_cast<T*>(tensors.at(name).address);
    }
    void encode() {
      const std::int64_t tokens = tensors.at("history_item").shape.d[0];
      for (std::int64_t i = 0; i < tokens; ++i) {
        data<float>("token")[2 * i] = static_cast<float>(data<std::int64_t>("history_item")[i]);
        data<float>("token")[2 * i + 1] = static_cast<float>(data<std::int64_t>("history_action")[i]);
      }
      const std::int64_t users = tensors.at("user_segment").shape.d[0];
      std::memcpy(data<void>("state_history_offsets"), data<void>("history_offsets"),
                  static_cast<std::size_t>(4 * (users + 1)));
      std::memcpy(data<void>("state_user_segment"), data<void>("user_segment"), static_cast<std::size_t>(8 * users));
      std::memcpy(data<void>("state_user_profile"), data<void>("user_profile"), static_cast<std::size_t>(8 * users));
    }
    void score() {
      const auto *history = data<std::int32_t>("state_history_offsets"), *bounds = data<std::int32_t>("target_offsets");
      for (std::int64_t r = 0; r < tensors.at("state_user_segment").shape.d[0]; ++r) {
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

  struct ICudaEngine {
    bool encoder;
    Tensors tensors;
    int profiles;

    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) {
      return new IExecutionContext{encoder, tensors};
    }
    int getNbIOTensors() const { return static_cast<int>(tensors.size()); }
    int getNbOptimizationProfiles() const { return profiles; }
    std::int64_t getDeviceMemorySizeV2() const { return encoder ? 1000 : 2000; }
    TensorIOMode getTensorIOMode(const char* name) const {
      return tensors.count(name) == 0 ? TensorIOMode::kNONE : tensors.at(name).mode;
    }
    DataType getTensorDataType(const char* name) const { return tensors.at(name).type; }
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
      auto* engine = new ICudaEngine{graph == "user_encoder", {}, 2};
      for (const EngineEntry& entry : bundle->manifest.engines) {
        if (entry.graph != graph) continue;
        for (const TensorSpec& s : entry.spec.inputs)
          engine->tensors[s.name] = {TensorIOMode::kINPUT, type_of(s), {}, nullptr};
        for (const TensorSpec& s : entry.spec.outputs)
          engine->tensors[s.name] = {TensorIOMode::kOUTPUT, type_of(s), {}, nullptr};
      }
      if (check::contains(plan, "retyped")) engine->tensors.begin()->second.type = DataType::kBOOL;
      return engine;
    }
    static DataType type_of(const TensorSpec& spec) { return *tensorrt_type<Fake>(spec.dtype); }
  };
};

// ---- the tests' bundle
// ------------------------------------------------------------------------------------------------

/// The golden `log` bundle with plans of both halves, for histories of 1 to 4 and 1 to 6 tokens.
struct Plans {
  check::TemporaryFolder folder;
  std::shared_ptr<Bundle> bundle;

  explicit Plans(const std::string& wrong = "") : bundle(std::make_shared<Bundle>(*Bundle::load(STCA_GOLDEN "/log"))) {
    bundle->path = folder.path();
    for (const char* graph : {"user_encoder", "target_scorer"}) {
      EngineEntry entry{graph, "tensorrt", std::string(graph) + ".plan", "11.4.0.106", "fp32", 90, 3, {}, {}};
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

  Engines engines(const std::string& version = "11.4.0") const {
    const auto create = [b = bundle](Fake::ILogger& log) { return new Fake::IRuntime{log, b}; };
    return make_tensorrt_pair<Fake>(bundle, std::make_shared<Device>(fake_cuda()), version, create);
  }

  Model model() const {
    auto pair = std::make_shared<Engines>(engines());
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
    const Model model = plans.model();
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
    CHECK_EQUAL(gpu.memory.size(), blocks);  // a hit allocates nothing on the GPU, nor page-locked memory
    CHECK_EQUAL(gpu.pinned.size(), pinned);
  }
  CHECK(gpu.memory.empty() && gpu.pinned.empty());
  CHECK_EQUAL(gpu.streams, 0);
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
  gpu.fail_next_allocations = 1;
  CHECK_THROWS(model.encode(row), Error, "out of memory");
  CHECK_EQUAL(at(model.score({model.encode(row)}, {row}), 0), log.first());
}

TEST(tensorrt_says_why_a_plan_does_not_run_here) {
  const Plans plans;
  CHECK_THROWS(plans.engines("11.5.0"), Error, "was built with TensorRT 11.4.0.106, here is 11.5.0");
  gpu.major = 8;
  CHECK_THROWS(plans.engines(), Error, "is for SM 90, this GPU is SM 80");
  gpu.major = 9;
  gpu.driver = CudaFunctions::error_no_device;
  CHECK_THROWS(plans.engines(), Error, "no usable NVIDIA GPU or driver here (cudaErrorOfTheTest)");
  gpu.driver = CudaFunctions::success;
  CHECK_THROWS(Plans("refused").engines(), Error, "user_encoder.plan cannot be loaded: the plan has the wrong magic");
  CHECK_THROWS(Plans("retyped").engines(), Error, "has another type");
  std::ofstream(plans.folder.path() / "user_encoder.plan") << "user_encoder of someone else";
  CHECK_THROWS(plans.engines(), Error, "user_encoder.plan was changed");
  CHECK_EQUAL(version_text(110400), "11.4.0");
}
