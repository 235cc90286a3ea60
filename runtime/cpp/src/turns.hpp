// Who computes when: scores at once, states made ahead only while a processor is free.
#pragma once

#include <condition_variable>
#include <mutex>

#include "deadline.hpp"

namespace stca::core {

/// Counts calls that compute. Safe to share between threads.
class Turns {
 public:
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
    /// Begins once fewer calls compute than there are places. Throws what the deadline does when that comes too late.
    Turn(Turns& turns, const Deadline& deadline) : turns_(turns) {
      std::unique_lock lock(turns_.mutex_);
      deadline.wait(turns_.free_, lock, [&] { return turns_.running_ < turns_.places_; });
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

 private:
  const int places_;
  std::mutex mutex_;
  std::condition_variable free_;
  int running_ = 0;
};

}  // namespace stca::core
