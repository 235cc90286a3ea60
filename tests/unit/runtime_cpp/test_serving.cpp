// What is served and kept: finite scores, requests without targets, encodings that calls share, what forget undoes, and
// scores in the model's own type.
#include <atomic>
#include <cmath>
#include <thread>

#include "check.hpp"
#include "gate.hpp"
#include "log_request.hpp"
#include "resealed.hpp"
#include "spec_engine.hpp"
#include "toy_engine.hpp"

using resealed::Copy;
using resealed::Tree;

namespace {

stca::Options scoring(double score) {
  return with(spec::maker({}, [score](const std::string& graph, std::size_t, std::size_t element) {
    return graph == "target_scorer" && element == 3 ? score : 1.0;
  }));
}

}  // namespace

TEST(serving_gives_finite_scores) {
  const Log log;
  for (const double score : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    stca::Options options = scoring(score);
    stca::Session session(golden("log"), options);
    CHECK_THROWS(session.score(stca::Request{log.all(), "ann", "v1"}), stca::EngineError, "spec gave scores ");
    CHECK_THROWS(session.score(stca::Request{log.all(), "ann", "v1"}), stca::EngineError, " for target 1; scores must");
    options.unchecked_scores = true;
    stca::Session unchecked(golden("log"), options);
    CHECK(!std::isfinite(unchecked.score(stca::Request{log.all(), "ann", "v1"})(1, 1)));
  }
}

TEST(serving_runs_nothing_without_targets) {
  std::atomic<int> runs{0};
  stca::Session session(golden("log"), with(spec::maker([&](const std::string&) { ++runs; })));
  Log none, some;
  none.targets = {}, none.prices = {};
  const stca::Scores scores = session.score(stca::Request{none.all(), "ann", "v1"});
  CHECK(scores.targets() == 0 && scores.tasks() == 2);
  CHECK_EQUAL(runs.load(), 0);
  CHECK_EQUAL(session.stats().misses, 0u);
  none.items = {5000, 1, 1};
  CHECK_EQUAL(session.score(stca::Request{none.all(), "ann", "v1"}).targets(), 0u);  // nor looked at
  none.items = {1, 1, 1};
  const stca::Scores both = session.score({{none.all(), "ann", "v1"}, {some.all(), "bob", "v1"}, {none.all(), {}, {}}});
  CHECK_EQUAL(both.targets(), 2u);
  CHECK_EQUAL(runs.load(), 2);
  CHECK_EQUAL(session.stats().users, 2u);
  // Of a model whose targets go by another name too.
  const std::vector<float> clicks{1, 2}, candidates;
  const std::vector<std::uint16_t> profile{0, 0, 0};
  const std::int32_t hour = 1;
  stca::Session plain(golden("plain"), with(spec::maker([&](const std::string&) { ++runs; })));
  const std::vector<stca::Tensor> inputs{{"clicks", clicks.data(), {1, 2}},
                                         {"profile", STCA_FLOAT16, profile.data(), {3}},
                                         {"hour", &hour, {}},
                                         {"candidates", candidates.data(), {0, 2}}};
  CHECK_EQUAL(plain.score(stca::Request{inputs, {}, {}}).targets(), 0u);
  CHECK_EQUAL(runs.load(), 2);
}

TEST(serving_encodes_a_user_once_for_all_who_wait) {
  Gate gate;
  stca::Session session(golden("log"), gated(gate));
  const Log log;
  std::atomic<int> scored{0};
  std::atomic<std::size_t> hits{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      // The first brings the history; some of the others rely on its being encoded already.
      if (i > 0) gate.wait_for(1);
      const auto inputs = i % 2 == 0 ? log.all() : log.rest();
      const stca::Scores scores = session.score(stca::Request{inputs, "ann", "v1"});
      scored += static_cast<int>(scores.targets());
      hits += scores.hits();
    });
  }
  gate.wait_for(1);
  while (session.stats().hits + session.stats().misses < 5) std::this_thread::yield();
  gate.open();
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(gate.passed(), 1);
  CHECK_EQUAL(scored.load(), 16);
  CHECK_EQUAL(hits.load(), 7u);
  CHECK_EQUAL(session.stats().misses, 1u);
  CHECK_EQUAL(session.stats().hits, 7u);
}

