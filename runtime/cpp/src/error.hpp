// The one exception inside the library; at the C ABI it becomes its code and its message.
#pragma once

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "stca/runtime.h"
#include "text.hpp"

namespace stca::core {

/// Others' text in a message: cut, so that it leaves room for ours.
inline std::string shown(std::string_view text) {
  std::size_t most = 100;
  if (text.size() <= most) return std::string(text);
  while (most > 90 && (static_cast<unsigned char>(text[most]) & 0xC0) == 0x80) --most;  // no half of a character
  return std::string(text.substr(0, most)) + "…";
}
inline std::string shown(const char* text) { return text == nullptr ? "(null)" : shown(std::string_view(text)); }

class Error : public std::runtime_error {
 public:
  Error(stca_code kind, const std::string& message) : std::runtime_error(one_line(message)), code(kind) {}
  const stca_code code;
};

template <class... Parts>
[[noreturn]] void fail(stca_code code, const Parts&... parts) {
  std::ostringstream message;
  message.imbue(std::locale::classic());  // the program's own may group digits
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

template <class... Parts>
[[noreturn]] void engine_error(const Parts&... parts) {
  fail(STCA_ENGINE_ERROR, parts...);
}

}  // namespace stca::core
