// Libraries that are looked for when an engine is asked for, not when the program starts: one build of this library
// serves with and without a GPU.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "error.hpp"

namespace stca::core {

/// A shared library, loaded for as long as the program runs.
class Library {
 public:
  /// `variable` names an environment variable that may give another path. Throws BuildError when it cannot be loaded.
  Library(const char* file, const char* variable) {
    const char* path = std::getenv(variable);
    name_ = path != nullptr && *path != '\0' ? path : file;
    handle_ = ::dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
      const char* why = ::dlerror();
      fail(STCA_BUILD_ERROR, name_, " cannot be loaded (", why == nullptr ? "no reason given" : why,
           "); install it, or set ", variable, " to its path");
    }
  }

  /// The function of this name.
  template <class Function>
  Function get(const char* function) const {
    void* address = ::dlsym(handle_, function);
    if (address == nullptr) fail(STCA_BUILD_ERROR, name_, " has no ", function, "; install a newer one");
    return reinterpret_cast<Function>(address);
  }

 private:
  std::string name_;
  void* handle_;
};

/// What a library says, on one line and cut, so that it leaves room for our words.
inline std::string said(const std::string& text) {
  std::istringstream words(text);
  words.imbue(std::locale::classic());
  std::string line, word;
  while (words >> word && line.size() < 300) line += (line.empty() ? "" : " ") + word;
  return line.substr(0, 300);
}

}  // namespace stca::core
