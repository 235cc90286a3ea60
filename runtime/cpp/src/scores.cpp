#include "scores.hpp"

#include <cmath>

#include "error.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

/// The type of several outputs side by side, as numpy promotes them.
DType common_type(const std::vector<Array>& outputs) {
  DType type = outputs[0].dtype;
  for (const Array& output : outputs) {
    if (output.dtype == type) continue;
    type = output.dtype == STCA_FLOAT64 || type == STCA_FLOAT64 ? STCA_FLOAT64 : STCA_FLOAT32;
  }
  return type;
}

/// Index of the first number that is not finite, or `count`.
template <class T>
std::size_t first_not_finite(const T* data, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (!std::isfinite(static_cast<double>(data[i]))) return i;
  }
  return count;
}

}  // namespace

Array scores_of(const std::vector<Array>& outputs) {
  if (outputs.size() == 1) return outputs[0];
  const DType type = common_type(outputs);
  const std::int64_t targets = outputs[0].shape[0];
  std::int64_t columns = 0;
  std::vector<Array> parts;
  for (const Array& output : outputs) {
    parts.push_back(converted(output, type));
    columns += static_cast<std::int64_t>(parts.back().row_bytes() / item_bytes(type));
  }
  auto [scores, to] = make_array(Memory::host(), type, {targets, columns});
  for (std::int64_t t = 0; t < targets; ++t) {
    for (const Array& part : parts) {
      const std::size_t bytes = part.row_bytes();
      Memory::host().copy(to, static_cast<const std::byte*>(part.data) + static_cast<std::size_t>(t) * bytes, bytes);
      to += bytes;
    }
  }
  return scores;
}

bool all_finite(const Array& output) {
  return visit_floating(output.dtype, [&](auto type) {
    const std::size_t count = output.shape.elements();
    return first_not_finite(static_cast<const decltype(type)*>(output.data), count) == count;
  });
}

void check_scores(const Engine& engine, const TensorSpec& spec, const Array& output) {
  visit_floating(output.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(output.data);
    const std::size_t count = output.shape.elements(), at = first_not_finite(data, count);
    if (at == count) return;
    const std::size_t row = output.row_bytes() / item_bytes(output.dtype);
    engine_error(shown(engine.name()), " gave ", shown(spec.name), " ", static_cast<double>(data[at]), " for target ",
                 at / row, "; scores must be finite: check the weights and the request's masks, or use an engine of a wider type");
  });
}

}  // namespace stca::core
