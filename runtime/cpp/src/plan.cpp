#include "plan.hpp"

#include <algorithm>

#include "digest.hpp"
#include "error.hpp"

namespace stca::core {
namespace {

[[noreturn]] void refuse(const EngineEntry& entry, const std::string& why) {
  fail(STCA_BUILD_ERROR, entry.file, " cannot be served: ", why, "; run `stca build --engine tensorrt` again");
}

/// Whether the tensor's bytes can be counted at all.
bool addressable(const TensorSpec& spec, const Sizes& largest) {
  return shape_of(spec, largest).addressable(item_bytes(spec.dtype));
}

}  // namespace

Sizes largest_sizes(const EngineEntry& entry) {
  Sizes largest;
  for (const Profile& profile : entry.profiles) {
    for (const auto& [symbol, limits] : profile) largest[symbol] = std::max(largest[symbol], limits.second);
  }
  return largest;
}

void check_sizes(const EngineEntry& entry) {
  if (entry.profiles.empty()) refuse(entry, "it has no profiles");
  for (const Profile& profile : entry.profiles) {
    for (const auto& [symbol, limits] : profile) {
      if (limits.first < 0 || limits.first > limits.second) refuse(entry, "a profile has no sizes for " + symbol);
    }
  }
  Sizes given;
  for (const auto* specs : {&entry.spec.inputs, &entry.spec.outputs}) {
    const bool output = specs == &entry.spec.outputs;
    for (const TensorSpec& spec : *specs) {
      for (const auto& [size, symbol] : spec.shape) {
        if (symbol.empty()) continue;
        if (output && given.count(symbol) == 0) refuse(entry, "no input has the " + symbol + " rows of " + spec.name);
        given[symbol] = 0;
        const bool limited = std::all_of(entry.profiles.begin(), entry.profiles.end(),
                                         [&symbol = symbol](const Profile& p) { return p.count(symbol) != 0; });
        if (!limited) refuse(entry, "a profile says nothing of " + symbol);
      }
    }
  }
  const Sizes largest = largest_sizes(entry);
  for (const auto* specs : {&entry.spec.inputs, &entry.spec.outputs}) {
    for (const TensorSpec& spec : *specs) {
      if (!addressable(spec, largest)) refuse(entry, spec.name + " is larger than any memory");
    }
  }
}

Shape shape_of(const TensorSpec& spec, const Sizes& sizes) {
  Shape shape;
  for (const Axis& axis : spec.shape) shape[shape.rank++] = axis.symbol.empty() ? axis.size : sizes.at(axis.symbol);
  return shape;
}

Sizes sizes_of(const EngineEntry& entry, const std::vector<Array>& inputs) {
  Sizes sizes;
  for (std::size_t i = 0; i < entry.spec.inputs.size(); ++i) {
    const TensorSpec& spec = entry.spec.inputs[i];
    const Array& array = inputs[i];
    bool fits = array.dtype == spec.dtype && array.shape.rank == static_cast<int>(spec.shape.size());
    for (int k = 0; fits && k < array.shape.rank; ++k) {
      const Axis& axis = spec.shape[static_cast<std::size_t>(k)];
      const std::int64_t n = array.shape[k];
      fits = n == (axis.symbol.empty() ? axis.size : sizes.emplace(axis.symbol, n).first->second);
    }
    if (!fits) {
      request_error(spec.name, ": has shape ", array.shape.text(), " of ", dtype_name(array.dtype),
                    ", the engine takes ", spec.shape_text(), " of ", dtype_name(spec.dtype),
                    entry.requests == 1 ? " and serves one request per run" : "");
    }
  }
  return sizes;
}

int choose_profile(const EngineEntry& entry, const Sizes& sizes) {
  int best = -1;
  double best_volume = 0;
  for (std::size_t p = 0; p < entry.profiles.size(); ++p) {
    bool fits = true;
    double volume = 1;
    for (const auto& [symbol, limits] : entry.profiles[p]) {
      const auto size = sizes.find(symbol);
      fits = fits && (size == sizes.end() || (limits.first <= size->second && size->second <= limits.second));
      volume *= static_cast<double>(limits.second);
    }
    if (!fits || (best >= 0 && volume >= best_volume)) continue;
    best = static_cast<int>(p);
    best_volume = volume;
  }
  if (best >= 0) return best;
  const Sizes largest = largest_sizes(entry);
  for (const auto& [symbol, size] : sizes) {
    if (const auto most = largest.find(symbol); most != largest.end() && size > most->second) {
      request_error(symbol, " is ", size, ", ", entry.file, " was built for at most ", most->second,
                    "; send less, or build for more");
    }
  }
  request_error("no profile of ", entry.file, " admits this request's sizes; build with a profile for them");
}

std::int64_t bucket(std::int64_t rows) {
  std::int64_t step = 16;
  while (8 * step < rows) step *= 2;
  return (rows + step - 1) / step * step;
}

Sizes filled_up(const EngineEntry& entry, Sizes sizes, int profile) {
  const Profile& limits = entry.profiles[static_cast<std::size_t>(profile)];
  for (const std::string& symbol : entry.padded) {
    if (const auto size = sizes.find(symbol); size != sizes.end()) {
      size->second = std::min(bucket(size->second), limits.at(symbol).second);
    }
  }
  return sizes;
}

std::string read_plan(const Bundle& bundle, const EngineEntry& entry) {
  const auto file = bundle.manifest.files.find(entry.file);
  if (file == bundle.manifest.files.end()) {
    bundle_error(entry.file, ": is not among the manifest's files; build the engine again");
  }
  std::string plan;
  bundle.folder->read(entry.file, [&](std::string_view piece) { plan += piece; });
  Sha256 digest;
  digest.update(plan);
  if (digest.hex() != file->second.sha256) bundle_error(shown(entry.file), " was changed; copy the bundle again");
  return plan;
}

}  // namespace stca::core
