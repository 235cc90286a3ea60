// Arrays that callers pass, for C++17. runtime.hpp includes it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "stca/errors.hpp"
#include "stca/runtime.h"

namespace stca {

namespace detail {

template <class T>
constexpr stca_dtype dtype_of() {
  if constexpr (std::is_same_v<T, bool>) return STCA_BOOL;
  if constexpr (std::is_same_v<T, std::int8_t>) return STCA_INT8;
  if constexpr (std::is_same_v<T, std::uint8_t>) return STCA_UINT8;
  if constexpr (std::is_same_v<T, std::int16_t>) return STCA_INT16;
  if constexpr (std::is_same_v<T, std::uint16_t>) return STCA_UINT16;
  if constexpr (std::is_same_v<T, std::int32_t>) return STCA_INT32;
  if constexpr (std::is_same_v<T, std::uint32_t>) return STCA_UINT32;
  if constexpr (std::is_same_v<T, std::int64_t>) return STCA_INT64;
  if constexpr (std::is_same_v<T, std::uint64_t>) return STCA_UINT64;
  if constexpr (std::is_same_v<T, float>) return STCA_FLOAT32;
  if constexpr (std::is_same_v<T, double>) return STCA_FLOAT64;
}
template <class T>
struct DTypeOf {
  static constexpr stca_dtype value = dtype_of<T>();
};

}  // namespace detail

/// A named array that someone else owns and keeps alive during the call it is passed to.
struct Tensor : stca_tensor {
  /// Any element type and shape; `data` is row-major.
  Tensor(const char* tensor_name, stca_dtype element, const void* values, const std::vector<std::int64_t>& sizes)
      : stca_tensor{tensor_name, values, element, static_cast<std::int32_t>(sizes.size()), {}} {
    if (sizes.size() > STCA_MAX_RANK) {
      throw RequestError(STCA_REQUEST_ERROR, std::string(tensor_name) + ": has too many axes");
    }
    std::copy(sizes.begin(), sizes.end(), shape);
  }
  template <class T>
  Tensor(const char* tensor_name, const T* values, std::initializer_list<std::int64_t> sizes)
      : Tensor(tensor_name, detail::DTypeOf<T>::value, values, sizes) {}
  /// One axis, as long as the vector.
  template <class T>
  Tensor(const char* tensor_name, const std::vector<T>& values)
      : Tensor(tensor_name, values.data(), {static_cast<std::int64_t>(values.size())}) {}
  template <class T>
  Tensor(const char* tensor_name, const std::vector<T>&& values) = delete;  // it would be gone before the call
};
static_assert(sizeof(Tensor) == sizeof(stca_tensor), "arrays of one must be arrays of the other");

}  // namespace stca
