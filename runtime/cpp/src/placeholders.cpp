// Values that no caller sent, for what does not depend on them, and the one that stands for no event.
#include <algorithm>
#include <cstring>

#include "request.hpp"
#include "values.hpp"
#include "visit.hpp"

namespace stca::core {

Array placeholder(const TensorSpec& spec, std::int64_t tokens) {
  Shape shape;
  for (const Axis& axis : spec.shape) shape[shape.rank++] = axis.symbol.empty() ? axis.size : 1;
  if (spec.rows_are(tokens_symbol)) shape[0] = tokens;
  auto [made, data] = make_array(Memory::host(), spec.dtype, shape);
  std::memset(data, 0, made.bytes());
  std::int64_t least = spec.low.value_or(0);
  if (spec.blank == least) ++least;
  if (least != 0 && kind_of(spec.dtype) == Kind::integer) {
    visit_integer(spec.dtype, [&, data = data](auto type) {
      auto* values = reinterpret_cast<decltype(type)*>(data);
      std::fill(values, values + shape.elements(), static_cast<decltype(type)>(least));
    });
  }
  return made;
}

void Door::make_up(std::int64_t tokens, Row& row) const {
  std::vector<Array> values;
  std::vector<stca_tensor> given;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const TensorSpec& spec = inputs_[i];
    if (spec.scope == STCA_USER || offsets_[i]) continue;
    const Array& array = values.emplace_back(placeholder(spec, tokens));
    const Shape& shape = array.shape;
    stca_tensor& tensor = given.emplace_back(stca_tensor{spec.name.c_str(), array.data, spec.dtype, shape.rank, {}});
    std::copy_n(shape.sizes.begin(), shape.rank, tensor.shape);
  }
  admit({given.data(), given.size()}, STCA_REQUEST | STCA_TARGET, 0, row);
  for (Array& array : row.arrays) {  // which point into `values`
    for (const Array& value : values) {
      if (array.data == value.data) array.owner = value.owner;
    }
  }
}

const TensorSpec* Door::only_blank(const Row& row) const {
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const std::optional<std::int64_t>& blank = inputs_[i].blank;
    if (!blank || row.arrays[i].data == nullptr || row.arrays[i].shape.elements() == 0) continue;
    if (holds_only(row.arrays[i], *blank)) return &inputs_[i];
  }
  return nullptr;
}

}  // namespace stca::core
