// The session beyond what the golden requests show: engines, threads,
// lifetimes, and callers that do it wrong.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "check.hpp"
#include "log_request.hpp"
#include "toy_engine.hpp"

namespace {

/// Encodes as the toy does, but scores as `body` does.
class ScorerOf : public toy::ToyEngine {
 public:
  using Body = std::function<void(stca::Outputs&)>;
  ScorerOf(const stca::Bundle& bundle, const std::string& graph, Body body)
      : ToyEngine(bundle, graph, nullptr), body_(std::move(body)), scorer_(graph == "target_scorer") {}
  void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
    scorer_ ? body_(outputs) : ToyEngine::run(inputs, count, outputs);
  }

 private:
  Body body_;
  bool scorer_;
};

stca::MakeEngine scorer_of(ScorerOf::Body body) {
  return [body](const stca::Bundle& bundle, const std::string& graph) {
    return std::make_unique<ScorerOf>(bundle, graph, body);
  };
}

}  // namespace

TEST(session_computes_the_user_side_once) {
  toy::Counters counters;
  {
    stca::Session session(golden("log"), with(toy::maker(&counters)));
    CHECK_EQUAL(counters.alive, 2);
    const Log log;
    CHECK_EQUAL(session.score(stca::Request{log.all(), "ann", "v1"})(0, 0), log.first_score());
    CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"})(0, 0), log.first_score());
    CHECK_EQUAL(counters.encoded, 1);
    CHECK_EQUAL(counters.scored, 2);
    CHECK_EQUAL(session.engine("user_encoder"), "toy");
    CHECK_EQUAL(session.why(), "the caller's own engines");
    CHECK_EQUAL(session.passed_over(), "");
    session.swap(golden("log_other_weights"));
    CHECK_EQUAL(counters.alive, 2);  // the old ones are gone
    CHECK_EQUAL(session.score(stca::Request{log.all(), "ann", "v1"})(0, 0), log.first_score(1000));
    CHECK_EQUAL(counters.encoded, 2);
  }
  CHECK_EQUAL(counters.alive, 0);
}

TEST(session_scores_several_requests_at_once) {
  toy::Counters counters;
  stca::Session session(golden("log"), with(toy::maker(&counters)));
  Log ann, bob;
  bob.items = {}, bob.actions = {}, bob.targets = {5}, bob.prices = {0, 0};
  const stca::Scores scores = session.score(
      {{ann.all(), "ann", "v1"}, {bob.all(), "bob", "v1"}, {ann.all(), {}, {}}, {ann.all(), "ann", "v1"}});
  CHECK_EQUAL(scores.targets(), 7u);
  CHECK_EQUAL(scores(0, 0), ann.first_score());
  CHECK_EQUAL(scores(2, 0), 25.5f);
  CHECK_EQUAL(scores(3, 0), ann.first_score());
  CHECK_EQUAL(scores(5, 0), ann.first_score());
  CHECK_EQUAL(counters.scored, 1);
  CHECK_EQUAL(counters.encoded, 1);  // together
  CHECK_EQUAL(counters.users, 3);    // ann once, though she has two requests
  CHECK_EQUAL(session.stats().users, 2u);
  CHECK_EQUAL(session.score(std::vector<stca::Request>{}).targets(), 0u);
}

TEST(session_encodes_many_users_in_few_runs) {
  toy::Counters counters;
  stca::Session session(golden("log"), with(toy::maker(&counters)));
  std::vector<Log> logs(400);
  std::vector<stca::Request> requests;
  for (std::size_t i = 0; i < logs.size(); ++i) {
    logs[i].items = {static_cast<std::int64_t>(i), 1, 1, 1, 1, 1}, logs[i].actions = {0, 0, 0, 0, 0, 0};
    requests.push_back({logs[i].all(), std::to_string(i), "v1"});
  }
  const stca::Scores scores = session.score(requests);
  CHECK_EQUAL(counters.encoded,
              10);  // of 42 users at most: no more than 256 tokens
  CHECK_EQUAL(counters.users, 400);
  const std::size_t targets = scores.targets() / logs.size();
  for (std::size_t i = 1; i < logs.size(); ++i) {
    CHECK_EQUAL(scores(i * targets, 0), scores(0, 0) + static_cast<float>(i));
    CHECK_EQUAL(session.score(stca::Request{logs[i].rest(), std::to_string(i), "v1"})(0, 0), scores(i * targets, 0));
  }
  CHECK_EQUAL(counters.users, 400);
}

