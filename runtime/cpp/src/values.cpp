#include "values.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "error.hpp"
#include "text.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

// Most values of one input: far more than any model is asked, and few enough to look at each.
constexpr std::size_t most_values = std::size_t{1} << 27;

/// Index of the first element outside [low, high], or `count`.
template <class T>
std::size_t first_outside(const T* data, std::size_t count, std::int64_t low, std::uint64_t high) {
  if (!std::is_signed_v<T> && low < 0) low = 0;
  // Both limits in one comparison: counted from `low`, what lies below it wraps round to above `span`.
  const auto base = static_cast<std::uint64_t>(low), span = high - base;
  const auto outside = [&](T x) {
    return static_cast<std::uint64_t>(
               static_cast<std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>>(x)) -
               base >
           span;
  };
  bool any = false;
  for (std::size_t i = 0; i < count; ++i) any |= outside(data[i]);  // without a branch, this is what the hot path pays
  if (!any) return count;
  std::size_t i = 0;
  while (!outside(data[i])) ++i;
  return i;
}

/// "[1, 0]", the place of an element counted row by row.
std::string place_of(std::size_t index, const Shape& shape) {
  Shape place = shape;
  for (int i = shape.rank - 1; i >= 0; --i) {
    place[i] = static_cast<std::int64_t>(index % static_cast<std::size_t>(shape[i]));
    index /= static_cast<std::size_t>(shape[i]);
  }
  return place.text();
}

/// `array` is what `given` became in the model's type: a float64 can be finite and yet too large for it.
void check_floats(const TensorSpec& spec, const Array& array, const Array& given) {
  const double low = spec.low ? static_cast<double>(*spec.low) : -std::numeric_limits<double>::infinity();
  visit_floating(array.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(array.data);
    for (std::size_t i = 0, count = array.shape.elements(); i < count; ++i) {
      const auto own = static_cast<double>(data[i]);
      const bool finite = std::isfinite(own);
      if (finite && own >= low) continue;
      visit_floating(given.dtype, [&](auto given_type) {
        using Wide = std::conditional_t<std::is_same_v<decltype(given_type), float>, float, double>;
        const auto value = static_cast<Wide>(static_cast<const decltype(given_type)*>(given.data)[i]);
        const std::string must = finite ? "it must be at least " + std::to_string(*spec.low)
                                        : std::string("values must be finite as ") + dtype_name(spec.dtype);
        request_error(spec.name, ": holds ", number_text(value), " at ", place_of(i, array.shape), "; ", must);
      });
    }
  });
}

void check_range(const TensorSpec& spec, const Array& array) {
  if (spec.limit == 0 && !spec.low && array.dtype == spec.dtype) return;
  std::int64_t least = 0;
  std::uint64_t most = 0;
  visit_integer(spec.dtype, [&](auto type) {  // beyond its type a value would be another one
    least = static_cast<std::int64_t>(std::numeric_limits<decltype(type)>::min());
    most = static_cast<std::uint64_t>(std::numeric_limits<decltype(type)>::max());
  });
  const std::int64_t low = spec.low ? std::max(least, *spec.low) : spec.limit == 0 ? least : std::max<std::int64_t>(least, 0);
  const std::uint64_t high = spec.limit > 0 ? std::min(most, static_cast<std::uint64_t>(spec.limit - 1)) : most;
  visit_integer(array.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(array.data);
    const std::size_t count = array.shape.elements(), at = first_outside(data, count, low, high);
    if (at == count) return;
    const bool below = data[at] < 0 ? static_cast<std::int64_t>(data[at]) < low
                                    : low > 0 && static_cast<std::uint64_t>(data[at]) < static_cast<std::uint64_t>(low);
    // A limit that is the type's alone tells nobody anything.
    std::string allowed = "in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
    if (!below && low == least && high < most) allowed = "at most " + std::to_string(high);
    if (below && high == most && low > least) allowed = "at least " + std::to_string(low);
    request_error(spec.name, ": holds ", +data[at], " at ", place_of(at, array.shape), "; it must be ", allowed);
  });
}

}  // namespace

Array view_of(const stca_tensor& tensor) {
  if (tensor.dtype < STCA_BOOL || tensor.dtype > STCA_UINT64) {
    request_error(tensor.name, ": has dtype number ", tensor.dtype, ", which is none of stca_dtype");
  }
  if (tensor.rank < 0 || tensor.rank > STCA_MAX_RANK) {
    request_error(tensor.name, ": has ", tensor.rank, " axes, the limit is ", STCA_MAX_RANK);
  }
  Array array;
  array.dtype = static_cast<DType>(tensor.dtype);
  array.data = tensor.data;
  array.shape.rank = tensor.rank;
  for (int i = 0; i < tensor.rank; ++i) array.shape[i] = tensor.shape[i];
  const std::size_t item = item_bytes(array.dtype);
  if (!array.shape.addressable(item)) {
    request_error(tensor.name, ": has shape ", array.shape.text(), "; no array has this shape");
  }
  if (array.shape.elements() > most_values) {
    request_error(tensor.name, ": has shape ", array.shape.text(), ", more than ", most_values,
                  " values; send fewer at once");
  }
  if (array.shape.elements() > 0) {
    if (tensor.data == nullptr) request_error(tensor.name, ": has shape ", array.shape.text(), " but no data");
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % item != 0) {
      request_error(tensor.name, ": its data is not aligned to the ", item, " bytes of a ",
                    dtype_name(array.dtype));
    }
  }
  return array;
}

bool holds_only(const Array& array, std::int64_t value) {
  const std::size_t count = array.shape.elements();
  const auto only = [&](auto type, auto number) {
    const auto* data = static_cast<const decltype(type)*>(array.data);
    return std::all_of(data, data + count, [&](auto x) { return static_cast<decltype(number)>(x) == number; });
  };
  switch (kind_of(array.dtype)) {
    case Kind::boolean: return only(std::uint8_t{}, value);
    case Kind::integer: return visit_integer(array.dtype, [&](auto type) { return only(type, value); });
    case Kind::floating:
      return visit_floating(array.dtype, [&](auto type) { return only(type, static_cast<double>(value)); });
  }
  return false;
}

Array checked(const TensorSpec& spec, const Array& raw) {
  const bool any = raw.shape.elements() > 0;
  if (any && kind_of(spec.dtype) == Kind::integer) check_range(spec, raw);
  Array fitting = converted(raw, spec.dtype);
  if (any && kind_of(spec.dtype) == Kind::floating) check_floats(spec, fitting, raw);
  return fitting;
}

}  // namespace stca::core
