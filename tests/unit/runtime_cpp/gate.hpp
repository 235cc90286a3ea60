// Engines whose user encoder waits until a test lets it go.
#pragma once

#include <condition_variable>
#include <mutex>

#include "log_request.hpp"
#include "spec_engine.hpp"

/// Holds runs of the encoder until they are let go.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
    ++passed_;
  }
  void wait_for(int runs) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ >= runs; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  int passed() {
    const std::lock_guard lock(mutex_);
    return passed_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int waiting_ = 0, passed_ = 0;
};

inline stca::Options gated(Gate& gate) {
  return with(spec::maker([&gate](const std::string& graph) {
    if (graph == "user_encoder") gate.pass();
  }));
}
