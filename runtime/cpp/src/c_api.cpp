// The C ABI: checks pointers, turns exceptions into codes, and owns the handles.
#include "c_api.hpp"

#include <algorithm>
#include <cstring>

using namespace stca::core;

namespace stca::core {

std::string& last_error() noexcept {
  thread_local std::string message;
  return message;
}

int32_t failed(int32_t code, const char* message) noexcept {
  try {
    last_error() = one_line(message);
  } catch (const std::bad_alloc&) {
    last_error().clear();
  }
  return code;
}

}  // namespace stca::core

namespace {

Inputs inputs_of(const stca_tensor* data, std::size_t count, const char* what) {
  if (count > 0) given(data, what);
  return {data, count};
}

/// A null pointer is for ever.
const Deadline& deadline_of(const stca_deadline* deadline) {
  return deadline == nullptr ? Deadline::never() : deadline->deadline;
}

/// Copies `text` into the caller's `size` bytes, cut to fit with its final NUL.
void copy_text(const std::string& text, char* to, std::size_t size) {
  if (size == 0) return;
  const std::size_t n = std::min(text.size(), size - 1);
  std::memcpy(to, text.data(), n);
  to[n] = '\0';
}

stca_scores* hand_out(Scored scored) {
  Array values = converted(scored.scores, STCA_FLOAT32);
  return new stca_scores{std::move(scored.scores), std::move(values), scored.hits};
}

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
    if (specs == nullptr) fail(STCA_USAGE_ERROR, "the bundle has no graph '", shown(graph), "'");
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

const char* stca_last_error(void) { return last_error().c_str(); }

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
    case STCA_HISTORY_NEEDED: return "HistoryNeededError";
    case STCA_DEADLINE_ERROR: return "DeadlineError";
    case STCA_CANCELLED_ERROR: return "CancelledError";
    case STCA_USAGE_ERROR: return "UsageError";
    case STCA_INTERNAL_ERROR: return "InternalError";
    case STCA_FORKED_ERROR: return "ForkedError";
    default: return "unknown";
  }
}

const char* stca_code_kind(int32_t code) {
  switch (code) {
    case STCA_OK: return "ok";
    case STCA_BUILD_ERROR: return "build";
    case STCA_BUNDLE_ERROR: return "bad_bundle";
    case STCA_REQUEST_ERROR: return "bad_request";
    case STCA_ENGINE_ERROR: return "engine";
    case STCA_HISTORY_NEEDED: return "history_needed";
    case STCA_DEADLINE_ERROR: return "deadline";
    case STCA_CANCELLED_ERROR: return "cancelled";
    case STCA_USAGE_ERROR: return "usage";
    case STCA_INTERNAL_ERROR: return "internal";
    case STCA_FORKED_ERROR: return "forked";
    default: return "other";
  }
}

size_t stca_dtype_bytes(int32_t dtype) {
  return dtype < STCA_BOOL || dtype > STCA_UINT64 ? 0 : item_bytes(static_cast<DType>(dtype));
}

const char* stca_library_version(void) { return STCA_VERSION; }
uint32_t stca_library_abi_version(void) { return STCA_ABI_VERSION; }

int32_t stca_bundle_load(const char* path, stca_bundle** bundle) {
  return guarded([&] {
    // Asked first, and not in one expression with what is made: that would have no owner when the place is missing.
    stca_bundle*& place = given(bundle, "bundle");
    place = nullptr;
    place = new stca_bundle{Bundle::load(&given(path, "path")), path};
  });
}
void stca_bundle_release(stca_bundle* bundle) { delete bundle; }

const char* stca_bundle_path(const stca_bundle* bundle) { return bundle == nullptr ? nullptr : bundle->path.c_str(); }
const char* stca_bundle_weights(const stca_bundle* bundle) {
  return bundle == nullptr ? nullptr : bundle->bundle->manifest.weights.c_str();
}
const char* stca_bundle_manifest(const stca_bundle* bundle) {
  return bundle == nullptr ? nullptr : bundle->bundle->manifest.text.c_str();
}

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
    const auto& specs = given(outputs, "outputs").graph.outputs;
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
    if (!fits || !wanted.addressable(item_bytes(spec.dtype))) {
      fail(STCA_ENGINE_ERROR, "the engine gave ", spec.name, " another shape than ", spec.shape_text());
    }
    outputs->arrays[index] = make_array(Memory::host(), spec.dtype, wanted).array;
    outputs->allocated[index] = true;
  });
  if (code == STCA_OK) return const_cast<void*>(outputs->arrays[index].data);
  if (outputs == nullptr) return nullptr;
  outputs->code = static_cast<stca_code>(code);
  guarded([&] { outputs->message = last_error(); });
  return nullptr;
}

