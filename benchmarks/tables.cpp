// Rows a second that the C++ runtime looks up in a bundle's only table: tables BUNDLE IDS BATCH TURNS
// IDS is a file of int64, which are looked up BATCH at a time; the first pass and the median of TURNS later ones are
// printed as JSON.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

#include "tables.hpp"

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: tables BUNDLE IDS BATCH TURNS\n";
    return 2;
  }
  const auto bundle = stca::core::Bundle::load(argv[1]);
  const auto sources = stca::core::row_sources(*bundle, {});
  const auto& table = bundle->manifest.tables.at(0);
  std::ifstream file(argv[2], std::ios::binary | std::ios::ate);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(file.tellg()) / sizeof(std::int64_t));
  file.seekg(0).read(reinterpret_cast<char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof ids[0]));
  const auto batch = static_cast<std::size_t>(std::atoll(argv[3]));
  const auto pass = [&] {
    const auto began = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < ids.size(); i += batch) {
      const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(i);
      sources.at(table.name)->rows(table, {begin, begin + static_cast<std::ptrdiff_t>(std::min(batch, ids.size() - i))});
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    return static_cast<double>(ids.size()) / seconds.count();
  };
  const double first = pass();
  std::vector<double> later;
  for (int turn = 0; turn < std::atoi(argv[4]); ++turn) later.push_back(pass());
  std::sort(later.begin(), later.end());
  std::cout << "{\"first_pass\": " << first << ", \"warm\": " << later.at(later.size() / 2) << "}\n";
}
