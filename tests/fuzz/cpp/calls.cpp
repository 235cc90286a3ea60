// Sequences of calls of the C ABI, with null pointers, wrong sizes and wrong tensors among them.
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "../../unit/runtime_cpp/spec_engine.hpp"
#include "requests.hpp"

namespace fs = std::filesystem;

namespace fuzz {
namespace {

std::int32_t run(void* self, const stca_tensor* inputs, std::size_t count, stca_outputs* outputs) {
  return stca::detail::guarded(STCA_ENGINE_ERROR, [&] {
    stca::Outputs sink(outputs);
    static_cast<spec::Engine*>(self)->run(inputs, count, sink);
  });
}

/// An engine that computes nothing, or none at all, as `context` says.
std::int32_t make(void* context, const stca_bundle* bundle, const char* graph, stca_engine* engine) {
  auto& random = *static_cast<Random*>(context);
  if (random.one_in(10)) return random.one_in(2) ? stca_fail(STCA_BUILD_ERROR, "no\nengine") : 4711;
  if (random.one_in(20)) return STCA_OK;  // and nothing made
  const stca::Bundle view(std::shared_ptr<const stca_bundle>(bundle, [](const stca_bundle*) {}));
  *engine = {new spec::Engine(view, graph, {}, {}), run, [](void* self) { delete static_cast<spec::Engine*>(self); },
             random.one_in(2) ? nullptr : "fuzz"};
  return STCA_OK;
}

class Round {
 public:
  Round(std::string golden, std::uint64_t seed, std::uint64_t number)
      : random_(seed, number),
        golden_(golden),
        states_((fs::temp_directory_path() / ("stca-fuzz-states-" + std::to_string(::getpid()))).string()) {}
  ~Round() {
    stca_session_release(session_);
    stca_bundle_release(bundle_);
    std::error_code error;
    fs::remove_all(states_, error);
  }

  void perform() {
    for (int tries = 0; session_ == nullptr && tries < 3; ++tries) load();
    for (int i = 0; i < 24; ++i) call();
  }

 private:
  template <class T>
  T* maybe(T* pointer) {
    return random_.one_in(25) ? nullptr : pointer;
  }
  std::string place() {
    const char* const good[] = {"log", "rows", "plain", "padded_left", "exact", "log_other_scores", "log_other_weights"};
    const char* const bad[] = {"nowhere", "cases.json", "", "x\ny"};
    return (fs::path(golden_) / (random_.one_in(6) ? random_.among(bad) : random_.among(good))).string();
  }

  void load() {
    stca_options options;
    // Of any length a struct may have had, and of some that none ever had.
    const std::size_t size = random_.one_in(8) ? static_cast<std::size_t>(8 + random_.below(150)) : sizeof options;
    stca_options_init_sized(&options, size);
    if (options.size >= offsetof(stca_options, cuda_graphs)) {
      options.make_engine = make;
      options.make_engine_context = &random_;
      options.cache_bytes = static_cast<std::uint64_t>(random_.below(3)) * 1500;
      options.truncate = static_cast<std::int32_t>(random_.below(2));
    }
    if (options.size >= sizeof options && random_.one_in(3)) {
      options.max_users = static_cast<std::uint64_t>(random_.below(3));
      options.ttl_seconds = random_.one_in(4) ? -1 : 1e-4;
      const std::int32_t threads[] = {0, 1, 2, -3, 5000};
      options.threads = random_.among(threads);
      const std::uint64_t targets[] = {0, 1, 3, 1 << 20, static_cast<std::uint64_t>(-1)};
      options.max_targets = random_.among(targets);
      options.check_versions = static_cast<std::int32_t>(random_.below(2));
    }
    if (options.size >= sizeof options && random_.one_in(6)) {
      options.state_folder = random_.one_in(8) ? "/dev/null/states" : states_.c_str();
      options.state_folder_bytes = static_cast<std::uint64_t>(random_.below(3)) * 3000;
      options.ttl_seconds = 0;
    }
    const bool own = options.size >= offsetof(stca_options, cuda_graphs);
    const std::string path = place();
    // With no options the library takes an engine of its own, which is not what is tried here.
    if (!own && std::getenv("STCA_ONNXRUNTIME_LIBRARY") == nullptr) return;
    ended("load", stca_session_load(maybe(path.c_str()), &options, maybe(&session_)));
  }

