// The one exception inside the library; at the C ABI it becomes its code and its message.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "stca/runtime.h"

namespace stca::core {

class Error : public std::runtime_error {
 public:
  Error(stca_code kind, const std::string& message) : std::runtime_error(message), code(kind) {}
  const stca_code code;
};

template <class... Parts>
[[noreturn]] void fail(stca_code code, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(code, message.str());
}

template <class... Parts>
[[noreturn]] void request_error(const Parts&... parts) {
  fail(STCA_REQUEST_ERROR, parts...);
}

template <class... Parts>
[[noreturn]] void bundle_error(const Parts&... parts) {
  fail(STCA_BUNDLE_ERROR, parts...);
}

}  // namespace stca::core
