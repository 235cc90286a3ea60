// How long an answer is wanted, for C++17. runtime.hpp includes it.
#pragma once

#include <memory>

#include "stca/errors.hpp"

namespace stca {

/// Seconds from now in which an answer is of use, and a way to say earlier that it no longer is. Make it when the
/// request arrives, so that waiting in a queue counts. Copies are of one deadline.
class Deadline {
 public:
  /// 0 or less is over already, infinity is for ever. Throws UsageError when it is no number.
  Deadline(double seconds) {  // NOLINT: seconds are a deadline wherever one is taken
    stca_deadline* deadline = nullptr;
    detail::check(stca_deadline_make(seconds, &deadline));
    deadline_ = {deadline, stca_deadline_release};
  }
  /// One that is never over.
  static Deadline never() { return Deadline(); }
  /// The answer is not wanted any more: calls with this deadline end with a CancelledError, soon. From any thread.
  void cancel() {
    if (deadline_ != nullptr) detail::check(stca_deadline_cancel(deadline_.get()));
  }

 private:
  friend class Session;
  Deadline() = default;
  std::shared_ptr<stca_deadline> deadline_;
};

}  // namespace stca