TEST(session_tells_what_the_bundle_takes) {
  const stca::Bundle bundle(golden("log"));
  const auto inputs = bundle.inputs("request");
  CHECK_EQUAL(inputs.size(), 9u);
  CHECK_EQUAL(std::string(inputs[0].name), "history_item");
  CHECK_EQUAL(inputs[0].dtype, STCA_INT64);
  CHECK_EQUAL(inputs[0].scope, STCA_USER);
  CHECK_EQUAL(inputs[0].limit, 1000);
  CHECK_EQUAL(std::string(inputs[7].symbol[0]), "N_t");
  CHECK(inputs[7].symbol[1] == nullptr && inputs[7].shape[1] == 2 && inputs[7].shape[0] == -1);
  CHECK_EQUAL(bundle.outputs("user_encoder").size(), 4u);
  CHECK(std::filesystem::equivalent(bundle.file("request"), golden("log") + "/request.onnx"));
  CHECK(bundle.file("nothing").empty() && bundle.inputs("nothing").empty());
  CHECK(check::contains(bundle.manifest(), "stca-bundle"));
  stca_tensor_spec spec;
  stca_bundle* raw = nullptr;
  CHECK_EQUAL(stca_bundle_load(golden("log").c_str(), &raw), STCA_OK);
  CHECK_EQUAL(stca_bundle_input(raw, "request", 9, &spec), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_bundle_input(raw, "nothing", 0, &spec), STCA_USAGE_ERROR);
  stca_bundle_release(raw);
  stca::Session session(golden("log"), with(toy::maker()));
  const stca::Bundle served = session.bundle();
  session.swap(golden("log_other_weights"));
  CHECK_EQUAL(served.weights(),
              bundle.weights());  // still whole, though no longer served
  CHECK(session.bundle().weights() != bundle.weights());
}

TEST(session_tells_which_states_an_engine_can_take) {
  // The same bundle, but what encodes is another engine: its states are its
  // own.
  int made = 0;
  toy::Counters counters;
  class Named : public toy::ToyEngine {
   public:
    Named(const stca::Bundle& bundle, const std::string& graph, toy::Counters* counters, std::string name)
        : ToyEngine(bundle, graph, counters), name_(std::move(name)) {}
    std::string name() const override { return name_; }

   private:
    std::string name_;
  };
  stca::Session session(golden("log"), with([&](const stca::Bundle& bundle, const std::string& graph) {
                          return std::make_unique<Named>(bundle, graph, &counters, made++ < 4 ? "old" : "new");
                        }));
  const Log log;
  const auto score = [&] { session.score(stca::Request{log.all(), "ann", "v1"}); };
  score(), session.swap(golden("log")), score();
  CHECK_EQUAL(counters.encoded, 1);
  session.swap(golden("log")), score();
  CHECK_EQUAL(session.engine("user_encoder"), "new");
  CHECK_EQUAL(counters.encoded, 2);
}

TEST(session_needs_an_engine) {
#if !defined(STCA_WITH_TENSORRT) && !defined(STCA_WITH_ONNXRUNTIME)
  CHECK_THROWS(stca::Session(golden("log")), stca::BuildError, "without TensorRT and without ONNX Runtime");
#endif
  stca::Options options;
  options.engine = "abacus";
  CHECK_THROWS(stca::Session(golden("log"), options), stca::BuildError, "no engine 'abacus'");
  options.engine = "tensorrt";
#ifdef STCA_WITH_TENSORRT
  const char* no_tensorrt =
      "no tensorrt engines that run here: the bundle has "
      "none; run `stca build --engine tensorrt`";
#else
  const char* no_tensorrt =
      "this library was built without TensorRT; rebuild "
      "it with -DSTCA_TENSORRT_INCLUDE_DIR=…";
#endif
  CHECK_THROWS(stca::Session(golden("log"), options), stca::BuildError, no_tensorrt);
  const auto none = [](const stca::Bundle&, const std::string&) { return std::unique_ptr<stca::Engine>(); };
  CHECK_THROWS(stca::Session(golden("log"), with(none)), stca::BuildError, "make_engine gave none");
  const auto throws = [](const stca::Bundle&, const std::string& graph) -> std::unique_ptr<stca::Engine> {
    throw stca::BuildError(STCA_BUILD_ERROR, "no room for " + graph);
  };
  CHECK_THROWS(stca::Session(golden("log"), with(throws)), stca::BuildError, "no room for user_encoder");
}