TEST(serving_forgets_what_is_being_encoded) {
  Gate gate;
  stca::Session session(golden("log"), gated(gate));
  const Log log;
  std::thread running([&] { session.score(stca::Request{log.all(), "ann", "v1"}); });
  gate.wait_for(1);
  CHECK(session.forget("ann"));
  gate.open();
  running.join();
  CHECK_EQUAL(session.stats().users, 0u);
  CHECK_THROWS(session.score(stca::Request{log.rest(), "ann", "v1"}), stca::HistoryNeededError, "send the user inputs");
}

TEST(serving_makes_a_state_ahead_in_its_turn) {
  Gate gate;
  stca::Session session(golden("log"), gated(gate));  // no `threads`: one place
  const Log log;
  std::thread score([&] { session.score(stca::Request{log.all(), "ann", "v1"}); });
  gate.wait_for(1);
  CHECK_THROWS(session.warm("bob", log.all(), "v1", 0.02), stca::DeadlineError, "deadline");
  CHECK_THROWS(session.warm("bob", log.all(), "v1", 0), stca::DeadlineError, "deadline");
  bool kept = false;
  std::thread warm([&] { kept = session.warm("bob", log.all(), "v1"); });
  gate.open();
  score.join();
  warm.join();
  CHECK(kept);
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "bob", "v1"}).hits(), 1u);
  CHECK_EQUAL(session.stats().warmed, 1u);
  CHECK_EQUAL(session.stats().misses, 1u);
}

TEST(serving_joins_a_state_that_is_made_ahead) {
  Gate gate;
  stca::Session session(golden("log"), gated(gate));
  const Log log;
  std::thread warm([&] { session.warm("ann", log.all(), "v1"); });
  gate.wait_for(1);
  std::size_t hits = 0;
  std::thread score([&] { hits = session.score(stca::Request{log.rest(), "ann", "v1"}).hits(); });
  while (session.stats().hits == 0) std::this_thread::yield();
  gate.open();
  warm.join();
  score.join();
  CHECK_EQUAL(hits, 1u);
  CHECK_EQUAL(gate.passed(), 1);
  CHECK_EQUAL(session.stats().misses, 0u);
}

TEST(serving_lets_those_who_waited_try_themselves) {
  std::atomic<int> runs{0};
  Gate gate;
  stca::Session session(golden("log"), with(spec::maker([&](const std::string& graph) {
                          if (graph != "user_encoder") return;
                          const int run = runs++;
                          gate.pass();
                          if (run == 0) throw std::runtime_error("no memory");
                        })));
  const Log log;
  std::thread failing(
      [&] { CHECK_THROWS(session.score(stca::Request{log.all(), "ann", "v1"}), stca::EngineError, "no memory"); });
  gate.wait_for(1);
  std::thread waiting([&] { CHECK_EQUAL(session.score(stca::Request{log.all(), "ann", "v1"}).targets(), 2u); });
  std::thread relying([&] {
    try {
      session.score(stca::Request{log.rest(), "ann", "v1"});
    } catch (const stca::HistoryNeededError&) {  // if it came before the one who brought the history again
    }
  });
  while (session.stats().hits < 1) std::this_thread::yield();
  gate.open();
  failing.join(), waiting.join(), relying.join();
  CHECK_EQUAL(runs.load(), 2);
  CHECK_EQUAL(session.stats().misses, 2u);
  CHECK(session.stats().hits <= 1u);  // nobody hit what failed; at most the one who came for the second
}

TEST(serving_counts_encodings) {
  stca::Session session(golden("log"), with(spec::maker()));
  const Log log;
  for (int i = 0; i < 3; ++i) {
    try {
      session.score(stca::Request{log.rest(), "ann", "v1"});
      CHECK(!"scored without a history");
    } catch (const stca::RequestError& e) {
      CHECK_EQUAL(e.code(), STCA_HISTORY_NEEDED);
      CHECK_EQUAL(std::string(e.kind()), "history_needed");
    }
  }
  session.score(stca::Request{log.all(), "ann", "v1"});
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"}).hits(), 1u);
  CHECK_EQUAL(session.stats().misses, 1u);
  CHECK_EQUAL(session.stats().hits, 1u);
}

TEST(serving_keeps_as_the_options_say) {
  const Log log;
  stca::Options options = with(spec::maker());
  options.max_users = 2;
  stca::Session session(golden("log"), options);
  for (const char* user : {"ann", "bob", "cat"}) session.score(stca::Request{log.all(), user, "v1"});
  CHECK_EQUAL(session.stats().users, 2u);
  CHECK_EQUAL(session.stats().evictions, 1u);
  options.ttl_seconds = 1e-9;
  stca::Session forgetful(golden("log"), options);
  forgetful.score(stca::Request{log.all(), "cat", "v1"});
  CHECK_THROWS(forgetful.score(stca::Request{log.rest(), "cat", "v1"}), stca::HistoryNeededError, "cat");
  CHECK_EQUAL(forgetful.stats().expired, 1u);
  forgetful.score(stca::Request{log.all(), "cat", "v1"});
  CHECK_EQUAL(forgetful.stats().misses_expired, 1u);
}

