// What may become of a fuzzed call: done, or refused in one line with a code that says whose fault it is.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <string>

#include "stca/runtime.h"

namespace fuzz {

/// Random numbers of one round, which can be had again without the rounds before it.
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t round) {
    std::seed_seq both{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                       static_cast<std::uint32_t>(round), static_cast<std::uint32_t>(round >> 32)};
    engine_.seed(both);
  }
  /// In [0, n).
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(n)); }
  bool one_in(std::int64_t n) { return below(n) == 0; }
  template <class Items>
  auto& among(Items& items) {
    return items[static_cast<std::size_t>(below(static_cast<std::int64_t>(std::size(items))))];
  }

 private:
  std::mt19937_64 engine_;
};

/// How often each thing happened.
inline std::map<std::string, std::int64_t>& counts() {
  static std::map<std::string, std::int64_t> all;
  return all;
}
inline int wrong = 0;

/// Says what is wrong, and in which round, so that it can be had again.
inline void fail(const std::string& what) {
  std::cout << "WRONG " << what << std::endl;
  ++wrong;
}

/// Counts a call's end, and looks at what it said.
inline bool ended(const std::string& call, std::int32_t code) {
  const std::string kind = stca_code_kind(code);
  ++counts()[call + " " + kind];
  if (code == STCA_OK) return true;
  const std::string said = stca_last_error();
  bool one_line = !said.empty() && said.size() < 3700;
  for (const char c : said) one_line = one_line && static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
  if (!one_line) fail(call + ": not one line: " + said);
  if (kind == "internal" || kind == "other" || kind == "forked") fail(call + ": " + kind + ": " + said);
  return false;
}

int bundles(const std::string& golden, std::uint64_t seed, std::uint64_t first, std::uint64_t rounds);
int calls(const std::string& golden, std::uint64_t seed, std::uint64_t first, std::uint64_t rounds);

}  // namespace fuzz
