// stca_fuzz bundles|calls GOLDEN SEED FIRST ROUNDS: rounds FIRST to FIRST + ROUNDS - 1, each of which depends on SEED
// and its own number alone. Writes the number of each round before it begins, and at the end what happened how often.
#include <cstdlib>
#include <iostream>
#include <string>

#include "outcome.hpp"

int main(int argc, char** argv) {
  const std::string what = argc == 6 ? argv[1] : "";
  if (what != "bundles" && what != "calls") {
    std::cerr << "usage: stca_fuzz bundles|calls GOLDEN SEED FIRST ROUNDS\n";
    return 2;
  }
  const auto number = [&](int i) { return std::strtoull(argv[i], nullptr, 10); };
  (what == "bundles" ? fuzz::bundles : fuzz::calls)(argv[2], number(3), number(4), number(5));
  for (const auto& [name, count] : fuzz::counts()) std::cout << "count " << count << " " << name << "\n";
  std::cout << "done, " << fuzz::wrong << " wrong\n";
  return fuzz::wrong == 0 ? 0 : 1;
}