TEST(session_passes_on_why_an_engine_failed) {
  const Log log;
  const auto score = [&](ScorerOf::Body body) {
    stca::Session session(golden("log"), with(scorer_of(std::move(body))));
    session.score(stca::Request{log.all(), {}, {}});
  };
  CHECK_THROWS(score([](auto&) { throw stca::RequestError(STCA_REQUEST_ERROR, "too many"); }), stca::RequestError,
               "too many");
  CHECK_THROWS(score([](auto&) { throw std::logic_error("broken"); }), stca::EngineError, "broken");
  CHECK_THROWS(score([](auto&) { throw 5; }), stca::EngineError, "no std::exception");
  CHECK_THROWS(score([](auto&) {}), stca::EngineError, "did not give the output scores");
  CHECK_THROWS(score([](auto& o) { o.allocate(0, {2, 3}); }), stca::EngineError, "scores another shape than [N_t, 2]");
  CHECK_THROWS(score([](auto& o) { o.allocate(0, {-1, 2}); }), stca::EngineError, "another shape");
  CHECK_THROWS(score([](auto& o) { o.allocate(1, {2, 2}); }), stca::EngineError, "index 1");
  CHECK_THROWS(score([](auto& o) { o.allocate(0, {3, 2}); }), stca::EngineError, "scores as float32 [3, 2]");
}

TEST(session_counts_what_an_encoder_gives) {
  // One token too few from the encoder must not become a read beyond a state.
  class Short : public toy::ToyEngine {
   public:
    using ToyEngine::ToyEngine;
    void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
      ToyEngine::run(inputs, count, outputs);
      if (outputs_short) outputs.allocate(0, {2, 2});
    }
    bool outputs_short = true;
  };
  const auto make = [](const stca::Bundle& bundle, const std::string& graph) {
    auto engine = std::make_unique<Short>(bundle, graph, nullptr);
    engine->outputs_short = graph == "user_encoder";
    return engine;
  };
  stca::Session session(golden("log"), with(make));
  CHECK_THROWS(session.score(stca::Request{Log().all(), "ann", "v1"}), stca::EngineError, "token as float32 [2, 2]");
  CHECK_EQUAL(session.stats().users, 0u);
}

