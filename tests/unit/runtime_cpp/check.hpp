// The few lines of a test framework these tests need: named tests, checks that
// go on, and a way to expect an error.
#pragma once

#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int failures = 0;

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

template <class... Parts>
void fail(const char* file, int line, const Parts&... parts) {
  ++failures;
  std::cerr << file << ":" << line << ": ";
  (std::cerr << ... << parts) << "\n";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// Runs every test whose name starts with `prefix`; the exit status for main.
inline int run(const std::string& prefix) {
  int ran = 0;
  for (const Test& test : tests()) {
    if (std::string(test.name).rfind(prefix, 0) != 0) continue;
    const int before = failures;
    try {
      test.body();
    } catch (const std::exception& e) {
      fail(test.name, 0, "threw: ", e.what());
    }
    ++ran;
    std::cout << (failures == before ? "ok   " : "FAIL ") << test.name << "\n";
  }
  if (ran == 0) fail(prefix.c_str(), 0, "no such test");
  return failures == 0 ? 0 : 1;
}

/// A folder that is gone when the object is.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    path_ = std::filesystem::temp_directory_path() / ("stca-test-" + std::to_string(std::random_device{}()));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace check

#define TEST(name)                                             \
  static void name();                                          \
  static const check::Register name##_registered(#name, name); \
  static void name()

#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, "not true: " #condition)

#define CHECK_EQUAL(got, expected)                                                       \
  do {                                                                                   \
    const auto check_got = (got);                                                        \
    const auto check_expected = (expected);                                              \
    if (!(check_got == check_expected))                                                  \
      check::fail(__FILE__, __LINE__, #got " is ", check_got, ", not ", check_expected); \
  } while (false)

/// The statement throws `type`, and its message contains `part`.
#define CHECK_THROWS(statement, type, part)                                                            \
  try {                                                                                                \
    statement;                                                                                         \
    check::fail(__FILE__, __LINE__, "did not throw: " #statement);                                     \
  } catch (const type& check_error) {                                                                  \
    if (!check::contains(check_error.what(), part))                                                    \
      check::fail(__FILE__, __LINE__, "\"", check_error.what(), "\" does not contain \"", part, "\""); \
  }
