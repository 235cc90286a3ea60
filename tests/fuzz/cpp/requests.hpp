// Random requests that fit a manifest, or nearly.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "outcome.hpp"
#include "stca/runtime.hpp"
#include "visit.hpp"

namespace fuzz {

/// Tensors, and the memory they borrow.
class Tensors {
 public:
  void add(const char* name, std::int32_t dtype, const std::vector<std::int64_t>& shape, std::int64_t limit,
           Random& random) {
    std::size_t bytes = stca_dtype_bytes(dtype);
    for (const std::int64_t n : shape) bytes *= static_cast<std::size_t>(n);
    // No byte more than the shape says: what is read beyond it shows.
    memory_.emplace_back(new unsigned char[bytes]);
    unsigned char* data = memory_.back().get();
    const std::size_t count = bytes / std::max<std::size_t>(stca_dtype_bytes(dtype), 1);
    for (std::size_t i = 0; i < count; ++i) put(dtype, data, i, limit, random);
    list.emplace_back(name, static_cast<stca_dtype>(dtype), data, shape);
  }
  void add_offsets(const char* name, std::int32_t dtype, const std::vector<std::int64_t>& counts) {
    const std::size_t item = stca_dtype_bytes(dtype);
    memory_.emplace_back(new unsigned char[item * (counts.size() + 1)]);
    std::int64_t sum = 0;
    for (std::size_t i = 0; i <= counts.size(); ++i) {
      std::memcpy(memory_.back().get() + i * item, &sum, item);  // little-endian
      if (i < counts.size()) sum += counts[i];
    }
    list.emplace_back(name, static_cast<stca_dtype>(dtype), memory_.back().get(),
                      std::vector<std::int64_t>{static_cast<std::int64_t>(counts.size()) + 1});
  }
  std::vector<stca::Tensor> list;

 private:
  static void put(std::int32_t dtype, unsigned char* data, std::size_t i, std::int64_t limit, Random& random) {
    const bool odd = random.one_in(200);
    const auto type = static_cast<stca_dtype>(dtype);
    if (dtype == STCA_BOOL) {
      data[i] = static_cast<unsigned char>(random.below(2));
    } else if (dtype >= STCA_FLOAT16 && dtype <= STCA_FLOAT64) {
      const double value =
          odd ? 1e300 * static_cast<double>(random.below(2)) / 0.5 : static_cast<double>(random.below(17) - 8) / 4;
      stca::core::visit_floating(type, [&](auto t) {
        const auto x = stca::core::from_double<decltype(t)>(value);
        std::memcpy(data + i * sizeof x, &x, sizeof x);
      });
    } else {
      const std::int64_t value = odd ? random.below(1 << 20) - 4 : random.below(limit > 0 ? limit : 4);
      stca::core::visit_integer(type, [&](auto t) {
        const auto x = static_cast<decltype(t)>(value);
        std::memcpy(data + i * sizeof x, &x, sizeof x);
      });
    }
  }
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
};

/// One request's inputs of some scopes: sizes are small and agree with each other, but for one in some.
inline void fill(const std::vector<stca_tensor_spec>& specs, int scopes, Random& random, Tensors& to,
                 bool events = false) {
  std::map<std::string, std::int64_t> sizes{{"B", 1}};
  const bool no_targets = random.one_in(6);
  for (const stca_tensor_spec& spec : specs) {
    if ((spec.scope & scopes) == 0) continue;
    if (spec.rank == 1 && spec.symbol[0] != nullptr && std::string(spec.symbol[0]) == "B_plus_1") continue;
    if (events && (spec.rank < 1 || spec.symbol[0] == nullptr || std::string(spec.symbol[0]) != "N_h")) continue;
    std::vector<std::int64_t> shape;
    for (int axis = 0; axis < spec.rank; ++axis) {
      if (spec.symbol[axis] == nullptr) {
        shape.push_back(std::min<std::int64_t>(spec.shape[axis], 64));
      } else {
        const std::string symbol = spec.symbol[axis];
        shape.push_back(sizes.emplace(symbol, symbol == "N_t" && no_targets ? 0 : random.below(6)).first->second);
      }
      if (random.one_in(60)) shape.back() = random.below(5);
    }
    if (random.one_in(60)) continue;
    const std::int32_t dtype = random.one_in(60) ? static_cast<std::int32_t>(random.below(13)) : spec.dtype;
    to.add(spec.name, dtype, shape, spec.limit, random);
  }
}

/// Several requests as flat rows with offsets.
inline void fill_batch(const std::vector<stca_tensor_spec>& specs, std::int64_t count, Random& random, Tensors& to) {
  std::vector<std::int64_t> tokens, targets;
  std::map<std::string, std::int64_t> sizes{{"B", count}, {"N_h", 0}, {"N_t", 0}};
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(random.below(5)), targets.push_back(random.below(4));
    sizes["N_h"] += tokens.back(), sizes["N_t"] += targets.back();
  }
  for (const stca_tensor_spec& spec : specs) {
    const std::string first = spec.rank > 0 && spec.symbol[0] != nullptr ? spec.symbol[0] : "";
    if (spec.rank == 1 && first == "B_plus_1" && spec.dtype >= STCA_INT32 && spec.dtype <= STCA_INT64) {
      to.add_offsets(spec.name, spec.dtype, spec.scope == STCA_USER ? tokens : targets);
      continue;
    }
    std::vector<std::int64_t> shape;
    for (int axis = 0; axis < spec.rank; ++axis) {
      const char* symbol = spec.symbol[axis];
      shape.push_back(symbol == nullptr ? std::min<std::int64_t>(spec.shape[axis], 64)
                                        : sizes.emplace(symbol, random.below(4)).first->second);
      if (random.one_in(80)) shape.back() = random.below(6);
    }
    to.add(spec.name, spec.dtype, shape, spec.limit, random);
  }
}

}  // namespace fuzz
