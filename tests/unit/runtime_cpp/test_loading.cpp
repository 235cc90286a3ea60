// Loading beside the world: others that replace the bundle, a process that forks, ONNX Runtime's own habits.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <set>
#include <thread>

#include "check.hpp"
#include "log_request.hpp"
#include "toy_engine.hpp"

namespace fs = std::filesystem;

namespace {

bool forked = false;  // in a child, which leaves to the system what its parent's threads hold

/// Puts one of two bundles and then the other in one place, as fast as it can: by exchanging them, or by copying each
/// anew and removing the last one.
class Replacing {
 public:
  explicit Replacing(bool anew) : anew_(anew) {
    fs::copy(golden("log"), place());
    fs::copy(golden("log_other_weights"), folder_.path() / "aside");
    thread_ = std::thread([this] { run(); });
  }
  ~Replacing() {
    stop_ = true;
    thread_.join();
  }
  std::string place() const { return (folder_.path() / "bundle").string(); }
  int times() const { return times_; }

 private:
  void run() {
    const fs::path aside = folder_.path() / "aside", between = folder_.path() / "between";
    while (!stop_) {
      ++times_;
      if (anew_) {
        fs::remove_all(aside);
        fs::copy(golden(times_ % 2 == 0 ? "log" : "log_other_weights"), aside);
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      fs::rename(place(), between);
      fs::rename(aside, place());
      fs::rename(between, aside);
    }
  }

  check::TemporaryFolder folder_;
  bool anew_;
  std::atomic<bool> stop_{false};
  std::atomic<int> times_{0};
  std::thread thread_;
};

/// Loads until both bundles were seen, and how often; each time encoder, scorer and digest must be one bundle's.
void load_while_replaced(bool anew, const stca::Options& options) {
  const std::string first = stca::Bundle(golden("log")).weights();
  Replacing replacing(anew);
  std::set<std::string> seen;
  int loaded = 0;
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while ((loaded < 15 || seen.size() < 2) && std::chrono::steady_clock::now() < give_up) {
    try {
      stca::Session session(replacing.place(), options);
      const std::string weights = session.bundle().weights();
      const float score = session.score(stca::Request{Log().all(), {}, {}})(0, 0);
      CHECK_EQUAL(score, Log().first_score(weights == first ? 0 : 1000));
      seen.insert(weights);
      ++loaded;
    } catch (const stca::BundleError& e) {  // for a moment there is none, or it never came to rest
      const std::string why = e.what();
      CHECK(check::contains(why, "no such bundle") || check::contains(why, "again and again"));
    }
  }
  CHECK(loaded >= 15);
  CHECK_EQUAL(seen.size(), 2u);
  CHECK(replacing.times() > 10);
}

}  // namespace

extern "C" int __lsan_is_turned_off() { return forked ? 1 : 0; }

TEST(loading_takes_one_bundle_while_another_is_put_in_its_place) { load_while_replaced(false, with(toy::maker())); }

#ifdef STCA_WITH_ONNXRUNTIME
TEST(loading_into_onnxruntime_takes_one_bundle) {
  if (std::getenv("STCA_ONNXRUNTIME_LIBRARY") == nullptr) return;
  stca::Options options;
  options.engine = "graphs";
  options.threads = 1;
  load_while_replaced(false, options);
  load_while_replaced(true, options);
}

#endif

TEST(loading_before_a_fork_is_told_in_the_child) {
  std::vector<stca::Options> kinds{with(toy::maker())};
#ifdef STCA_WITH_ONNXRUNTIME
  if (std::getenv("STCA_ONNXRUNTIME_LIBRARY") != nullptr) {
    kinds.emplace_back().engine = "graphs";
    kinds.back().threads = 2;  // a pool, whose threads the child lacks
  }
#endif
  for (const stca::Options& options : kinds) {
    auto session = std::make_unique<stca::Session>(golden("log"), options);
    const Log log;
    session->score(stca::Request{log.all(), "ann", "v1"});
    std::cout << std::flush;  // or the child would print it again
    const pid_t child = ::fork();
    if (child == 0) {
      forked = true;
      int told = 0;
      const auto refused = [&](auto&& call) {
        try {
          call();
        } catch (const stca::StcaError& e) {
          told += e.code() == STCA_FORKED_ERROR && check::contains(e.what(), "in each child") ? 1 : 0;
        }
      };
      refused([&] { session->score(stca::Request{log.rest(), "ann", "v1"}); });
      refused([&] { session->append("ann", log.events(), "v2"); });
      refused([&] { session->forget("ann"); });
      refused([&] { session->swap(golden("log")); });
      refused([&] { session->stats(); });
      session.reset();
      stca::Session own(golden("log"), with(toy::maker()));
      told += own.score(stca::Request{log.all(), "ann", "v1"})(0, 0) == log.first_score() ? 1 : 0;
      std::exit(told);  // as a program ends, with all that runs then
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK_EQUAL(WEXITSTATUS(status), 6);
    CHECK_EQUAL(session->score(stca::Request{log.rest(), "ann", "v1"})(0, 0), log.first_score());
  }
}
