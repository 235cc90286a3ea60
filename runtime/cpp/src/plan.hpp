// What a manifest says of a TensorRT plan, and what follows from it for one run: sizes, profile, bytes.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "tensor.hpp"

namespace stca::core {

/// The size of each symbol in one run.
using Sizes = std::map<std::string, std::int64_t>;

/// The largest size of each symbol over all profiles.
Sizes largest_sizes(const EngineEntry& entry);

/// Throws BuildError when runs of this entry could not be sized: no profile, a size that varies and has no limit,
/// limits that contradict each other, an output whose size no input gives, tensors too large to be addressed.
void check_sizes(const EngineEntry& entry);

/// An entry's tensor in one run. Every symbol of it is in `sizes`: `check_sizes` has seen to that.
Shape shape_of(const TensorSpec& spec, const Sizes& sizes);
inline std::size_t bytes_of(const TensorSpec& spec, const Sizes& sizes) {
  return shape_of(spec, sizes).elements() * item_bytes(spec.dtype);
}

/// The sizes that a run's inputs have. Throws RequestError for another dtype or shape than the plan takes.
Sizes sizes_of(const EngineEntry& entry, const std::vector<Array>& inputs);

/// The tightest profile that admits these sizes. Throws RequestError naming the size and the limit.
int choose_profile(const EngineEntry& entry, const Sizes& sizes);

/// The size that `rows` is filled up to: a multiple of 16 and, from 64 on, one of four per power of two.
std::int64_t bucket(std::int64_t rows);
/// The sizes of a run with rows added in the plan's `padded` dimensions, as far as the profile goes.
Sizes filled_up(const EngineEntry& entry, Sizes sizes, int profile);

/// The plan's bytes. A plan is code to TensorRT: as they are when they are handed over, they must be those of the
/// manifest. Throws BundleError.
std::string read_plan(const Bundle& bundle, const EngineEntry& entry);

}  // namespace stca::core