TEST(session_refuses_arrays_that_cannot_be) {
  stca::Session session(golden("log"), with(toy::maker()));
  const Log log;
  const auto refused = [&](const stca_tensor& tensor, const std::string& why) {
    std::vector<stca::Tensor> inputs = log.all();
    for (stca::Tensor& t : inputs) {
      if (tensor.name != nullptr && std::string(t.name) == tensor.name) static_cast<stca_tensor&>(t) = tensor;
    }
    if (tensor.name == nullptr) static_cast<stca_tensor&>(inputs[0]) = tensor;
    CHECK_THROWS(session.score(stca::Request{inputs, {}, {}}), stca::RequestError, why);
  };
  const std::int64_t values[2] = {1, 2};
  const std::int64_t huge = std::int64_t{1} << 40;
  refused({"target_item", values, 77, 1, {2}}, "dtype number 77");
  refused({"target_item", values, -1, 1, {2}}, "dtype number -1");
  refused({"target_item", values, STCA_INT64, 9, {2}}, "has 9 axes");
  refused({"target_item", values, STCA_INT64, -1, {}}, "has -1 axes");
  refused({"target_item", values, STCA_INT64, 1, {-2}}, "no array has this shape");
  refused({"target_item", values, STCA_INT64, 3, {huge, huge, huge}}, "no array has this shape");
  refused({"target_item", values, STCA_INT64, 1, {std::int64_t{1} << 62}}, "no array has this shape");
  refused({"target_item", nullptr, STCA_INT64, 1, {2}}, "no data");
  refused({"target_item", reinterpret_cast<const char*>(values) + 1, STCA_INT64, 1, {1}}, "not aligned");
  refused({nullptr, values, STCA_INT64, 1, {2}}, "has no name");
  refused({"target_price", values, STCA_FLOAT64, 3, {0, huge, huge}}, "no array has this shape");

  std::vector<stca::Tensor> twice = log.all();
  twice.push_back(twice[0]);
  CHECK_THROWS(session.score(stca::Request{twice, {}, {}}), stca::RequestError, "given twice");
  const double big[4] = {1e300, 0, 0, 0};
  refused({"target_price", big, STCA_FLOAT64, 2, {2, 2}}, "holds 1e+300 at [0, 0]; values must be finite as float32");
  std::vector<stca::Tensor> event = {
      {"history_item", log.items}, {"history_action", log.actions}, {"target_item", log.targets}};
  CHECK_THROWS(session.append("ann", event, "v2"), stca::RequestError, "target_item: is no part of an event");
}

TEST(session_refuses_names_cut_by_a_zero_byte) {
  stca::Session session(golden("log"), with(toy::maker()));
  const Log log;
  session.score(stca::Request{log.all(), "ann", "v1"});
  CHECK_THROWS(session.score(stca::Request{log.rest(), std::string("ann\0x", 5), "v1"}), stca::RequestError,
               "user: holds a zero byte");
  CHECK_THROWS(session.forget(std::string("ann\0", 4)), stca::RequestError, "zero byte");
}

#undef stca_options_init
extern "C" void stca_options_init(stca_options* options);  // as programs call it that know a shorter struct

TEST(session_options_may_grow) {
  constexpr std::size_t old = offsetof(stca_options, cuda_graphs);
  stca_options options;
  std::memset(&options, 0x55, sizeof options);
  stca_options_init(&options);
  CHECK_EQUAL(options.size, old);
  CHECK_EQUAL(options.cuda_graphs, 0x55555555);  // not theirs
  CHECK(options.cache_bytes == std::uint64_t{1} << 30 && options.engine == nullptr && options.make_engine == nullptr);
  options.engine = "abacus";
  stca_session* session = nullptr;
  CHECK_EQUAL(stca_session_load(golden("log").c_str(), &options, &session), STCA_BUILD_ERROR);
  CHECK(check::contains(stca_last_error(), "no engine 'abacus'"));
  stca_options_init_sized(&options, sizeof options + 8);  // a program that knows a longer one
  CHECK_EQUAL(options.size, sizeof options);
  CHECK_EQUAL(options.cuda_graphs, 64);
  CHECK(options.max_users == 0 && options.ttl_seconds == 0 && options.precision == nullptr);
}