  void call() {
    switch (random_.below(13)) {
      case 0: return look_at_bundle();
      case 1: {
        const std::string path = place();
        ended("swap", stca_session_swap(maybe(session_), maybe(path.c_str())));
        return;
      }
      case 2: {
        std::int32_t kept = 0;
        ended("forget", stca_session_forget(maybe(session_), maybe(user()), maybe(&kept)));
        return;
      }
      case 3: return append();
      case 4: return batch();
      case 5: return ask();
      case 6: return warm();
      default: return score();
    }
  }

  const char* user() {
    const char* const users[] = {"ann", "bob", "", "a user\nof two lines"};
    return random_.one_in(200) ? long_name_.c_str() : random_.among(users);
  }
  const char* version() {
    const char* const versions[] = {"v1", "v1", "v2"};
    return random_.among(versions);
  }

  std::vector<stca_tensor_spec> specs() {
    if (session_ == nullptr) return {};
    stca_bundle* served = nullptr;
    if (stca_session_bundle(session_, &served) != STCA_OK) return {};
    stca_bundle_release(bundle_);
    bundle_ = served;
    std::vector<stca_tensor_spec> all(stca_bundle_input_count(bundle_, "request"));
    for (std::size_t i = 0; i < all.size(); ++i) stca_bundle_input(bundle_, "request", i, &all[i]);
    return all;
  }

  /// Breaks one of the tensors.
  void spoil(Tensors& tensors) {
    if (tensors.list.empty() || !random_.one_in(4)) return;
    stca_tensor& tensor = random_.among(tensors.list);
    constexpr std::int64_t huge = std::int64_t{1} << 40;
    switch (random_.below(8)) {
      case 0: tensor.name = nullptr; break;
      case 1: tensor.name = long_name_.c_str(); break;
      case 2:
        tensor.dtype = static_cast<std::int32_t>(random_.below(400)) - 200;
        if (tensor.dtype >= 0 && tensor.dtype <= STCA_UINT64) tensor.dtype = 99;
        break;
      case 3: tensor.rank = random_.one_in(2) ? -1 : 9; break;
      case 4:
        tensor.rank = 3;
        std::fill(tensor.shape, tensor.shape + 3, huge);
        break;
      case 5:
        tensor.rank = 1;
        tensor.shape[0] = -5;
        break;
      case 6: tensor.data = nullptr; break;
      default: tensors.list.push_back(tensors.list.front());
    }
  }

  void score() {
    const auto all = specs();
    const std::size_t count = static_cast<std::size_t>(random_.below(3));
    std::vector<Tensors> tensors(count);
    std::vector<stca_request> requests;
    for (Tensors& inputs : tensors) {
      fill(all, random_.one_in(3) ? STCA_REQUEST | STCA_TARGET : 7, random_, inputs);
      spoil(inputs);
      const bool none = random_.one_in(40);
      requests.push_back({none ? nullptr : inputs.list.data(), inputs.list.size(), maybe(user()), maybe(version())});
    }
    stca_scores* scores = nullptr;
    stca_deadline* deadline = late();
    ended("score", stca_session_score_by(maybe(session_), maybe(requests.data()), count, deadline, maybe(&scores)));
    stca_deadline_release(deadline);
    read(scores);
  }

  /// Mostly none; one that is over, cancelled, or far away.
  stca_deadline* late() {
    if (!random_.one_in(8)) return nullptr;
    const double seconds[] = {HUGE_VAL, 0, -1, 100, std::nan("")};
    stca_deadline* deadline = nullptr;
    ended("deadline", stca_deadline_make(random_.among(seconds), maybe(&deadline)));
    if (random_.one_in(2)) stca_deadline_cancel(deadline);
    return deadline;
  }

  void batch() {
    Tensors inputs;
    const std::int64_t count = random_.below(4);
    fill_batch(specs(), count, random_, inputs);
    spoil(inputs);
    std::vector<const char*> users, versions;
    for (std::int64_t i = random_.one_in(4) ? random_.below(5) : count; i > 0; --i) users.push_back(maybe(user()));
    for (std::int64_t i = random_.one_in(4) ? random_.below(5) : count; i > 0; --i)
      versions.push_back(maybe(version()));
    const stca_request_batch batch{maybe(inputs.list.data()), inputs.list.size(), maybe(users.data()), users.size(),
                                   maybe(versions.data()),    versions.size()};
    stca_scores* scores = nullptr;
    ended("batch", stca_session_score_batch(maybe(session_), maybe(&batch), maybe(&scores)));
    read(scores);
  }

