// Calls a function with the C++ type of a dtype.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "error.hpp"

namespace stca::core {

/// The two 16-bit floats, as their bits. C++17 has no arithmetic on them; they pass through double.
template <int MantissaBits>
struct SmallFloat {
  std::uint16_t bits;

  static constexpr int exponent_bits = 15 - MantissaBits;
  static constexpr int bias = (1 << (exponent_bits - 1)) - 1;

  explicit operator double() const {
    const int exponent = (bits >> MantissaBits) & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << MantissaBits) - 1);
    double value;
    if (exponent == (1 << exponent_bits) - 1) {
      value = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      value = std::ldexp(mantissa, 1 - bias - MantissaBits);
    } else {
      value = std::ldexp(mantissa + (1 << MantissaBits), exponent - bias - MantissaBits);
    }
    return (bits & 0x8000) != 0 ? -value : value;
  }

  /// Rounds to nearest, ties to even, as the default rounding mode of nearbyint does.
  static SmallFloat from(double value) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const int infinite = ((1 << exponent_bits) - 1) << MantissaBits;
    const double size = std::fabs(value);
    if (std::isnan(value)) return {static_cast<std::uint16_t>(sign | infinite | 1)};
    if (std::isinf(value)) return {static_cast<std::uint16_t>(sign | infinite)};
    int exponent = 1 - bias;  // that of subnormal numbers
    if (size >= std::ldexp(1.0, exponent)) exponent = std::ilogb(size);
    if (exponent > bias) return {static_cast<std::uint16_t>(sign | infinite)};
    // Rounding may carry into the exponent; as the fields are adjacent, adding does the right thing.
    const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, MantissaBits - exponent)));
    const int encoded = ((exponent + bias - 1) << MantissaBits) + mantissa;
    return {static_cast<std::uint16_t>(sign | (encoded < infinite ? encoded : infinite))};
  }
};
using Float16 = SmallFloat<10>;
using BFloat16 = SmallFloat<7>;

/// `f(T{})` for an integer dtype; an error for any other.
template <class F>
decltype(auto) visit_integer(stca_dtype dtype, F&& f) {
  switch (dtype) {
    case STCA_INT8: return f(std::int8_t{});
    case STCA_UINT8: return f(std::uint8_t{});
    case STCA_INT16: return f(std::int16_t{});
    case STCA_UINT16: return f(std::uint16_t{});
    case STCA_INT32: return f(std::int32_t{});
    case STCA_UINT32: return f(std::uint32_t{});
    case STCA_INT64: return f(std::int64_t{});
    case STCA_UINT64: return f(std::uint64_t{});
    default: fail(STCA_INTERNAL_ERROR, "dtype number ", static_cast<int>(dtype), " is taken for integers");
  }
}

/// `f(T{})` for a floating-point dtype; an error for any other.
template <class F>
decltype(auto) visit_floating(stca_dtype dtype, F&& f) {
  switch (dtype) {
    case STCA_FLOAT16: return f(Float16{});
    case STCA_BFLOAT16: return f(BFloat16{});
    case STCA_FLOAT32: return f(float{});
    case STCA_FLOAT64: return f(double{});
    default: fail(STCA_INTERNAL_ERROR, "dtype number ", static_cast<int>(dtype), " is taken for floating point");
  }
}

template <class T>
T from_double(double value) {
  return static_cast<T>(value);
}
template <>
inline Float16 from_double<Float16>(double value) {
  return Float16::from(value);
}
template <>
inline BFloat16 from_double<BFloat16>(double value) {
  return BFloat16::from(value);
}

}  // namespace stca::core