TEST(serving_refuses_options_out_of_range) {
  const auto refused = [](const auto& set, const char* says) {
    stca::Options options = with(spec::maker());
    set(options);
    CHECK_THROWS(stca::Session(golden("log"), options), stca::UsageError, says);
  };
  refused([](auto& o) { o.threads = -5; }, "threads: is -5, expected a whole number from 0 to 1024");
  refused([](auto& o) { o.threads = 5000; }, "threads: is 5000, expected");
  refused([](auto& o) { o.max_targets = 0; }, "max_targets: is 0, expected a whole number from 1");
  refused([](auto& o) { o.cache_bytes = static_cast<std::uint64_t>(-1); }, "cache_bytes: is 18446744073709551615");
  refused([](auto& o) { o.max_users = static_cast<std::uint64_t>(-1); }, "max_users: is 1844");
  for (const double seconds : {-1.0, std::nan(""), HUGE_VAL}) {
    refused([&](auto& o) { o.ttl_seconds = seconds; }, ", expected seconds above 0, or 0 for no limit");
  }
}

TEST(serving_limits_targets) {
  const Log log;
  stca::Options options = with(spec::maker());
  options.max_targets = 3;
  stca::Session session(golden("log"), options);
  Log many;
  many.targets = {1, 2, 3, 4}, many.prices = std::vector<float>(8);
  CHECK_EQUAL(session.score(stca::Request{log.all(), "ann", "v1"}).targets(), 2u);
  CHECK_THROWS(session.score(stca::Request{many.all(), "ann", "v1"}), stca::RequestError,
               "target_item: has 4 targets, the limit is 3; send fewer at once, or load the session with max_targets");
  CHECK_THROWS(session.score({{log.all(), "ann", "v1"}, {log.all(), "bob", "v1"}}), stca::RequestError,
               "targets of all requests: has 4 targets, the limit is 3");
  CHECK_EQUAL(session.stats().users, 1u);
}

TEST(serving_limits_requests_of_a_batch) {
  stca::Session session(golden("log"), with(spec::maker()));
  const std::vector<std::int32_t> offsets((1 << 14) + 2);
  CHECK_THROWS(session.score(stca::RequestBatch{{{"history_offsets", offsets}, {"target_offsets", offsets}}, {}, {}}),
               stca::RequestError, "history_offsets: tells of 16385 requests, the limit is 16384; send fewer at once");
}

TEST(serving_compares_a_sent_history_with_the_kept_one) {
  const Log log;
  Log other;
  other.items.back() = 9;
  stca::Options options = with(spec::maker());
  options.check_versions = true;
  stca::Session session(golden("log"), options);
  session.score(stca::Request{log.all(), "ann", "v1"});
  CHECK_EQUAL(session.score(stca::Request{log.all(), "ann", "v1"}).hits(), 1u);
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"}).hits(), 1u);
  CHECK_THROWS(session.score(stca::Request{other.all(), "ann", "v1"}), stca::RequestError,
               "user 'ann': the history sent is not the one that is kept as version 'v1'; give each");
  CHECK_THROWS(session.warm("ann", other.all(), "v1"), stca::RequestError, "the history sent is not");
}

TEST(serving_counts_how_states_were_come_by) {
  const Log log;
  stca::Options options = with(spec::maker());
  options.max_users = 1;
  stca::Session session(golden("log"), options);
  session.score(stca::Request{log.all(), "ann", "v1"});
  session.score(stca::Request{log.all(), "ann", "v1"});
  session.score(stca::Request{log.all(), "ann", "v2"});
  session.score({{log.all(), "bob", "v1"}, {log.all(), "bob", "v1"}});
  session.score(stca::Request{log.all(), "ann", "v2"});
  session.swap(golden("log_other_weights"));
  session.score(stca::Request{log.all(), "ann", "v2"});
  const stca::CacheStats stats = session.stats();
  CHECK(stats.hits_memory == 1 && stats.hits_joined == 1 && stats.hits == 2);
  CHECK(stats.misses_new_user == 2 && stats.misses_version == 1 && stats.misses_evicted == 1);
  CHECK(stats.misses_weights == 1 && stats.misses == 5);
}

