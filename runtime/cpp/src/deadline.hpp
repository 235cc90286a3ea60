// How long an answer is wanted: looked at before work begins and between its stages, never within an engine's run.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "error.hpp"

namespace stca::core {

/// Seconds from now in which an answer is of use, and a way to say earlier that it no longer is. Safe to share between
/// threads.
class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  /// So many from now: 0 or less is over already, infinity is for ever. Throws UsageError when it is no number.
  explicit Deadline(double seconds) {
    if (std::isnan(seconds)) fail(STCA_USAGE_ERROR, "deadline: is nan, expected seconds from now");
    const double limit = std::max(seconds, 0.0);
    // Beyond a year, the clock's own range might be.
    if (limit < 3e7) until_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(limit));
  }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;

  /// One that is never over, and that nobody can cancel.
  static const Deadline& never() {
    static const Deadline none;
    return none;
  }

  /// The answer is not wanted any more: calls with this deadline end with a CancelledError, soon.
  void cancel() { cancelled_ = true; }

  /// Throws CancelledError or DeadlineError when the answer is not wanted any more.
  void check() const {
    if (cancelled_) {
      fail(STCA_CANCELLED_ERROR, "the call was cancelled; what was computed for it so far is kept as a user state");
    }
    if (until_ && Clock::now() >= *until_) {
      fail(STCA_DEADLINE_ERROR,
           "the deadline passed before the answer was there; allow more time, or send less at once");
    }
  }

  /// Waits for `changed` until `done`; throws, with the lock held, when the answer is not wanted any more before that.
  template <class Done>
  void wait(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Done done) const {
    while (!done()) {
      check();
      if (!can_end_) {
        changed.wait(lock);
        continue;
      }
      // Whoever cancels notifies nobody: so often it is looked at.
      const auto look = Clock::now() + std::chrono::milliseconds(20);
      changed.wait_until(lock, until_ && *until_ < look ? *until_ : look);
    }
  }

 private:
  Deadline() : can_end_(false) {}

  std::optional<Clock::time_point> until_;
  bool can_end_ = true;
  std::atomic<bool> cancelled_{false};
};

}  // namespace stca::core
