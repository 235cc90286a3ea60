// The C ABI: checks pointers, turns exceptions into codes, and owns the handles.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <new>

#include "error.hpp"
#include "session.hpp"
#include "stca/runtime.h"

using namespace stca::core;

struct stca_bundle {
  std::shared_ptr<const Bundle> bundle;
};
struct stca_session {
  Session session;
};
struct stca_scores {
  Array values;
};
/// What one run of a caller's engine has given so far.
struct stca_outputs {
  const GraphSpec& graph;
  std::vector<Array> arrays;
  std::vector<bool> allocated;
  stca_code code = STCA_OK;
  std::string message;
};

namespace {

thread_local std::string last_error;

int32_t failed(int32_t code, const char* message) {
  try {
    last_error = message;
  } catch (const std::bad_alloc&) {
    last_error.clear();
  }
  return code;
}

/// Runs `f` and returns its code; no exception leaves the library.
template <class F>
int32_t guarded(F&& f) {
  try {
    f();
    return STCA_OK;
  } catch (const Error& e) {
    return failed(e.code, e.what());
  } catch (const std::bad_alloc&) {
    return failed(STCA_INTERNAL_ERROR, "out of memory; lower cache_bytes or send smaller requests");
  } catch (const std::exception& e) {
    return failed(STCA_INTERNAL_ERROR, e.what());
  } catch (...) {
    return failed(STCA_INTERNAL_ERROR, "an engine threw something that is no std::exception");
  }
}

template <class T>
T& given(T* pointer, const char* what) {
  if (pointer == nullptr) fail(STCA_USAGE_ERROR, what, " is a null pointer");
  return *pointer;
}

Inputs inputs_of(const stca_tensor* data, std::size_t count, const char* what) {
  if (count > 0) given(data, what);
  return {data, count};
}

/// A callback returned `code`; it left its message through stca_fail, or there is none. A number that is no code of
/// ours counts as `kind`.
[[noreturn]] void callback_failed(int32_t code, stca_code kind, const std::string& otherwise) {
  const bool known = std::strcmp(stca_code_name(code), "unknown") != 0;
  throw Error(known ? static_cast<stca_code>(code) : kind, last_error.empty() ? otherwise : last_error);
}

/// A caller's engine behind the library's own interface.
class CallerEngine final : public Engine {
 public:
  CallerEngine(std::unique_ptr<stca_bundle> handle, const std::string& graph, const stca_engine& engine)
      : handle_(std::move(handle)),
        graph_(handle_->bundle->manifest.graph(graph)),
        engine_(engine),
        name_(engine.name == nullptr ? "caller's engine" : engine.name) {}
  CallerEngine(const CallerEngine&) = delete;
  CallerEngine& operator=(const CallerEngine&) = delete;
  ~CallerEngine() override {
    if (engine_.release != nullptr) engine_.release(engine_.self);
  }

  std::string name() const override { return name_; }
  const GraphSpec& spec() const override { return graph_; }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    std::vector<stca_tensor> tensors;
    tensors.reserve(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const Array& array = inputs[i];
      stca_tensor tensor{graph_.inputs[i].name.c_str(), array.data, array.dtype, array.shape.rank, {}};
      std::copy(array.shape.sizes.begin(), array.shape.sizes.end(), tensor.shape);
      tensors.push_back(tensor);
    }
    const std::size_t count = graph_.outputs.size();
    stca_outputs outputs{graph_, std::vector<Array>(count), std::vector<bool>(count), STCA_OK, {}};
    last_error.clear();
    const int32_t code = engine_.run(engine_.self, tensors.data(), tensors.size(), &outputs);
    if (outputs.code != STCA_OK) throw Error(outputs.code, outputs.message);
    if (code != STCA_OK) callback_failed(code, STCA_ENGINE_ERROR, name_ + " failed without a message");
    for (std::size_t i = 0; i < count; ++i) {
      if (!outputs.allocated[i]) fail(STCA_ENGINE_ERROR, name_, " did not give the output ", graph_.outputs[i].name);
    }
    return std::move(outputs.arrays);
  }

 private:
  std::unique_ptr<stca_bundle> handle_;  // what the engine was made from, and where graph_ lives
  const GraphSpec& graph_;
  stca_engine engine_;
  std::string name_;
};