TEST(serving_keeps_the_models_own_type) {
  Copy copy(golden("plain"));
  for (const char* graph : {"request", "target_scorer"}) {
    copy.manifest["graphs"][graph]["outputs"].named("finish")["dtype"] = "float64";
  }
  const double third = 1.0 / 3;
  stca::Session session(copy.seal(), with(spec::maker({}, [&](const std::string&, std::size_t, std::size_t i) {
                          return static_cast<double>(i) + third;
                        })));
  const std::vector<float> clicks{1, 2}, candidates{1, 2, 3, 4};
  const std::vector<std::uint16_t> profile{0, 0, 0};
  const std::int32_t hour = 1;
  const stca::Scores scores = session.score(stca::Request{{{"clicks", clicks.data(), {1, 2}},
                                                           {"profile", STCA_FLOAT16, profile.data(), {3}},
                                                           {"hour", &hour, {}},
                                                           {"candidates", candidates.data(), {2, 2}}},
                                                          {},
                                                          {}});
  CHECK_EQUAL(scores.dtype(), STCA_FLOAT64);
  CHECK_EQUAL(scores.exact(1, 0), 1 + third);
  CHECK_EQUAL(scores.exact(0, 1), static_cast<double>(static_cast<float>(third)));  // of the float32 output beside it
  CHECK_EQUAL(scores(1, 0), static_cast<float>(1 + third));
}

TEST(serving_encodes_alone_what_cannot_be_parted) {
  Copy copy(golden("log"));
  const auto fix = [](Tree& tensor) { tensor["shape"] = Tree::List{7, 2}; };  // neither per token nor per user
  fix(copy.manifest["state"].named("token"));
  fix(copy.manifest["graphs"]["user_encoder"]["outputs"].named("token"));
  fix(copy.manifest["graphs"]["target_scorer"]["inputs"].named("token"));
  copy.manifest["appendable"] = false;
  int encoded = 0, scored = 0;
  stca::Session session(
      copy.seal(),
      with(spec::maker([&](const std::string& graph) { ++(graph == "user_encoder" ? encoded : scored); })));
  const Log log;
  const stca::Scores scores = session.score({{log.all(), "ann", "v1"}, {log.all(), "bob", "v1"}});
  CHECK_EQUAL(scores.targets(), 4u);
  CHECK(encoded == 2 && scored == 2);
}

TEST(serving_takes_a_precision_of_built_engines_alone) {
  stca::Options options;
  options.precision = "fp16";
  CHECK_THROWS(stca::Session(golden("log"), options), stca::UsageError,
               "precision: 'fp16' is of a built engine; say which with engine=");
  options.engine = "graphs";
  CHECK_THROWS(stca::Session(golden("log"), options), stca::UsageError, "say which with engine=");
  options.engine = "onnxruntime";
  CHECK_THROWS(stca::Session(golden("log"), options), stca::BuildError, "no onnxruntime fp16 engines that run here");
}

TEST(serving_leaves_nothing_behind_null_pointers) {
  // LeakSanitizer watches: what would have been handed out must not be made.
  stca_session* session = nullptr;
  CHECK_EQUAL(stca_bundle_load(golden("log").c_str(), nullptr), STCA_USAGE_ERROR);
  stca_options options;
  stca_options_init(&options);
  CHECK_EQUAL(stca_session_load(golden("log").c_str(), &options, nullptr), STCA_USAGE_ERROR);
  stca::Options toys = with(spec::maker());
  stca::Session owner(golden("log"), toys);
  CHECK(stca_bundle_path(nullptr) == nullptr && stca_bundle_weights(nullptr) == nullptr);
  CHECK(stca_scores_values(nullptr) == nullptr && stca_scores_targets(nullptr) == 0 && stca_scores_tasks(nullptr) == 0);
  CHECK(stca_outputs_allocate(nullptr, 0, 0, nullptr) == nullptr);
  CHECK_EQUAL(stca_session_bundle(session, nullptr), STCA_USAGE_ERROR);
  stca_options_init_sized(nullptr, 8);
}

TEST(serving_groups_no_digits) {
  struct Grouping : std::numpunct<char> {
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Grouping));
  stca::Session session(golden("log"), with(spec::maker()));
  Log log;
  log.targets = {123456, 1};
  CHECK_THROWS(session.score(stca::Request{log.all(), {}, {}}), stca::RequestError, "holds 123456 at [0]");
  std::locale::global(before);
}