TEST(session_takes_any_code_from_a_callback) {
  stca_options options;
  stca_options_init_sized(&options, sizeof options);
  const auto load = [&](auto run, auto make, stca_session** session) {
    options.make_engine = make;
    options.make_engine_context = reinterpret_cast<void*>(+run);
    return stca_session_load(golden("log").c_str(), &options, session);
  };
  using Run = std::int32_t (*)(void*, const stca_tensor*, std::size_t, stca_outputs*);
  const auto made = [](void* context, const stca_bundle*, const char*, stca_engine* engine) -> std::int32_t {
    engine->run = reinterpret_cast<Run>(context);
    return STCA_OK;
  };
  const auto fails = [](void*, const stca_tensor*, std::size_t, stca_outputs*) -> std::int32_t { return -7; };
  const auto none = [](void*, const stca_bundle*, const char*, stca_engine*) -> std::int32_t { return 1000; };
  const auto no_shape = [](void*, const stca_tensor*, std::size_t, stca_outputs* outputs) -> std::int32_t {
    CHECK(stca_outputs_allocate(outputs, 0, 2, nullptr) == nullptr);
    return STCA_OK;
  };
  stca_session* session = nullptr;
  CHECK_EQUAL(load(fails, none, &session), STCA_BUILD_ERROR);
  CHECK_EQUAL(std::string(stca_last_error()), "user_encoder: the caller's engine could not be made");
  const auto score = [&] {
    const Log log;
    const std::vector<stca::Tensor> inputs = log.all();
    const stca_request request{inputs.data(), inputs.size(), nullptr, nullptr};
    stca_scores* scores = nullptr;
    const std::int32_t code = stca_session_score(session, &request, 1, &scores);
    stca_session_release(session);
    return code;
  };
  CHECK_EQUAL(load(fails, made, &session), STCA_OK);
  CHECK_EQUAL(score(), STCA_ENGINE_ERROR);
  CHECK_EQUAL(load(no_shape, made, &session), STCA_OK);
  CHECK_EQUAL(score(), STCA_USAGE_ERROR);
  CHECK(check::contains(stca_last_error(), "shape is a null pointer"));
}

TEST(session_says_why_in_any_length) {
  stca_options options;
  stca_options_init_sized(&options, sizeof options);
  options.make_engine = [](void*, const stca_bundle*, const char*, stca_engine* engine) -> std::int32_t {
    engine->run = [](void*, const stca_tensor*, std::size_t, stca_outputs*) -> std::int32_t { return 0; };
    return STCA_OK;
  };
  stca_session* raw = nullptr;
  CHECK_EQUAL(stca_session_load(golden("log").c_str(), &options, &raw), STCA_OK);
  char text[8] = "";
  std::size_t length = 0;
  CHECK_EQUAL(stca_session_engine_choice(raw, "why", text, sizeof text, &length), STCA_OK);
  CHECK_EQUAL(std::string(text), "the cal");
  CHECK_EQUAL(length, std::strlen("the caller's own engines"));
  CHECK_EQUAL(stca_session_engine_choice(raw, "passed_over", text, sizeof text, nullptr), STCA_OK);
  CHECK_EQUAL(std::string(text), "");
  CHECK_EQUAL(stca_session_engine_choice(raw, "why", nullptr, 0, &length), STCA_OK);
  CHECK_EQUAL(stca_session_engine_choice(raw, "why", nullptr, 1, &length), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_engine_choice(raw, "how", text, 1, &length), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_engine_choice(nullptr, "why", text, 1, &length), STCA_USAGE_ERROR);
  stca_session_release(raw);
}

TEST(session_c_abi_answers_null_pointers) {
  stca_session* session = nullptr;
  stca_scores* scores = nullptr;
  stca_bundle* bundle = nullptr;
  stca_cache_stats stats;
  CHECK_EQUAL(stca_session_load(nullptr, nullptr, &session), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_load("x", nullptr, nullptr), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_load("/nowhere", nullptr, &session), STCA_BUNDLE_ERROR);
  CHECK(check::contains(stca_last_error(), "/nowhere: no such bundle"));
  CHECK_EQUAL(stca_session_score(nullptr, nullptr, 0, &scores), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_score_batch(nullptr, nullptr, &scores), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_append(nullptr, "a", nullptr, 0, "v", nullptr, nullptr), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_forget(nullptr, "a", nullptr), STCA_USAGE_ERROR);
  stca_residence found;
  CHECK_EQUAL(stca_session_residence(nullptr, "a", nullptr, &found, nullptr, 0), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_swap(nullptr, "a"), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_stats(nullptr, &stats), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_session_bundle(nullptr, &bundle), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_bundle_load(nullptr, &bundle), STCA_USAGE_ERROR);
  CHECK_EQUAL(std::string(stca_last_error()), "path is a null pointer");
  stca_options options{};
  CHECK_EQUAL(stca_session_load(golden("log").c_str(), &options, &session), STCA_USAGE_ERROR);
  stca_session_release(nullptr), stca_scores_release(nullptr), stca_bundle_release(nullptr);
  CHECK_EQUAL(std::string(stca_code_name(STCA_REQUEST_ERROR)), "RequestError");
  CHECK_EQUAL(std::string(stca_code_name(55)), "unknown");
  CHECK_EQUAL(stca_library_abi_version(), std::uint32_t{STCA_ABI_VERSION});
}