/// The struct as programs know it that were compiled before it grew.
constexpr std::size_t first_options_size = offsetof(stca_options, cuda_graphs);

/// Copies `text` into the caller's `size` bytes, cut to fit with its final NUL.
void copy_text(const std::string& text, char* to, std::size_t size) {
  if (size == 0) return;
  const std::size_t n = std::min(text.size(), size - 1);
  std::memcpy(to, text.data(), n);
  to[n] = '\0';
}

Options options_of(const stca_options* given_options) {
  stca_options o;
  stca_options_init(&o);
  if (given_options != nullptr) {
    if (given_options->size < sizeof(std::size_t) + sizeof(std::uint64_t)) {
      fail(STCA_USAGE_ERROR, "options have size ", given_options->size, "; call stca_options_init first");
    }
    // A caller compiled against an older, shorter struct leaves the later fields at their defaults.
    std::memcpy(&o, given_options, std::min(given_options->size, sizeof o));
  }
  Options options;
  options.cache_bytes = o.cache_bytes;
  options.truncate = o.truncate != 0;
  options.threads = o.threads;
  options.engine = o.engine == nullptr ? "" : o.engine;
  options.cuda_graphs = o.cuda_graphs;
  if (o.make_engine == nullptr) return options;
  options.make = [make = o.make_engine, context = o.make_engine_context](const std::shared_ptr<const Bundle>& bundle,
                                                                         const std::string& graph) {
    auto handle = std::make_unique<stca_bundle>(stca_bundle{bundle});
    stca_engine engine{};
    last_error.clear();
    const int32_t code = make(context, handle.get(), graph.c_str(), &engine);
    if (code != STCA_OK) callback_failed(code, STCA_BUILD_ERROR, graph + ": the caller's engine could not be made");
    if (engine.run == nullptr) fail(STCA_USAGE_ERROR, graph, ": the caller's engine has no run function");
    return std::make_unique<CallerEngine>(std::move(handle), graph, engine);
  };
  return options;
}

/// Scores as the caller gets them: float32, rows of tasks.
stca_scores* hand_out(const Array& scores) { return new stca_scores{converted(scores, STCA_FLOAT32)}; }

const std::vector<TensorSpec>* specs_of(const stca_bundle* bundle, const char* graph, bool inputs) {
  if (bundle == nullptr || graph == nullptr) return nullptr;
  const auto found = bundle->bundle->manifest.graphs.find(graph);
  if (found == bundle->bundle->manifest.graphs.end()) return nullptr;
  return inputs ? &found->second.inputs : &found->second.outputs;
}

int32_t copy_spec(const stca_bundle* bundle, const char* graph, bool inputs, std::size_t index,
                  stca_tensor_spec* spec) {
  return guarded([&] {
    given(bundle, "bundle"), given(graph, "graph"), given(spec, "spec");
    const auto* specs = specs_of(bundle, graph, inputs);
    if (specs == nullptr) fail(STCA_USAGE_ERROR, "the bundle has no graph '", graph, "'");
    if (index >= specs->size()) {
      fail(STCA_USAGE_ERROR, graph, " has ", specs->size(), inputs ? " inputs" : " outputs", ", none of index ", index);
    }
    const TensorSpec& from = (*specs)[index];
    *spec = {from.name.c_str(), from.dtype, from.scope, from.limit, static_cast<int32_t>(from.shape.size()), {}, {}};
    for (std::size_t i = 0; i < from.shape.size(); ++i) {
      spec->shape[i] = from.shape[i].size;
      spec->symbol[i] = from.shape[i].symbol.empty() ? nullptr : from.shape[i].symbol.c_str();
    }
  });
}

}  // namespace

