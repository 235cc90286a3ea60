// Who computes when: scores at once, states made ahead only while a processor is free.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "error.hpp"

namespace stca::core {

/// Counts calls that compute. Safe to share between threads.
class Turns {
 public:
  using Until = std::optional<std::chrono::steady_clock::time_point>;

  /// `places`: how many calls compute side by side before they slow each other down.
  explicit Turns(int places) : places_(places) {}

  /// A call that computes, while this lives.
  class Turn {
   public:
    /// Begins at once.
    explicit Turn(Turns& turns) : turns_(turns) {
      const std::lock_guard lock(turns_.mutex_);
      ++turns_.running_;
    }
    /// Begins once fewer calls compute than there are places. Throws DeadlineError when that comes after `until`.
    Turn(Turns& turns, Until until) : turns_(turns) {
      std::unique_lock lock(turns_.mutex_);
      const auto free = [&] { return turns_.running_ < turns_.places_; };
      if (!until) {
        turns_.free_.wait(lock, free);
      } else if (!turns_.free_.wait_until(lock, *until, free)) {
        late();
      }
      ++turns_.running_;
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
      {
        const std::lock_guard lock(turns_.mutex_);
        --turns_.running_;
      }
      turns_.free_.notify_one();
    }

   private:
    Turns& turns_;
  };

  [[noreturn]] static void late() {
    fail(STCA_DEADLINE_ERROR, "the deadline passed before the answer was there; allow more time, or send less at once");
  }

 private:
  const int places_;
  std::mutex mutex_;
  std::condition_variable free_;
  int running_ = 0;
};

}  // namespace stca::core
