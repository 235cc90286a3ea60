#include "tensor.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "error.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

struct TypeRow {
  DType dtype;
  const char* name;
  std::size_t bytes;
  Kind kind;
  bool in_manifests;
};

// Indexed by the dtype's value.
constexpr TypeRow types[] = {
    {STCA_BOOL, "bool", 1, Kind::boolean, true},        {STCA_INT8, "int8", 1, Kind::integer, true},
    {STCA_UINT8, "uint8", 1, Kind::integer, true},      {STCA_INT16, "int16", 2, Kind::integer, true},
    {STCA_INT32, "int32", 4, Kind::integer, true},      {STCA_INT64, "int64", 8, Kind::integer, true},
    {STCA_FLOAT16, "float16", 2, Kind::floating, true}, {STCA_BFLOAT16, "bfloat16", 2, Kind::floating, true},
    {STCA_FLOAT32, "float32", 4, Kind::floating, true}, {STCA_FLOAT64, "float64", 8, Kind::floating, true},
    {STCA_UINT16, "uint16", 2, Kind::integer, false},   {STCA_UINT32, "uint32", 4, Kind::integer, false},
    {STCA_UINT64, "uint64", 8, Kind::integer, false},   {STCA_FLOAT8_E4M3, "float8_e4m3fn", 1, Kind::floating, true},
};

}  // namespace

std::size_t item_bytes(DType dtype) { return types[dtype].bytes; }
const char* dtype_name(DType dtype) { return types[dtype].name; }
Kind kind_of(DType dtype) { return types[dtype].kind; }

bool dtype_from_name(std::string_view name, DType& dtype) {
  for (const TypeRow& row : types) {
    if (row.in_manifests && name == row.name) {
      dtype = row.dtype;
      return true;
    }
  }
  return false;
}

std::string Shape::text() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + std::to_string((*this)[i]);
  return text + "]";
}

bool Shape::operator==(const Shape& other) const {
  return rank == other.rank && std::equal(sizes.begin(), sizes.begin() + rank, other.sizes.begin());
}

bool Shape::addressable(std::size_t item) const {
  auto left = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) / item;
  for (int i = 0; i < rank; ++i) {
    const std::int64_t n = (*this)[i];
    if (n < 0 || static_cast<std::uint64_t>(n) > left) return false;
    if (n > 0) left /= static_cast<std::uint64_t>(n);
  }
  return true;
}

std::size_t Array::row_bytes() const {
  std::size_t bytes = item_bytes(dtype);
  for (int i = 1; i < shape.rank; ++i) bytes *= static_cast<std::size_t>(shape[i]);
  return bytes;
}

std::shared_ptr<void> Memory::allocate(std::size_t bytes) {
  return {::operator new(std::max<std::size_t>(bytes, 1)), [](void* p) { ::operator delete(p); }};
}

void Memory::copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

Memory& Memory::host() {
  static Memory memory;
  return memory;
}

NewArray make_array(Memory& memory, DType dtype, const Shape& shape) {
  std::shared_ptr<void> data = memory.allocate(shape.elements() * item_bytes(dtype));
  auto* bytes = static_cast<std::byte*>(data.get());
  return {Array{dtype, shape, bytes, std::move(data), memory.device()}, bytes};
}

Array concatenate(Memory& memory, const std::string& name, const std::vector<const Array*>& parts, int axis) {
  Shape shape = parts.front()->shape;
  shape[axis] = 0;
  for (const Array* part : parts) {
    Shape like = part->shape;
    shape[axis] += like[axis];
    like[axis] = shape[axis];
    if (!(like == shape)) {
      request_error(name, ": has rows of shape ", part->shape.text(), " beside ", parts.front()->shape.text(),
                    "; requests computed together must agree in all but their first axis");
    }
  }
  std::size_t pieces = 1;  // of each part: one for each place on the axes before
  for (int i = 0; i < axis; ++i) pieces *= static_cast<std::size_t>(shape[i]);
  auto [joined, to] = make_array(memory, parts.front()->dtype, shape);
  for (std::size_t piece = 0; piece < pieces; ++piece) {
    for (const Array* part : parts) {
      const std::size_t bytes = part->bytes() / pieces;
      memory.copy(to, static_cast<const std::byte*>(part->data) + piece * bytes, bytes);
      to += bytes;
    }
  }
  return joined;
}

Array rows(const Array& array, std::int64_t begin, std::int64_t end) {
  if (array.shape.rank < 1 || begin < 0 || end < begin || array.shape[0] < end) {
    engine_error("an array of shape ", array.shape.text(), " has no rows ", begin, " to ", end);
  }
  Array part = array;
  part.shape[0] = end - begin;
  // No arithmetic on the null pointer of an array without elements.
  if (begin > 0)
    part.data = static_cast<const std::byte*>(array.data) + static_cast<std::size_t>(begin) * array.row_bytes();
  return part;
}

Array converted(const Array& array, DType wanted) {
  if (array.dtype == wanted) return array;
  NewArray made = make_array(Memory::host(), wanted, array.shape);
  const std::size_t count = array.shape.elements();
  const auto each = [&](auto from_type, auto to_type, auto change) {
    const auto* from = static_cast<const decltype(from_type)*>(array.data);
    auto* to = reinterpret_cast<decltype(to_type)*>(made.data);
    for (std::size_t i = 0; i < count; ++i) to[i] = change(from[i]);
  };
  if (kind_of(wanted) == Kind::floating) {
    visit_floating(array.dtype, [&](auto from) {
      visit_floating(wanted, [&](auto to) {
        each(from, to, [](auto x) { return from_double<decltype(to)>(static_cast<double>(x)); });
      });
    });
  } else {
    visit_integer(array.dtype, [&](auto from) {
      visit_integer(wanted, [&](auto to) { each(from, to, [](auto x) { return static_cast<decltype(to)>(x); }); });
    });
  }
  return made.array;
}

std::int64_t integer_at(const Array& array, std::size_t index) {
  return visit_integer(array.dtype, [&](auto type) {
    return static_cast<std::int64_t>(static_cast<const decltype(type)*>(array.data)[index]);
  });
}

}  // namespace stca::core