extern "C" {

const char* stca_last_error(void) { return last_error.c_str(); }

const char* stca_code_name(int32_t code) {
  switch (code) {
    case STCA_OK: return "OK";
    case STCA_ERROR: return "StcaError";
    case STCA_CHECKPOINT_ERROR: return "CheckpointError";
    case STCA_EXPORT_ERROR: return "ExportError";
    case STCA_SPLIT_ERROR: return "SplitError";
    case STCA_BUILD_ERROR: return "BuildError";
    case STCA_BUNDLE_ERROR: return "BundleError";
    case STCA_PARITY_ERROR: return "ParityError";
    case STCA_REQUEST_ERROR: return "RequestError";
    case STCA_ENGINE_ERROR: return "EngineError";
    case STCA_USAGE_ERROR: return "UsageError";
    case STCA_INTERNAL_ERROR: return "InternalError";
    default: return "unknown";
  }
}

size_t stca_dtype_bytes(int32_t dtype) {
  return dtype < STCA_BOOL || dtype > STCA_UINT64 ? 0 : item_bytes(static_cast<DType>(dtype));
}

const char* stca_library_version(void) { return STCA_VERSION; }
uint32_t stca_library_abi_version(void) { return STCA_ABI_VERSION; }

int32_t stca_bundle_load(const char* path, stca_bundle** bundle) {
  return guarded([&] { given(bundle, "bundle") = new stca_bundle{Bundle::load(&given(path, "path"))}; });
}
void stca_bundle_release(stca_bundle* bundle) { delete bundle; }

const char* stca_bundle_path(const stca_bundle* bundle) { return bundle->bundle->path.c_str(); }
const char* stca_bundle_weights(const stca_bundle* bundle) { return bundle->bundle->manifest.weights.c_str(); }
const char* stca_bundle_manifest(const stca_bundle* bundle) { return bundle->bundle->manifest.text.c_str(); }

const char* stca_bundle_file(const stca_bundle* bundle, const char* graph) {
  if (bundle == nullptr || graph == nullptr) return nullptr;
  const auto found = bundle->bundle->graph_files.find(graph);
  return found == bundle->bundle->graph_files.end() ? nullptr : found->second.c_str();
}
size_t stca_bundle_input_count(const stca_bundle* bundle, const char* graph) {
  const auto* specs = specs_of(bundle, graph, true);
  return specs == nullptr ? 0 : specs->size();
}
size_t stca_bundle_output_count(const stca_bundle* bundle, const char* graph) {
  const auto* specs = specs_of(bundle, graph, false);
  return specs == nullptr ? 0 : specs->size();
}
int32_t stca_bundle_input(const stca_bundle* bundle, const char* graph, size_t index, stca_tensor_spec* spec) {
  return copy_spec(bundle, graph, true, index, spec);
}
int32_t stca_bundle_output(const stca_bundle* bundle, const char* graph, size_t index, stca_tensor_spec* spec) {
  return copy_spec(bundle, graph, false, index, spec);
}

void* stca_outputs_allocate(stca_outputs* outputs, size_t index, int32_t rank, const int64_t* shape) {
  const int32_t code = guarded([&] {
    const auto& specs = outputs->graph.outputs;
    if (index >= specs.size())
      fail(STCA_ENGINE_ERROR, "the engine gave an output of index ", index, ", there are ", specs.size());
    const TensorSpec& spec = specs[index];
    Shape wanted;
    bool fits = rank == static_cast<int32_t>(spec.shape.size());
    for (std::size_t i = 0; fits && i < spec.shape.size(); ++i) {
      given(shape, "shape");
      fits = shape[i] >= 0 && (spec.shape[i].size < 0 || spec.shape[i].size == shape[i]);
      wanted[wanted.rank++] = shape[i];
    }
    if (!fits) {
      fail(STCA_ENGINE_ERROR, "the engine gave ", spec.name, " another shape than ", spec.shape_text());
    }
    outputs->arrays[index] = make_array(Memory::host(), spec.dtype, wanted).array;
    outputs->allocated[index] = true;
  });
  if (code == STCA_OK) return const_cast<void*>(outputs->arrays[index].data);
  outputs->code = static_cast<stca_code>(code);
  outputs->message = last_error;
  return nullptr;
}

int32_t stca_fail(int32_t code, const char* message) { return failed(code, message == nullptr ? "" : message); }

void stca_options_init_sized(stca_options* options, size_t size) {
  const stca_options defaults{
      std::min(size, sizeof(stca_options)), std::uint64_t{1} << 30, 0, 0, nullptr, nullptr, nullptr, 64};
  std::memcpy(options, &defaults, defaults.size);
}
#undef stca_options_init
STCA_API void stca_options_init(stca_options* options) { stca_options_init_sized(options, first_options_size); }

int32_t stca_session_load(const char* bundle, const stca_options* options, stca_session** session) {
  return guarded([&] {
    given(session, "session");
    *session = new stca_session{{&given(bundle, "bundle"), options_of(options)}};
  });
}
void stca_session_release(stca_session* session) { delete session; }

int32_t stca_session_score(stca_session* session, const stca_request* requests, size_t count, stca_scores** scores) {
  return guarded([&] {
    given(session, "session"), given(scores, "scores");
    if (count > 0) given(requests, "requests");
    std::vector<RequestView> views;
    views.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      const stca_request& r = requests[i];
      views.push_back({inputs_of(r.inputs, r.input_count, "inputs"), r.user, r.version});
    }
    *scores = hand_out(session->session.score(views));
  });
}

