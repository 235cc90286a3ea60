// Reads the fields of a manifest's JSON objects, and names the place of what is not as it should be.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "bundle.hpp"
#include "error.hpp"
#include "json.hpp"

namespace stca::core {

inline constexpr const char* manifest_name = "manifest.json";

[[noreturn]] inline void malformed(const std::string& why) {
  bundle_error(manifest_name, " is malformed (", why, "); export the bundle again");
}

/// Reads the fields of one JSON object; complaints name the place, as in "graphs.request.inputs[2].dtype".
class Fields {
 public:
  Fields(const Json& json, std::string place) : json_(json), place_(std::move(place)) {
    if (json.object() == nullptr) malformed(place_ + " must be an object");
  }

  const Json& get(const char* name) const {
    const Json* found = json_.find(name);
    if (found == nullptr) bundle_error(manifest_name, " misses '", at(name), "'; export the bundle again");
    return *found;
  }
  bool has(const char* name) const { return json_.find(name) != nullptr; }
  Fields sub(const char* name) const { return {get(name), at(name)}; }

  const std::string& string(const char* name) const { return *checked(get(name).string(), name, "a string"); }
  bool boolean(const char* name) const { return *checked(get(name).boolean(), name, "true or false"); }
  std::int64_t count(const char* name, std::int64_t least) const {
    const std::int64_t* value = get(name).integer();
    if (value == nullptr || *value < least) wrong(name, "an integer from " + std::to_string(least));
    return *value;
  }
  /// `count`, or nothing when the field is null or, with `may_miss`, not there.
  std::optional<std::int64_t> optional_count(const char* name, std::int64_t least, bool may_miss) const {
    if (absent(name, may_miss)) return std::nullopt;
    return count(name, least);
  }
  std::optional<std::string> optional_string(const char* name) const {
    if (absent(name, true)) return std::nullopt;
    return string(name);
  }
  /// A number that is finite.
  void number(const char* name) const {
    double value = 0;
    if (!get(name).number(value)) wrong(name, "a number");
  }
  const Json::List& list(const char* name) const { return *checked(get(name).list(), name, "a list"); }

  /// Calls `f(item, place)` for each item of a list.
  template <class F>
  void each(const char* name, F&& f) const {
    std::size_t i = 0;
    for (const Json& item : list(name)) f(item, at(name) + "[" + std::to_string(i++) + "]");
  }
  /// How many members there are.
  std::size_t count() const { return json_.object()->size(); }
  /// Calls `f(member name, its value, its place)` for each member.
  template <class F>
  void members(F&& f) const {
    for (const Json::Member& m : *json_.object()) f(m.name, m.value, at(m.name.c_str()));
  }
  /// Refuses members that are not named: a field we do not know could change what the others mean.
  void only(std::initializer_list<std::string_view> known) const {
    for (const Json::Member& m : *json_.object()) {
      bool found = false;
      for (std::string_view name : known) found = found || name == m.name;
      if (!found) malformed(at(m.name.c_str()) + " is no field of this version");
    }
  }
  [[noreturn]] void wrong(const char* name, const std::string& expected) const {
    malformed(at(name) + " must be " + expected);
  }

 private:
  std::string at(const char* name) const { return place_.empty() ? name : place_ + "." + name; }
  bool absent(const char* name, bool may_miss) const {
    const Json* found = json_.find(name);
    return found == nullptr ? may_miss : found->is_null();
  }
  template <class T>
  const T* checked(const T* value, const char* name, const char* expected) const {
    if (value == nullptr) wrong(name, expected);
    return value;
  }

  const Json& json_;
  std::string place_;
};

/// Name, dtype and shape.
void read_tensor(const Fields& fields, TensorSpec& spec);

/// An engine's entry, also one that an earlier release wrote.
EngineEntry read_engine(const Fields& fields);

}  // namespace stca::core
