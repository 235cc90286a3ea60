// A strict JSON reader for manifests (RFC 8259): no comments, no NaN, no duplicate names, UTF-8 only, bounded depth.
//
// Our own, because the library that servers embed has no dependencies, and because a manifest comes from outside: it
// must be read by something small enough to fuzz whole.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace stca::core {

/// What is not JSON, and where.
class JsonError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  struct Member;
  using List = std::vector<Json>;
  using Object = std::vector<Member>;  ///< in the order written; names are unique

  /// The one value in `text`. Throws JsonError.
  static Json parse(std::string_view text);

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  /// Pointer to the value when it is of this type, else null.
  const bool* boolean() const { return std::get_if<bool>(&value_); }
  const std::int64_t* integer() const { return std::get_if<std::int64_t>(&value_); }
  const std::string* string() const { return std::get_if<std::string>(&value_); }
  const List* list() const { return std::get_if<List>(&value_); }
  const Object* object() const { return std::get_if<Object>(&value_); }
  /// An integer or a number with a fraction or exponent; false otherwise.
  bool number(double& out) const;
  /// The member of this name of an object, else null.
  const Json* find(std::string_view name) const;

 private:
  friend class JsonReader;
  // A number is an integer when it is written as one and fits 64 bits.
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, List, Object> value_;
};

struct Json::Member {
  std::string name;
  Json value;
};

}  // namespace stca::core