int32_t stca_session_score_batch(stca_session* session, const stca_request_batch* batch, stca_scores** scores) {
  return guarded([&] {
    given(session, "session"), given(scores, "scores"), given(batch, "batch");
    inputs_of(batch->inputs, batch->input_count, "inputs");
    if (batch->user_count > 0) given(batch->users, "users");
    if (batch->version_count > 0) given(batch->versions, "versions");
    *scores = hand_out(session->session.score(*batch));
  });
}

const float* stca_scores_values(const stca_scores* scores) { return static_cast<const float*>(scores->values.data); }
size_t stca_scores_targets(const stca_scores* scores) { return static_cast<std::size_t>(scores->values.shape[0]); }
size_t stca_scores_tasks(const stca_scores* scores) { return scores->values.row_bytes() / sizeof(float); }
void stca_scores_release(stca_scores* scores) { delete scores; }

int32_t stca_session_append(stca_session* session, const char* user, const stca_tensor* events, size_t event_count,
                            const char* version, const char* after, int32_t* kept) {
  return guarded([&] {
    given(session, "session"), given(user, "user");
    const bool done = session->session.append(user, inputs_of(events, event_count, "events"), version, after);
    if (kept != nullptr) *kept = done ? 1 : 0;
  });
}

int32_t stca_session_forget(stca_session* session, const char* user, int32_t* kept) {
  return guarded([&] {
    const bool was = given(session, "session").session.forget(&given(user, "user"));
    if (kept != nullptr) *kept = was ? 1 : 0;
  });
}

int32_t stca_session_swap(stca_session* session, const char* bundle) {
  return guarded([&] { given(session, "session").session.swap(&given(bundle, "bundle")); });
}

int32_t stca_session_stats(const stca_session* session, stca_cache_stats* stats) {
  return guarded([&] { given(stats, "stats") = given(session, "session").session.stats(); });
}

int32_t stca_session_bundle(const stca_session* session, stca_bundle** bundle) {
  return guarded(
      [&] { given(bundle, "bundle") = new stca_bundle{given(session, "session").session.model()->bundle()}; });
}

int32_t stca_session_engine(const stca_session* session, const char* graph, char* name, size_t size) {
  return guarded([&] {
    given(session, "session"), given(graph, "graph"), given(name, "name");
    const bool encoder = std::strcmp(graph, "user_encoder") == 0;
    if (!encoder && std::strcmp(graph, "target_scorer") != 0) {
      fail(STCA_USAGE_ERROR, "no engine runs '", graph, "'; there are user_encoder and target_scorer");
    }
    copy_text(session->session.model()->engine(encoder).name(), name, size);
  });
}

int32_t stca_session_engine_choice(const stca_session* session, const char* what, char* text, size_t size,
                                   size_t* length) {
  return guarded([&] {
    given(session, "session"), given(what, "what");
    if (size > 0) given(text, "text");
    const auto model = session->session.model();
    const bool why = std::strcmp(what, "why") == 0;
    if (!why && std::strcmp(what, "passed_over") != 0) {
      fail(STCA_USAGE_ERROR, "an engine's choice has no '", what, "'; it has why and passed_over");
    }
    const std::string& whole = why ? model->engines().why : model->engines().passed_over;
    if (length != nullptr) *length = whole.size();
    copy_text(whole, text, size);
  });
}

}  // extern "C"
