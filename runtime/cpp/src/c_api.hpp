// What the files of the C ABI share: the handles, and how an exception becomes a code and a message.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "error.hpp"
#include "session.hpp"
#include "stca/runtime.h"

struct stca_bundle {
  std::shared_ptr<const stca::core::Bundle> bundle;
  std::string path;
};
struct stca_session {
  stca::core::Session session;
};
struct stca_deadline {
  stca::core::Deadline deadline;
};
struct stca_scores {
  stca::core::Array own;     // in the model's type
  stca::core::Array values;  // as float32
  std::size_t hits;
};
/// What one run of a caller's engine has given so far.
struct stca_outputs {
  const stca::core::GraphSpec& graph;
  std::vector<stca::core::Array> arrays;
  std::vector<bool> allocated;
  stca_code code = STCA_OK;
  std::string message;
};

namespace stca::core {

/// Of the last call of this thread that failed.
std::string& last_error() noexcept;

/// Leaves the message for stca_last_error and returns the code.
int32_t failed(int32_t code, const char* message) noexcept;

/// Runs `f` and returns its code; no exception leaves the library.
template <class F>
int32_t guarded(F&& f) noexcept {
  try {
    f();
    return STCA_OK;
  } catch (const Error& e) {
    return failed(e.code, e.what());
  } catch (const std::bad_alloc&) {
    return failed(STCA_INTERNAL_ERROR, "out of memory; lower cache_bytes or send smaller requests");
  } catch (const std::exception& e) {
    return failed(STCA_INTERNAL_ERROR, e.what());
  } catch (...) {
    return failed(STCA_INTERNAL_ERROR, "an engine threw something that is no std::exception");
  }
}

template <class T>
T& given(T* pointer, const char* what) {
  if (pointer == nullptr) fail(STCA_USAGE_ERROR, what, " is a null pointer");
  return *pointer;
}

/// A caller's options, whichever fields they know; their engines behind the library's own interface.
Options options_of(const stca_options* given_options);

/// Bytes of the options as programs know them that were compiled before they grew.
constexpr std::size_t first_options_size = offsetof(stca_options, cuda_graphs);

}  // namespace stca::core