int32_t stca_fail(int32_t code, const char* message) { return failed(code, message == nullptr ? "" : message); }

void stca_options_init_sized(stca_options* options, size_t size) {
  if (options == nullptr) return;
  stca_options defaults{};
  defaults.size = std::min(size, sizeof(stca_options));
  defaults.cache_bytes = std::uint64_t{1} << 30;
  defaults.cuda_graphs = 64;
  defaults.state_folder_bytes = std::uint64_t{1} << 33;
  defaults.max_targets = static_cast<std::uint64_t>(most_targets);
  std::memcpy(options, &defaults, defaults.size);
}
#undef stca_options_init
STCA_API void stca_options_init(stca_options* options) { stca_options_init_sized(options, first_options_size); }

int32_t stca_session_load(const char* bundle, const stca_options* options, stca_session** session) {
  return guarded([&] {
    stca_session*& place = given(session, "session");
    place = nullptr;
    place = new stca_session{{&given(bundle, "bundle"), options_of(options)}};
  });
}
void stca_session_release(stca_session* session) { delete session; }

int32_t stca_deadline_make(double seconds, stca_deadline** deadline) {
  return guarded([&] {
    stca_deadline*& place = given(deadline, "deadline");
    place = nullptr;
    place = new stca_deadline{Deadline(seconds)};
  });
}
int32_t stca_deadline_cancel(stca_deadline* deadline) {
  return guarded([&] { given(deadline, "deadline").deadline.cancel(); });
}
void stca_deadline_release(stca_deadline* deadline) { delete deadline; }

int32_t stca_session_score(stca_session* session, const stca_request* requests, size_t count, stca_scores** scores) {
  return stca_session_score_by(session, requests, count, nullptr, scores);
}

int32_t stca_session_score_by(stca_session* session, const stca_request* requests, size_t count,
                              const stca_deadline* deadline, stca_scores** scores) {
  return guarded([&] {
    given(session, "session");
    given(scores, "scores") = nullptr;
    if (count > 0) given(requests, "requests");
    std::vector<RequestView> views;
    views.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      const stca_request& r = requests[i];
      views.push_back({inputs_of(r.inputs, r.input_count, "inputs"), r.user, r.version});
    }
    *scores = hand_out(session->session.score(views, deadline_of(deadline)));
  });
}

int32_t stca_session_score_batch(stca_session* session, const stca_request_batch* batch, stca_scores** scores) {
  return stca_session_score_batch_by(session, batch, nullptr, scores);
}

int32_t stca_session_score_batch_by(stca_session* session, const stca_request_batch* batch,
                                    const stca_deadline* deadline, stca_scores** scores) {
  return guarded([&] {
    given(session, "session");
    given(scores, "scores") = nullptr;
    given(batch, "batch");
    inputs_of(batch->inputs, batch->input_count, "inputs");
    if (batch->user_count > 0) given(batch->users, "users");
    if (batch->version_count > 0) given(batch->versions, "versions");
    *scores = hand_out(session->session.score(*batch, deadline_of(deadline)));
  });
}

const float* stca_scores_values(const stca_scores* scores) {
  return scores == nullptr ? nullptr : static_cast<const float*>(scores->values.data);
}
size_t stca_scores_targets(const stca_scores* scores) {
  return scores == nullptr ? 0 : static_cast<std::size_t>(scores->values.shape[0]);
}
size_t stca_scores_tasks(const stca_scores* scores) {
  return scores == nullptr ? 0 : scores->values.row_bytes() / sizeof(float);
}
int32_t stca_scores_dtype(const stca_scores* scores) { return scores == nullptr ? STCA_FLOAT32 : scores->own.dtype; }
const void* stca_scores_data(const stca_scores* scores) { return scores == nullptr ? nullptr : scores->own.data; }
size_t stca_scores_hits(const stca_scores* scores) { return scores == nullptr ? 0 : scores->hits; }
void stca_scores_release(stca_scores* scores) { delete scores; }

