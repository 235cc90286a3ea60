// Copies of bundles whose manifests say something else, with every digest made right again: what a hand with bad
// intentions could send, and no digest can tell.
#pragma once

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "check.hpp"
#include "digest.hpp"
#include "json.hpp"

namespace resealed {

/// JSON to be changed and written again.
struct Tree {
  using List = std::vector<Tree>;
  using Object = std::vector<std::pair<std::string, Tree>>;
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, List, Object> value = nullptr;

  Tree() = default;
  Tree(std::int64_t number) : value(number) {}
  Tree(int number) : value(std::int64_t{number}) {}
  Tree(bool truth) : value(truth) {}
  Tree(const char* text) : value(std::string(text)) {}
  Tree(std::string text) : value(std::move(text)) {}
  Tree(List items) : value(std::move(items)) {}

  static Tree of(const stca::core::Json& json) {
    Tree tree;
    double number = 0;
    if (json.boolean()) tree.value = *json.boolean();
    if (json.number(number)) tree.value = number;
    if (json.integer()) tree.value = *json.integer();
    if (json.string()) tree.value = *json.string();
    if (json.list()) {
      List items;
      for (const stca::core::Json& item : *json.list()) items.push_back(of(item));
      tree.value = std::move(items);
    }
    if (json.object()) {
      Object members;
      for (const auto& member : *json.object()) members.emplace_back(member.name, of(member.value));
      tree.value = std::move(members);
    }
    return tree;
  }

  Object& object() { return std::get<Object>(value); }
  List& list() { return std::get<List>(value); }
  const std::string& text() const { return std::get<std::string>(value); }

  Tree& operator[](const std::string& name) {
    for (auto& [known, member] : object()) {
      if (known == name) return member;
    }
    return object().emplace_back(name, Tree()).second;
  }
  Tree& operator[](const char* name) { return (*this)[std::string(name)]; }
  Tree& operator[](int index) { return list().at(static_cast<std::size_t>(index)); }
  /// The item of a list whose field "name" is this.
  Tree& named(const std::string& name) {
    for (Tree& item : list()) {
      if (item["name"].text() == name) return item;
    }
    throw std::out_of_range(name);
  }
  void erase(const std::string& name) {
    for (std::size_t i = object().size(); i-- > 0;) {
      if (object()[i].first == name) object().erase(object().begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  std::string dump() const {
    std::ostringstream out;
    out.precision(17);
    write(out);
    return out.str();
  }

 private:
  static void quote(std::ostream& out, const std::string& text) {
    out << '"';
    for (const char c : text) {
      constexpr char digits[] = "0123456789abcdef";
      if (c == '"' || c == '\\') {
        out << '\\' << c;
      } else if (static_cast<unsigned char>(c) < 0x20) {
        out << "\\u00" << digits[c >> 4] << digits[c & 15];
      } else {
        out << c;
      }
    }
    out << '"';
  }
  void write(std::ostream& out) const {
    if (std::holds_alternative<std::nullptr_t>(value)) out << "null";
    if (const auto* truth = std::get_if<bool>(&value)) out << (*truth ? "true" : "false");
    if (const auto* number = std::get_if<std::int64_t>(&value)) out << *number;
    if (const auto* number = std::get_if<double>(&value)) out << *number;
    if (const auto* text = std::get_if<std::string>(&value)) quote(out, *text);
    if (const auto* items = std::get_if<List>(&value)) {
      out << '[';
      for (const Tree& item : *items) (&item == items->data() ? out : out << ", "), item.write(out);
      out << ']';
    }
    if (const auto* members = std::get_if<Object>(&value)) {
      out << '{';
      for (const auto& member : *members) {
        if (&member != members->data()) out << ", ";
        quote(out, member.first);
        out << ": ";
        member.second.write(out);
      }
      out << '}';
    }
  }
};

inline std::string read(const std::filesystem::path& file) {
  std::ostringstream text;
  text << std::ifstream(file, std::ios::binary).rdbuf();
  return text.str();
}

/// The manifest's text with the digest that is right for it.
inline std::string sealed(Tree manifest) {
  manifest["digest"] = std::string(64, '0');
  std::string text = manifest.dump();
  stca::core::Sha256 digest;
  digest.update(text);
  return text.replace(text.find("\"digest\": \"") + 11, 64, digest.hex());
}

/// A copy of a bundle.
class Copy {
 public:
  explicit Copy(const std::filesystem::path& bundle) : path_(folder_.path() / "bundle") {
    std::filesystem::copy(bundle, path_, std::filesystem::copy_options::recursive);
    manifest = Tree::of(stca::core::Json::parse(read(path_ / "manifest.json")));
  }

  /// Puts `bytes` into a file, and its digest into the manifest.
  void put(const std::string& file, const std::string& bytes) {
    std::ofstream(path_ / file, std::ios::binary) << bytes;
    stca::core::Sha256 digest;
    digest.update(bytes);
    manifest["files"][file]["sha256"] = digest.hex();
    manifest["files"][file]["bytes"] = static_cast<std::int64_t>(bytes.size());
  }
  /// Writes the manifest as it is now, and gives the bundle's path.
  std::string seal() {
    std::ofstream(path_ / "manifest.json", std::ios::binary) << sealed(manifest);
    return path_.string();
  }

  std::string path() const { return path_.string(); }

  Tree manifest;

 private:
  check::TemporaryFolder folder_;
  std::filesystem::path path_;
};

}  // namespace resealed
