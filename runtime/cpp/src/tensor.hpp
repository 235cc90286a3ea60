// Element types, shapes and arrays: what requests bring, engines take and states are made of.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "stca/runtime.h"

namespace stca::core {

using DType = stca_dtype;

/// Bytes of one element.
std::size_t item_bytes(DType dtype);
/// numpy's name of the type.
const char* dtype_name(DType dtype);
/// The dtype of this name as manifests use it; false for any other name.
bool dtype_from_name(std::string_view name, DType& dtype);

enum class Kind { boolean, integer, floating };
Kind kind_of(DType dtype);

/// Sizes of up to STCA_MAX_RANK axes.
struct Shape {
  std::array<std::int64_t, STCA_MAX_RANK> sizes{};
  int rank = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> values) {
    for (std::int64_t n : values) sizes[static_cast<std::size_t>(rank++)] = n;
  }
  std::int64_t operator[](int axis) const { return sizes[static_cast<std::size_t>(axis)]; }
  std::int64_t& operator[](int axis) { return sizes[static_cast<std::size_t>(axis)]; }
  /// Whether an array of this shape can be: no size is negative, and its bytes can be counted.
  bool addressable(std::size_t item) const;
  /// Product of the sizes; 1 without axes. Whatever comes from outside was asked whether it is `addressable`.
  std::size_t elements() const {
    std::size_t n = 1;
    for (int i = 0; i < rank; ++i) n *= static_cast<std::size_t>((*this)[i]);
    return n;
  }
  /// "[3, 2]".
  std::string text() const;
  bool operator==(const Shape& other) const;
};

/// An array, row-major. `owner` keeps the memory alive; without one it is the caller's, valid during the call.
struct Array {
  DType dtype = STCA_INT64;
  Shape shape;
  const void* data = nullptr;
  std::shared_ptr<const void> owner;
  bool device = false;  ///< in the engine's own memory, not the host's

  std::size_t bytes() const { return shape.elements() * item_bytes(dtype); }
  /// Bytes of one row, that is of everything under the first axis.
  std::size_t row_bytes() const;
};

/// Where an engine keeps user states. Host memory by default; a GPU engine keeps them where it computes.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual bool device() const { return false; }
  virtual std::shared_ptr<void> allocate(std::size_t bytes);
  /// Copies within this memory; done when it returns.
  virtual void copy(void* to, const void* from, std::size_t bytes);

  static Memory& host();
};

/// A new array in `memory` and where to write it.
struct NewArray {
  Array array;
  std::byte* data;
};
NewArray make_array(Memory& memory, DType dtype, const Shape& shape);

/// `parts` one after the other along an axis. Throws RequestError, with `name`, when their other axes differ.
Array concatenate(Memory& memory, const std::string& name, const std::vector<const Array*>& parts, int axis = 0);

/// Rows `[begin, end)`, sharing the memory. Throws EngineError when the array has no such rows.
Array rows(const Array& array, std::int64_t begin, std::int64_t end);

/// The array as `wanted`, a type of the same kind; copied unless it is that already. The values were checked to fit.
Array converted(const Array& array, DType wanted);

/// Element `index` of an integer array.
std::int64_t integer_at(const Array& array, std::size_t index);

}  // namespace stca::core