int32_t stca_session_append(stca_session* session, const char* user, const stca_tensor* events, size_t event_count,
                            const char* version, const char* after, int32_t* kept) {
  return guarded([&] {
    given(session, "session"), given(user, "user");
    const bool done = session->session.append(user, inputs_of(events, event_count, "events"), version, after);
    if (kept != nullptr) *kept = done ? 1 : 0;
  });
}

int32_t stca_session_amend(stca_session* session, const char* user, const stca_tensor* events, size_t event_count,
                           const char* version, int64_t at, const char* after, int32_t* kept) {
  return guarded([&] {
    given(session, "session"), given(user, "user");
    const bool done = session->session.amend(user, inputs_of(events, event_count, "events"), version, at, after);
    if (kept != nullptr) *kept = done ? 1 : 0;
  });
}

int32_t stca_session_warm(stca_session* session, const char* user, const stca_tensor* history, size_t history_count,
                          const char* version, double seconds, int32_t* kept) {
  stca_deadline* deadline = nullptr;
  const int32_t code = stca_deadline_make(seconds, &deadline);
  if (code != STCA_OK) return code;
  const std::unique_ptr<stca_deadline> owner(deadline);
  return stca_session_warm_by(session, user, history, history_count, version, deadline, kept);
}

int32_t stca_session_warm_by(stca_session* session, const char* user, const stca_tensor* history, size_t history_count,
                             const char* version, const stca_deadline* deadline, int32_t* kept) {
  return guarded([&] {
    given(session, "session"), given(user, "user");
    const Inputs inputs = inputs_of(history, history_count, "history");
    const bool done = session->session.warm(user, inputs, version, deadline_of(deadline));
    if (kept != nullptr) *kept = done ? 1 : 0;
  });
}

int32_t stca_session_forget(stca_session* session, const char* user, int32_t* kept) {
  return guarded([&] {
    const bool was = given(session, "session").session.forget(&given(user, "user"));
    if (kept != nullptr) *kept = was ? 1 : 0;
  });
}

int32_t stca_session_residence(const stca_session* session, const char* user, const char* version,
                               stca_residence* found, char* text, size_t size) {
  return guarded([&] {
    given(session, "session"), given(user, "user"), given(found, "found");
    if (size > 0) given(text, "text");
    const auto where = session->session.residence(user, version);
    *found = stca_residence{};
    if (size > 0) *text = 0;
    if (!where) return;
    *found = {where->tier, where->version ? 1 : 0, where->bytes, where->version ? where->version->size() : 0};
    if (where->version) copy_text(*where->version, text, size);
  });
}

int32_t stca_session_swap(stca_session* session, const char* bundle) {
  return guarded([&] { given(session, "session").session.swap(&given(bundle, "bundle")); });
}

int32_t stca_session_stats_sized(const stca_session* session, stca_cache_stats* stats, size_t size) {
  return guarded([&] {
    given(stats, "stats");
    const stca_cache_stats all = given(session, "session").session.stats();
    std::memcpy(stats, &all, std::min(size, sizeof all));
  });
}
#undef stca_session_stats
STCA_API int32_t stca_session_stats(const stca_session* session, stca_cache_stats* stats) {
  return stca_session_stats_sized(session, stats, offsetof(stca_cache_stats, expired));
}

int32_t stca_session_bundle(const stca_session* session, stca_bundle** bundle) {
  return guarded([&] {
    stca_bundle*& place = given(bundle, "bundle");
    place = nullptr;
    const std::shared_ptr<const Bundle> served = given(session, "session").session.model()->bundle();
    place = new stca_bundle{served, served->path.string()};
  });
}

int32_t stca_session_engine(const stca_session* session, const char* graph, char* name, size_t size) {
  return guarded([&] {
    given(session, "session"), given(graph, "graph"), given(name, "name");
    const bool encoder = std::strcmp(graph, "user_encoder") == 0;
    if (!encoder && std::strcmp(graph, "target_scorer") != 0) {
      fail(STCA_USAGE_ERROR, "no engine runs '", shown(graph), "'; there are user_encoder and target_scorer");
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
      fail(STCA_USAGE_ERROR, "an engine's choice has no '", shown(what), "'; it has why and passed_over");
    }
    const std::string& whole = why ? model->engines().why : model->engines().passed_over;
    if (length != nullptr) *length = whole.size();
    copy_text(whole, text, size);
  });
}

}  // extern "C"
