// What a target scorer gave, as scores.
#pragma once

#include <vector>

#include "engine.hpp"
#include "tensor.hpp"

namespace stca::core {

/// A model's outputs as one array of scores: the only output as it is, several side by side as columns.
Array scores_of(const std::vector<Array>& outputs);

/// Whether no number of it is infinite or none.
bool all_finite(const Array& output);

/// Throws EngineError, with the target, where a score of the engine's output `spec` is not finite.
void check_scores(const Engine& engine, const TensorSpec& spec, const Array& output);

}  // namespace stca::core
