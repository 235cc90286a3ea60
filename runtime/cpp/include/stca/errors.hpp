// The errors of stca runtime for C++17, as exceptions. runtime.hpp includes it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "stca/runtime.h"

namespace stca {

/// Base of all errors raised on purpose: one line, what is wrong and what to do about it.
class StcaError : public std::runtime_error {
 public:
  StcaError(std::int32_t code, const std::string& message) : std::runtime_error(message), code_(code) {}
  /// A value of stca_code.
  std::int32_t code() const noexcept { return code_; }
  /// What a program decides by: "history_needed", "bad_request", "bad_bundle", "build", "engine", …
  const char* kind() const noexcept { return stca_code_kind(code_); }

 private:
  std::int32_t code_;
};
/// An engine cannot be made or cannot load a graph.
struct BuildError : StcaError { using StcaError::StcaError; };
/// A bundle on disk is missing, damaged, too new, or not a bundle.
struct BundleError : StcaError { using StcaError::StcaError; };
/// A request was refused at the door; the message names the field, the value and the limit.
struct RequestError : StcaError { using StcaError::StcaError; };
/// No state of the user's history version is kept, and the request did not bring the history: send it.
struct HistoryNeededError : RequestError { using RequestError::RequestError; };
/// The time that an answer was wanted for is over.
struct DeadlineError : StcaError { using StcaError::StcaError; };
/// The caller no longer wants the answer.
struct CancelledError : StcaError { using StcaError::StcaError; };
/// An engine failed on inputs that passed the door: out of memory, a broken kernel. The request may be right.
struct EngineError : StcaError { using StcaError::StcaError; };
/// This library was called wrongly: an option out of its range, an index too large.
struct UsageError : StcaError { using StcaError::StcaError; };

namespace detail {

inline void check(std::int32_t code) {
  if (code == STCA_OK) return;
  const std::string message = stca_last_error();
  switch (code) {
    case STCA_BUILD_ERROR: throw BuildError(code, message);
    case STCA_BUNDLE_ERROR: throw BundleError(code, message);
    case STCA_REQUEST_ERROR: throw RequestError(code, message);
    case STCA_ENGINE_ERROR: throw EngineError(code, message);
    case STCA_HISTORY_NEEDED: throw HistoryNeededError(code, message);
    case STCA_DEADLINE_ERROR: throw DeadlineError(code, message);
    case STCA_CANCELLED_ERROR: throw CancelledError(code, message);
    case STCA_USAGE_ERROR: throw UsageError(code, message);
    default: throw StcaError(code, message);
  }
}

}  // namespace detail
}  // namespace stca
