// Events that wait beside a sum: nothing is lost that a request, another append or a failure meets on the way.
#include <atomic>
#include <functional>
#include <thread>
#include <utility>

#include "check.hpp"
#include "gate.hpp"
#include "log_request.hpp"
#include "resealed.hpp"
#include "spec_engine.hpp"

using resealed::Copy;
using resealed::Tree;

namespace {

/// A history of the bundle of sums, and what a request brings besides.
struct Clicks {
  std::vector<std::int64_t> clicks, recent{1, 2};
  std::int64_t hour = 9;
  std::vector<float> candidates{1, 0.5};
  explicit Clicks(std::vector<std::int64_t> of) : clicks(std::move(of)) {}
  std::vector<stca::Tensor> history() const {
    return {{"clicks", clicks.data(), {static_cast<std::int64_t>(clicks.size())}}, {"recent", recent.data(), {2}}};
  }
  std::vector<stca::Tensor> rest() const {
    return {{"hour", &hour, {1}}, {"candidates", candidates.data(), {2}}};
  }
  std::vector<stca::Tensor> all() const {
    std::vector<stca::Tensor> both = history();
    for (const stca::Tensor& one : rest()) both.push_back(one);
    return both;
  }
};

}  // namespace

TEST(serving_finishes_a_state_once_for_all_who_ask) {
  Gate gate;
  std::atomic<bool> fails{false};
  stca::Session session(golden("sums"), with(spec::maker([&](const std::string& graph) {
                          if (graph != "user_grower") return;
                          gate.pass();
                          if (fails) throw std::runtime_error("no memory");
                        })));
  const Clicks old({3, 4}), one({5});
  session.score(stca::Request{old.all(), "ann", "v1"});
  CHECK(session.append("ann", one.history(), "v2"));
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] { CHECK_EQUAL(session.score(stca::Request{one.rest(), "ann", "v2"}).targets(), 2u); });
  }
  gate.wait_for(1);
  while (session.stats().hits < 6) std::this_thread::yield();
  gate.open();
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(gate.passed(), 1);
  // What cannot be finished goes, and the history makes it anew.
  CHECK(session.append("ann", one.history(), "v3"));
  fails = true;
  CHECK_THROWS(session.score(stca::Request{one.rest(), "ann", "v3"}), stca::EngineError, "no memory");
  CHECK_THROWS(session.score(stca::Request{one.rest(), "ann", "v3"}), stca::HistoryNeededError, "send the user inputs");
  CHECK_EQUAL(session.score(stca::Request{old.all(), "ann", "v3"}).targets(), 2u);
}

TEST(serving_loses_no_event_to_a_request_that_finishes_the_state) {
  Copy copy(golden("sums"));
  copy.manifest["max_history"] = Tree();
  std::function<void()> meanwhile = [] {};
  stca::Session session(copy.seal(), with(spec::maker([&](const std::string& graph) {
                          if (graph == "user_grower") std::exchange(meanwhile, [] {})();
                        })));
  const Clicks old({3, 4}), one({5}), many(std::vector<std::int64_t>(300, 6));
  session.score(stca::Request{old.all(), "ann", "v1"});
  CHECK(session.append("ann", one.history(), "v2"));
  meanwhile = [&] { session.score(stca::Request{one.rest(), "ann", "v2"}); };
  CHECK(session.append("ann", many.history(), "v3", "v2"));
  CHECK_EQUAL(session.score(stca::Request{one.rest(), "ann", "v3"}).targets(), 2u);
  CHECK_EQUAL(session.stats().appends, 2u);
  CHECK_EQUAL(session.stats().state_bytes, 303u * 8 + 2 * 4);
  // What is forgotten meanwhile stays so, and whoever made it ahead is told.
  CHECK(session.append("ann", one.history(), "v4"));
  meanwhile = [&] { session.forget("ann"); };
  CHECK(!session.warm("ann", {}, "v4"));
  CHECK_EQUAL(session.stats().users, 0u);
}