TEST(session_serves_threads_during_swaps) {
  stca::Options options = with(toy::maker());
  options.cache_bytes = 5 * 48;  // room for five states, so that threads evict each other's
  stca::Session session(golden("log"), options);
  std::atomic<int> wrong{0};
  const auto serve = [&](unsigned seed) {
    std::mt19937 random(seed);
    const Log log;
    std::vector<std::int64_t> one{9}, zero{0};
    for (int i = 0; i < 300; ++i) {
      const std::string user = std::to_string(random() % 8);
      try {
        switch (random() % 4) {
          case 0: session.forget(user); break;
          case 1:
            session.append(user, {{"history_item", one}, {"history_action", zero}}, "v" + std::to_string(random() % 3));
            break;
          default: {
            const float score = session.score(stca::Request{log.all(), user, "v1"})(0, 0);
            // Appended nines under the name v1 may be among the history: anything
            // from none to a window of them.
            const float own = score - (score > 900 ? 1000 : 0);
            if (own < 24 || own > 27 + 10 + 6 * 9 + 25) ++wrong;
          }
        }
      } catch (const std::exception& e) {
        ++wrong;
        std::cerr << e.what() << "\n";
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) threads.emplace_back(serve, t);
  for (int i = 0; i < 10; ++i) session.swap(golden(i % 2 == 0 ? "log_other_weights" : "log"));
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(wrong.load(), 0);
  CHECK(session.stats().bytes <= 5 * 48);
}

TEST(session_survives_random_requests) {
  // Whatever the tensors are, a request is scored or refused; the sanitizers
  // watch what is read on the way.
  stca::Session session(golden("log"), with(toy::maker()));
  std::mt19937 random(7);
  const auto below = [&](std::uint32_t n) { return static_cast<std::int64_t>(random() % n); };
  const char* names[] = {"history_item",   "history_action", "history_offsets", "user_segment",   "user_profile",
                         "request_device", "target_item",    "target_price",    "target_offsets", "nothing"};
  constexpr std::size_t item[] = {1, 1, 1, 2, 4, 8, 2, 2, 4, 8, 2, 4, 8};
  int scored = 0, refused = 0;
  for (int round = 0; round < 3000; ++round) {
    const Log log;
    std::vector<stca::Tensor> inputs = log.all();
    std::vector<std::vector<unsigned char>> memory;
    for (std::int64_t change = below(3); change > 0; --change) {
      const auto dtype = static_cast<stca_dtype>(below(13));
      std::vector<std::int64_t> shape;
      std::size_t bytes = item[dtype];
      for (std::int64_t axes = below(4); axes > 0; --axes)
        shape.push_back(below(4)), bytes *= static_cast<std::size_t>(shape.back());
      auto& data = memory.emplace_back(std::vector<unsigned char>(std::max<std::size_t>(bytes, 1)));
      for (auto& byte : data) byte = static_cast<unsigned char>(random() % 5 == 0 ? random() : 0);
      if (dtype == STCA_BOOL)
        for (auto& byte : data) byte &= 1;
      const stca::Tensor tensor(names[below(10)], dtype, data.data(), shape);
      if (below(4) == 0)
        inputs.push_back(tensor);
      else
        inputs[static_cast<std::size_t>(below(static_cast<std::uint32_t>(inputs.size())))] = tensor;
    }
    try {
      if (below(2) == 0)
        session.score(stca::Request{inputs, std::to_string(below(5)), std::to_string(below(2))});
      else
        session.score(stca::RequestBatch{inputs, {}, {}});
      ++scored;
    } catch (const stca::RequestError& e) {
      ++refused;
      CHECK(!std::string(e.what()).empty());
    }
  }
  CHECK(scored > 100 && refused > 100);
}

int main(int argc, char** argv) { return check::run(argc > 1 ? argv[1] : ""); }
