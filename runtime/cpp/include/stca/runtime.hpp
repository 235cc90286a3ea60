// stca runtime for C++17: the same seven calls as in Python, over the C ABI of runtime.h, so that a program and the
// library it loads may come from different compilers. Header-only; docs/cpp_runtime.md is the guide.
//
//   stca::Session session("my.bundle");
//   stca::Request request{{{"history_item", items}, …, {"target_item", targets}}, "user 7", "v1"};
//   stca::Scores scores = session.score(request);
#pragma once

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "stca/deadline.hpp"
#include "stca/errors.hpp"
#include "stca/runtime.h"
#include "stca/tensor.hpp"

namespace stca {

namespace detail {

/// A callback's body: what it throws becomes a code, `otherwise` when it is none of ours, and a message.
template <class F>
std::int32_t guarded(std::int32_t otherwise, F&& f) noexcept {
  try {
    f();
    return STCA_OK;
  } catch (const StcaError& e) {
    return stca_fail(e.code(), e.what());
  } catch (const std::exception& e) {
    return stca_fail(otherwise, e.what());
  } catch (...) {
    return stca_fail(otherwise, "something that is no std::exception was thrown");
  }
}

// C strings end at the first NUL: a name that holds one would be taken for another name.
inline const char* c_str(const std::optional<std::string>& text, const char* what) {
  if (!text) return nullptr;
  if (std::memchr(text->data(), 0, text->size()) != nullptr) {
    throw RequestError(STCA_REQUEST_ERROR, std::string(what) + ": holds a zero byte; names must not");
  }
  return text->c_str();
}

}  // namespace detail

/// One user and the targets to score for them.
struct Request {
  std::vector<Tensor> inputs;          ///< this user's alone; offsets are made by the runtime
  std::optional<std::string> user;     ///< whose state may be kept and reused; without one nothing is kept
  std::optional<std::string> version;  ///< which history this is; without one, a digest of the user inputs
};

/// Several requests as flat rows with offsets, no padding.
struct RequestBatch {
  std::vector<Tensor> inputs;
  std::vector<std::optional<std::string>> users, versions;  ///< one for each request, or empty
};

/// Scores `(targets, tasks)`, row-major: float32, and in the model's own type.
class Scores {
 public:
  explicit Scores(stca_scores* scores) : scores_(scores, stca_scores_release) {}
  std::size_t targets() const { return stca_scores_targets(scores_.get()); }
  std::size_t tasks() const { return stca_scores_tasks(scores_.get()); }
  std::size_t size() const { return targets() * tasks(); }
  const float* begin() const { return stca_scores_values(scores_.get()); }
  const float* end() const { return begin() + size(); }
  float operator()(std::size_t target, std::size_t task) const { return begin()[target * tasks() + task]; }
  /// The model's own type, and the scores in it.
  stca_dtype dtype() const { return static_cast<stca_dtype>(stca_scores_dtype(scores_.get())); }
  const void* data() const { return stca_scores_data(scores_.get()); }
  /// One score, in all the digits of a model that computes in float64.
  double exact(std::size_t target, std::size_t task) const {
    const std::size_t i = target * tasks() + task;
    return dtype() == STCA_FLOAT64 ? static_cast<const double*>(data())[i] : static_cast<double>(begin()[i]);
  }
  /// Of the requests with targets, how many found their user's state at hand.
  std::size_t hits() const { return stca_scores_hits(scores_.get()); }

 private:
  std::unique_ptr<stca_scores, void (*)(stca_scores*)> scores_;
};

/// A bundle on disk whose files are all what its manifest says.
class Bundle {
 public:
  explicit Bundle(const std::string& path) {
    stca_bundle* bundle = nullptr;
    detail::check(stca_bundle_load(path.c_str(), &bundle));
    bundle_ = {bundle, stca_bundle_release};
  }
  explicit Bundle(std::shared_ptr<const stca_bundle> bundle) : bundle_(std::move(bundle)) {}

  std::string path() const { return stca_bundle_path(bundle_.get()); }
  std::string weights() const { return stca_bundle_weights(bundle_.get()); }
  /// The text of manifest.json.
  std::string manifest() const { return stca_bundle_manifest(bundle_.get()); }
  /// Path of a graph's ONNX file; empty when there is no such graph. It leads to the file that was checked, whatever
  /// is put in the bundle's place, while this object lives.
  std::string file(const std::string& graph) const {
    const char* path = stca_bundle_file(bundle_.get(), graph.c_str());
    return path == nullptr ? "" : path;
  }
  /// Inputs of "request", "user_encoder" or "target_scorer". Their strings live as long as the bundle.
  std::vector<stca_tensor_spec> inputs(const std::string& graph) const {
    return specs(graph, stca_bundle_input_count, stca_bundle_input);
  }
  std::vector<stca_tensor_spec> outputs(const std::string& graph) const {
    return specs(graph, stca_bundle_output_count, stca_bundle_output);
  }

