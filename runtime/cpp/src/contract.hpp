// What a bundle's parts must agree on before any of them runs: the request's inputs, the two halves, the state between
// them, and what an engine says of itself.
#pragma once

#include <string>
#include <vector>

#include "bundle.hpp"

namespace stca::core {

/// Throws BundleError naming the first tensor of a manifest that contradicts another.
void check_contract(const Manifest& manifest);

/// What an engine takes and gives, in its own words; -1 and no symbol where it leaves a size open.
struct Signature {
  std::vector<TensorSpec> inputs, outputs;
};

/// What an engine in a bundle takes and gives: its half's graph with states in the engine's precision and, where it
/// serves one request per run, with the sizes of one.
GraphSpec as_built(const Manifest& manifest, const EngineEntry& entry);

/// Holds what the manifest says of one graph, `promised`, against what the engine made of it says. `who` names the
/// engine. With `may_leave_out` it may lack inputs: those that nothing in it reads. Throws BundleError.
void check_signature(const std::string& who, const GraphSpec& promised, const Signature& found,
                     bool may_leave_out = false, const std::string& remedy = "export the bundle again");

}  // namespace stca::core
