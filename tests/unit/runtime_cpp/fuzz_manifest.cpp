// Feeds mutated manifests to the parser: each is read or refused with an error,
// and never anything else.
//
// With clang, `-fsanitize=fuzzer` and -DSTCA_LIBFUZZER this is a libFuzzer
// target. Otherwise it has a main of its own that mutates a seed file:
// fuzz_manifest MANIFEST [ROUNDS [SEED]].
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>

#include "bundle.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "request.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto manifest = stca::core::Manifest::parse({reinterpret_cast<const char*>(data), size});
    const stca::core::Door door(manifest, manifest.max_history, false, stca::core::most_targets);
    return 0;
  } catch (const stca::core::Error& e) {
    if (e.code != STCA_BUNDLE_ERROR || std::string(e.what()).empty()) std::abort();
    return 0;
  }
}

#ifndef STCA_LIBFUZZER
namespace {

/// One to four random edits: what a flipped bit, a lost block, a bad merge or
/// someone with an idea would do.
std::string mutated(std::string text, std::mt19937& random) {
  static const std::string pieces[] = {"{",        "}",      "[",    "]",        ",",       ":",
                                       "\"",       "null",   "true", "-1",       "1e999",   "18446744073709551616",
                                       "\\ud800",  "\xff",   "0",    "99999999", "\"N_h\"", "\"B_plus_1\"",
                                       "[[[[[[[[", "{\"a\":"};
  for (auto edits = 1 + random() % 4; edits > 0 && !text.empty(); --edits) {
    const std::size_t at = random() % text.size(), length = 1 + random() % 40;
    switch (random() % 6) {
      case 0: text[at] = static_cast<char>(random()); break;
      case 1: text[at] = static_cast<char>(text[at] ^ (1 << random() % 8)); break;
      case 2: text.erase(at, length); break;
      case 3: text.insert(at, pieces[random() % std::size(pieces)]); break;
      case 4: text.insert(at, text.substr(random() % text.size(), length)); break;
      default:
        if (random() % 8 == 0)
          text.resize(at);
        else
          text.replace(at, 1, pieces[random() % std::size(pieces)]);
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: fuzz_manifest MANIFEST [ROUNDS [SEED]]\n";
    return 2;
  }
  std::ifstream in(argv[1], std::ios::binary);
  const std::string seed{std::istreambuf_iterator<char>(in), {}};
  if (seed.empty()) return 2;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 10000;
  std::mt19937 random(argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1);
  int read = 0;
  for (int i = 0; i < rounds; ++i) {
    const std::string text = mutated(seed, random);
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
    try {
      stca::core::Manifest::parse(text);
      ++read;
    } catch (const stca::core::Error&) {
    }
  }
  std::cout << rounds << " mutated manifests, " << read << " of them still manifests\n";
  return 0;
}
#endif