 private:
  template <class Count, class Get>
  std::vector<stca_tensor_spec> specs(const std::string& graph, Count count, Get get) const {
    std::vector<stca_tensor_spec> specs(count(bundle_.get(), graph.c_str()));
    for (std::size_t i = 0; i < specs.size(); ++i) detail::check(get(bundle_.get(), graph.c_str(), i, &specs[i]));
    return specs;
  }

  std::shared_ptr<const stca_bundle> bundle_;
};

/// Where an engine of one's own puts what it computed.
class Outputs {
 public:
  explicit Outputs(stca_outputs* outputs) : outputs_(outputs) {}
  /// Memory for output `index` in the manifest's order, of the manifest's dtype.
  void* allocate(std::size_t index, const std::vector<std::int64_t>& shape) {
    void* data = stca_outputs_allocate(outputs_, index, static_cast<std::int32_t>(shape.size()), shape.data());
    if (data == nullptr) throw EngineError(STCA_ENGINE_ERROR, stca_last_error());
    return data;
  }

 private:
  stca_outputs* outputs_;
};

/// Executes one graph; derive from it to serve with an engine of one's own. Called from several threads at once.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual std::string name() const = 0;
  /// `inputs` are exactly the graph's, in the manifest's order; every output of the graph must be allocated.
  virtual void run(const stca_tensor* inputs, std::size_t count, Outputs& outputs) = 0;
};
/// Makes the engine of one graph; `bundle` and the strings of its specs live as long as the engine.
using MakeEngine = std::function<std::unique_ptr<Engine>(const Bundle& bundle, const std::string& graph)>;

/// Where the rows of a table that left the graphs come from, a parameter server say. Called from several threads at once.
class RowSource {
 public:
  virtual ~RowSource() = default;
  /// Writes the rows of `count` ids to `to`, one after the other, each of the table's width. What it throws is an
  /// EngineError of the request.
  virtual void rows(const std::int64_t* ids, std::size_t count, float* to) = 0;
};

struct Options {
  std::uint64_t cache_bytes = std::uint64_t{1} << 30;  ///< most memory for user states; 0 keeps none
  std::uint64_t max_users = 0;  ///< most users whose states are kept; 0 for no limit but cache_bytes
  double ttl_seconds = 0;  ///< longest time that a state is kept after it was encoded or appended to; 0 for no limit
  bool truncate = false;   ///< serve a history longer than the limit from its most recent part
  int threads = 0;         ///< of one request; 0 takes every processor that this process may use
  std::string engine;      ///< "tensorrt", "onnxruntime" or "graphs"; empty for the fastest that runs here
  std::string precision;   ///< of the engine's built plans: "fp32", "bf16" or "fp16"; empty for the fastest
  MakeEngine make_engine;  ///< engines of one's own instead
  int cuda_graphs = 64;    ///< most that each TensorRT engine keeps, one for each shape; 0 keeps none
  std::uint64_t max_targets = std::uint64_t{1} << 20;  ///< most of a request, or of a batch together
  bool check_versions = false;    ///< refuse a history that is sent with the version of another one that is kept
  bool unchecked_scores = false;  ///< hand out NaN and infinities, which are an EngineError otherwise
  std::map<std::string, std::shared_ptr<RowSource>> tables;  ///< of rows by the table; else the bundle's files
  std::string state_folder;  ///< of files in which states outlive memory and the process; empty for none
  std::uint64_t state_folder_bytes = std::uint64_t{1} << 33;  ///< most bytes of files in it
  bool native_code = false;  ///< open plans that carry native code, as those with our plugin do: you trust their maker
};

using CacheStats = stca_cache_stats;

/// Where a user's state is kept.
struct Residence {
  std::string tier;                    ///< "memory" or "file"
  std::uint64_t bytes;                 ///< what it takes there
  std::optional<std::string> version;  ///< of its history; a file knows only the one that was asked for
};

