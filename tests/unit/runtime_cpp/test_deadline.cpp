// Answers that are not wanted any more, and all calls at once from many threads.
#include <atomic>
#include <cmath>
#include <random>
#include <thread>

#include "check.hpp"
#include "gate.hpp"
#include "log_request.hpp"
#include "toy_engine.hpp"

TEST(deadline_keeps_a_state_that_was_made) {
  stca::Deadline deadline(HUGE_VAL);
  int scored = 0;
  stca::Session session(golden("log"), with(spec::maker([&](const std::string& graph) {
                          graph == "user_encoder" ? deadline.cancel() : void(++scored);
                        })));
  const Log log;
  CHECK_THROWS(session.score(stca::Request{log.all(), "ann", "v1"}, deadline), stca::CancelledError, "kept as a user");
  CHECK_EQUAL(scored, 0);
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"}).hits(), 1u);
  CHECK_EQUAL(scored, 1);
  // Nothing is looked at for a deadline that is over, not even what is wrong.
  CHECK_THROWS(session.score(stca::Request{{}, "ann", "v1"}, deadline), stca::CancelledError, "cancelled");
  CHECK_THROWS(session.score(stca::RequestBatch{}, 0), stca::DeadlineError, "deadline");
  CHECK_THROWS(session.warm("bob", log.all(), "v1", -1), stca::DeadlineError, "deadline");
  CHECK_THROWS(stca::Deadline(std::nan("")), stca::UsageError, "deadline: is nan");
  stca::Deadline never = stca::Deadline::never();
  never.cancel();  // nobody's
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"}, never).targets(), 2u);
  CHECK_EQUAL(stca_deadline_cancel(nullptr), STCA_USAGE_ERROR);
  CHECK_EQUAL(stca_deadline_make(1, nullptr), STCA_USAGE_ERROR);
  stca_deadline_release(nullptr);
}

TEST(deadline_keeps_the_states_of_the_runs_before) {
  stca::Deadline deadline(HUGE_VAL);
  int encoded = 0;
  stca::Session session(golden("log"), with(spec::maker([&](const std::string& graph) {
                          if (graph != "user_encoder") return;
                          ++encoded;
                          deadline.cancel();
                        })));
  Log log;
  log.items.assign(6, 1), log.actions.assign(6, 1);
  std::vector<stca::Request> requests;
  for (int i = 0; i < 100; ++i) requests.push_back({log.all(), std::to_string(i), "v1"});
  CHECK_THROWS(session.score(requests, deadline), stca::CancelledError, "cancelled");
  CHECK_EQUAL(encoded, 1);
  CHECK_EQUAL(session.stats().users, 42u);  // of 6 tokens each: no more than 256 in a run
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "0", "v1"}).hits(), 1u);
  CHECK_EQUAL(session.score(stca::Request{log.all(), "99", "v1"}).hits(), 0u);
  CHECK_EQUAL(encoded, 2);
}

TEST(deadline_ends_waiting_for_another_call) {
  Gate gate;
  stca::Session session(golden("log"), gated(gate));
  const Log log;
  std::thread first([&] { session.score(stca::Request{log.all(), "ann", "v1"}); });
  gate.wait_for(1);
  stca::Deadline deadline(HUGE_VAL);
  std::thread waiting([&] {
    CHECK_THROWS(session.score(stca::Request{log.rest(), "ann", "v1"}, deadline), stca::CancelledError, "cancelled");
  });
  while (session.stats().hits_joined < 1) std::this_thread::yield();
  CHECK_THROWS(session.score(stca::Request{log.rest(), "ann", "v1"}, 0.001), stca::DeadlineError, "deadline");
  std::thread warming(
      [&] { CHECK_THROWS(session.warm("bob", log.all(), "v1", deadline), stca::CancelledError, "cancelled"); });
  deadline.cancel();
  waiting.join(), warming.join();
  CHECK_EQUAL(session.stats().hits, 0u);
  gate.open();
  first.join();
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"}).hits(), 1u);
  CHECK_EQUAL(gate.passed(), 1);
}

TEST(threads_make_all_calls_at_once) {
  // ThreadSanitizer looks at this one, too: CONTRIBUTING.md says how.
  stca::Options options = with(toy::maker());
  options.max_users = 5;
  options.threads = 1;
  stca::Session session(golden("log"), options);
  std::atomic<int> wrong{0}, scored{0};
  const auto serve = [&](unsigned seed) {
    std::mt19937 random(seed);
    const Log log;
    const std::vector<std::int64_t> nine{9}, zero{0};
    const std::vector<stca::Tensor> event{{"history_item", nine}, {"history_action", zero}};
    for (int i = 0; i < 200; ++i) {
      const std::string user = std::to_string(random() % 8);
      stca::Deadline deadline(random() % 4 == 0 ? 1e-4 : 100);
      if (random() % 8 == 0) deadline.cancel();
      try {
        switch (random() % 7) {
          case 0: session.forget(user); break;
          case 1: session.append(user, event, "longer", "v1"); break;
          case 2: session.amend(user, event, "other", 0, "v1"); break;
          case 3: session.warm(user, log.all(), "v1", deadline); break;
          case 4: wrong += session.stats().users > 5 ? 1 : 0; break;
          default: {
            const float score = session.score(stca::Request{log.all(), user, "v1"}, deadline)(0, 0);
            wrong += score == log.first_score() || score == log.first_score(1000) ? 0 : 1;
            ++scored;
          }
        }
      } catch (const stca::DeadlineError&) {
      } catch (const stca::CancelledError&) {
      } catch (const std::exception& e) {
        ++wrong;
        std::cerr << e.what() << "\n";
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) threads.emplace_back(serve, t);
  for (int i = 0; i < 6; ++i) session.swap(golden(i % 2 == 0 ? "log_other_weights" : "log"));
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(wrong.load(), 0);
  CHECK(scored.load() > 100);
}
