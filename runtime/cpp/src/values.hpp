// What callers send, as arrays whose values a model takes.
#pragma once

#include "bundle.hpp"
#include "tensor.hpp"

namespace stca::core {

/// The caller's tensor as an array that borrows its memory, if it can be one at all.
Array view_of(const stca_tensor& tensor);

/// An array of the input's kind in its own dtype, whatever its shape, once its values are found to be right. Not copied
/// where the dtype is right already.
Array checked(const TensorSpec& spec, const Array& raw);

/// Whether an array has this number in every place.
bool holds_only(const Array& array, std::int64_t value);

}  // namespace stca::core