/// Scores targets for users. One session serves many threads.
class Session {
 public:
  /// Loads a bundle, checking every file of it. Throws UsageError, BundleError, BuildError.
  explicit Session(const std::string& bundle, Options options = {})
      : options_(std::make_unique<Options>(std::move(options))), session_(nullptr, stca_session_release) {
    stca_options o;
    stca_options_init(&o);
    o.cache_bytes = options_->cache_bytes;
    o.truncate = options_->truncate ? 1 : 0;
    o.threads = options_->threads;
    o.engine = options_->engine.empty() ? nullptr : options_->engine.c_str();
    o.cuda_graphs = options_->cuda_graphs;
    o.unchecked_scores = options_->unchecked_scores ? 1 : 0;
    o.max_users = options_->max_users;
    o.ttl_seconds = options_->ttl_seconds;
    o.max_targets = options_->max_targets;
    o.check_versions = options_->check_versions ? 1 : 0;
    o.precision = options_->precision.empty() ? nullptr : options_->precision.c_str();
    if (options_->make_engine) {
      o.make_engine = make_engine;
      o.make_engine_context = options_.get();
    }
    std::vector<stca_table_source> tables;
    for (const auto& [table, source] : options_->tables) {
      tables.push_back({table.c_str(), source == nullptr ? nullptr : table_rows, source.get()});
    }
    o.tables = tables.data();
    o.table_count = tables.size();
    o.state_folder = options_->state_folder.empty() ? nullptr : options_->state_folder.c_str();
    o.state_folder_bytes = options_->state_folder_bytes;
    o.native_code = options_->native_code ? 1 : 0;
    stca_session* session = nullptr;
    detail::check(stca_session_load(bundle.c_str(), &o, &session));
    session_.reset(session);
  }
  /// As in Python: `Session::load(bundle)`.
  static Session load(const std::string& bundle, Options options = {}) { return Session(bundle, std::move(options)); }

  /// Throws RequestError naming the input, the value and the limit; nothing was computed or kept. DeadlineError and
  /// CancelledError when the scores are not wanted any more; a state that was made is kept.
  Scores score(const Request& request, const Deadline& deadline = Deadline::never()) {
    return score(&request, 1, deadline);
  }
  /// Several requests computed together; scores of all targets, one request after the other.
  Scores score(const std::vector<Request>& requests, const Deadline& deadline = Deadline::never()) {
    return score(requests.data(), requests.size(), deadline);
  }
  Scores score(const RequestBatch& batch, const Deadline& deadline = Deadline::never()) {
    std::vector<const char*> users, versions;
    for (const auto& user : batch.users) users.push_back(detail::c_str(user, "users"));
    for (const auto& version : batch.versions) versions.push_back(detail::c_str(version, "versions"));
    const stca_request_batch raw{batch.inputs.data(), batch.inputs.size(), users.data(),
                                 users.size(),        versions.data(),     versions.size()};
    stca_scores* scores = nullptr;
    detail::check(stca_session_score_batch_by(session_.get(), &raw, deadline.deadline_.get(), &scores));
    return Scores(scores);
  }
  /// Makes and keeps a user's state ahead of its request, in this thread, once a processor is free of scores; whether it
  /// is kept. Throws what `score` throws; without a deadline it waits for its turn as long as it takes.
  bool warm(const std::string& user, const std::vector<Tensor>& history, const std::optional<std::string>& version = {},
            const Deadline& deadline = Deadline::never()) {
    std::int32_t kept = 0;
    detail::check(stca_session_warm_by(session_.get(), detail::c_str(user, "user"), history.data(), history.size(),
                                       detail::c_str(version, "version"), deadline.deadline_.get(), &kept));
    return kept != 0;
  }
  /// Adds new events, oldest first, to a kept state; only they are encoded. `version` is that of the history with them,
  /// `after` that of the history they follow. Returns whether the state with them is kept.
  bool append(const std::string& user, const std::vector<Tensor>& events, const std::string& version,
              const std::optional<std::string>& after = std::nullopt) {
    std::int32_t kept = 0;
    detail::check(stca_session_append(session_.get(), detail::c_str(user, "user"), events.data(), events.size(),
                                      detail::c_str(version, "version"), detail::c_str(after, "after"), &kept));
    return kept != 0;
  }
  /// Puts corrected events in the place of kept ones, as when a label arrives late; exact, as `append`. `at` is the place
  /// of the first in the kept history: 0 is the oldest event, -1 the newest. Throws RequestError as `append`, and when
  /// they are not all within the history.
  bool amend(const std::string& user, const std::vector<Tensor>& events, const std::string& version, std::int64_t at,
             const std::optional<std::string>& after = std::nullopt) {
    std::int32_t kept = 0;
    detail::check(stca_session_amend(session_.get(), detail::c_str(user, "user"), events.data(), events.size(),
                                     detail::c_str(version, "version"), at, detail::c_str(after, "after"), &kept));
    return kept != 0;
  }
  /// Drops what is kept of a user; false when nothing was.
  bool forget(const std::string& user) {
    std::int32_t kept = 0;
    detail::check(stca_session_forget(session_.get(), detail::c_str(user, "user"), &kept));
    return kept != 0;
  }
  /// Where the user's state is kept, for a router; nothing where a request would be a miss. It counts as no use.
  /// `version`: only of this history.
  std::optional<Residence> residence(const std::string& user, const std::optional<std::string>& version = {}) const {
    const std::optional<std::string> named = user;  // which lives as long as what points into it
    const char *name = detail::c_str(named, "user"), *wanted = detail::c_str(version, "version");
    stca_residence found{};
    std::string text;
    do {  // until it is whole: another state may have come in between
      text.resize(found.version_length);
      detail::check(stca_session_residence(session_.get(), name, wanted, &found, text.data(), text.size() + 1));
    } while (found.version_length > text.size());
    text.resize(found.version_length);
    if (found.tier == STCA_NOWHERE) return std::nullopt;
    return Residence{found.tier == STCA_IN_FILE ? "file" : "memory", found.bytes,
                     found.known ? std::optional(text) : std::nullopt};
  }
  /// Serves another bundle from the next request on; running ones finish on the old. Throws BundleError, BuildError,
  /// and then goes on with the bundle it has.
  void swap(const std::string& bundle) { detail::check(stca_session_swap(session_.get(), bundle.c_str())); }