  void append() {
    Tensors events;
    fill(specs(), STCA_USER, random_, events, !random_.one_in(5));
    spoil(events);
    std::int32_t kept = 0;
    if (random_.one_in(3)) {
      const std::int64_t places[] = {0, 0, 1, -1, -2, 7, std::numeric_limits<std::int64_t>::min(),
                                     std::numeric_limits<std::int64_t>::max()};
      ended("amend", stca_session_amend(maybe(session_), maybe(user()), maybe(events.list.data()), events.list.size(),
                                        maybe(version()), random_.among(places), random_.one_in(2) ? nullptr : version(),
                                        maybe(&kept)));
      return;
    }
    ended("append", stca_session_append(maybe(session_), maybe(user()), maybe(events.list.data()), events.list.size(),
                                        maybe(version()), random_.one_in(2) ? nullptr : version(), maybe(&kept)));
  }

  void warm() {
    Tensors history;
    fill(specs(), random_.one_in(4) ? 7 : STCA_USER, random_, history);
    spoil(history);
    std::int32_t kept = 0;
    const double seconds[] = {HUGE_VAL, HUGE_VAL, 10, 0, -1, std::nan(""), 1e300};
    ended("warm", stca_session_warm(maybe(session_), maybe(user()), maybe(history.list.data()), history.list.size(),
                                    random_.one_in(3) ? nullptr : version(), random_.among(seconds), maybe(&kept)));
  }

  static void read(stca_scores* scores) {
    double sum = 0;
    const std::size_t count = stca_scores_targets(scores) * stca_scores_tasks(scores);
    for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(stca_scores_values(scores)[i]);
    const auto* bytes = static_cast<const unsigned char*>(stca_scores_data(scores));
    for (std::size_t i = 0; i < count * stca_dtype_bytes(stca_scores_dtype(scores)); ++i) sum += bytes[i];
    if (!(sum == sum)) fail("scores that are not finite");
    stca_scores_release(scores);
  }

  void look_at_bundle() {
    const std::string path = place();
    stca_bundle* bundle = nullptr;
    ended("bundle", stca_bundle_load(maybe(path.c_str()), maybe(&bundle)));
    const char* const graphs[] = {"request", "user_encoder", "target_scorer", "other"};
    const char* graph = maybe(random_.among(graphs));
    stca_tensor_spec spec;
    const auto index = static_cast<std::size_t>(random_.below(12));
    ended("input", stca_bundle_input(bundle, graph, index, maybe(&spec)));
    ended("output", stca_bundle_output(bundle, graph, index, maybe(&spec)));
    stca_bundle_path(bundle), stca_bundle_weights(bundle), stca_bundle_manifest(bundle);
    stca_bundle_file(bundle, graph), stca_bundle_input_count(bundle, graph), stca_bundle_output_count(bundle, graph);
    stca_bundle_release(bundle);
  }

  void ask() {
    stca_cache_stats stats;
    ended("stats", stca_session_stats(maybe(session_), maybe(&stats)));
    char text[16];
    std::size_t length = 0;
    const auto size = static_cast<std::size_t>(random_.below(sizeof text + 1));
    ended("engine", stca_session_engine(maybe(session_), maybe("user_encoder"), maybe(text), size));
    const char* const what[] = {"why", "passed_over", "how"};
    ended("engine choice",
          stca_session_engine_choice(maybe(session_), maybe(random_.among(what)), maybe(text), size, maybe(&length)));
    stca_bundle* bundle = nullptr;
    ended("served bundle", stca_session_bundle(maybe(session_), maybe(&bundle)));
    stca_bundle_release(bundle);
    stca_code_name(static_cast<std::int32_t>(random_.below(300)) - 100);
    stca_dtype_bytes(static_cast<std::int32_t>(random_.below(300)) - 100);
  }

  Random random_;
  const std::string golden_, states_;
  std::string long_name_ = std::string(1 << 20, 'n');
  stca_session* session_ = nullptr;
  stca_bundle* bundle_ = nullptr;
};

}  // namespace

int calls(const std::string& golden, std::uint64_t seed, std::uint64_t first, std::uint64_t rounds) {
  for (std::uint64_t number = first; number < first + rounds; ++number) {
    std::cout << "round " << number << std::endl;
    Round(golden, seed, number).perform();
  }
  return wrong;
}

}  // namespace fuzz