  CacheStats stats() const {
    CacheStats stats;
    detail::check(stca_session_stats(session_.get(), &stats));
    return stats;
  }
  /// The bundle being served.
  Bundle bundle() const {
    stca_bundle* bundle = nullptr;
    detail::check(stca_session_bundle(session_.get(), &bundle));
    return Bundle(std::shared_ptr<const stca_bundle>(bundle, stca_bundle_release));
  }
  /// Which engine runs a graph.
  std::string engine(const std::string& graph) const {
    char name[256];
    detail::check(stca_session_engine(session_.get(), graph.c_str(), name, sizeof name));
    return name;
  }
  /// Why those engines: one line.
  std::string why() const { return choice("why"); }
  /// Which faster engines were passed over, with the reason of each; empty when none was.
  std::string passed_over() const { return choice("passed_over"); }

 private:
  std::string choice(const char* what) const {
    std::string text;
    for (std::size_t length = 255; text.size() != length;) {  // a swap in between may make it longer
      text.resize(length);
      detail::check(stca_session_engine_choice(session_.get(), what, text.data(), text.size() + 1, &length));
      if (length < text.size()) text.resize(length);
    }
    return text;
  }

  Scores score(const Request* requests, std::size_t count, const Deadline& deadline) {
    std::vector<stca_request> raw;
    raw.reserve(count);
    for (const Request* r = requests; r != requests + count; ++r) {
      raw.push_back(
          {r->inputs.data(), r->inputs.size(), detail::c_str(r->user, "user"), detail::c_str(r->version, "version")});
    }
    stca_scores* scores = nullptr;
    detail::check(
        stca_session_score_by(session_.get(), raw.data(), raw.size(), deadline.deadline_.get(), &scores));
    return Scores(scores);
  }

  static std::int32_t make_engine(void* context, const stca_bundle* bundle, const char* graph, stca_engine* engine) {
    return detail::guarded(STCA_BUILD_ERROR, [&] {
      const auto& make = static_cast<const Options*>(context)->make_engine;
      const Bundle view(std::shared_ptr<const stca_bundle>(bundle, [](const stca_bundle*) {}));
      auto made = std::make_unique<std::pair<std::unique_ptr<Engine>, std::string>>(make(view, graph), "");
      if (made->first == nullptr) throw BuildError(STCA_BUILD_ERROR, std::string(graph) + ": make_engine gave none");
      made->second = made->first->name();
      *engine = {made.get(), run, release, made->second.c_str()};
      made.release();
    });
  }
  using Made = std::pair<std::unique_ptr<Engine>, std::string>;
  static std::int32_t run(void* self, const stca_tensor* inputs, std::size_t count, stca_outputs* outputs) {
    return detail::guarded(STCA_ENGINE_ERROR, [&] {
      Outputs sink(outputs);
      static_cast<Made*>(self)->first->run(inputs, count, sink);
    });
  }
  static void release(void* self) { delete static_cast<Made*>(self); }
  static std::int32_t table_rows(void* context, const std::int64_t* ids, std::size_t count, float* to) {
    return detail::guarded(STCA_ENGINE_ERROR, [&] { static_cast<RowSource*>(context)->rows(ids, count, to); });
  }

  std::unique_ptr<Options> options_;  // the library calls make_engine again at a swap; its address must not change
  std::unique_ptr<stca_session, void (*)(stca_session*)> session_;
};

}  // namespace stca
