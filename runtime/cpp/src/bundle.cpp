#include "bundle.hpp"

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>

#include "error.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace stca::core {
namespace {

namespace fs = std::filesystem;

constexpr const char* manifest_name = "manifest.json";
constexpr const char* weights_name = "weights.safetensors";
constexpr std::int64_t format_version = 1;
constexpr std::uintmax_t largest_manifest = 16 << 20;  // real ones have some tens of kilobytes

[[noreturn]] void malformed(const std::string& why) {
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
  const Json::List& list(const char* name) const { return *checked(get(name).list(), name, "a list"); }

  /// Calls `f(item, place)` for each item of a list.
  template <class F>
  void each(const char* name, F&& f) const {
    std::size_t i = 0;
    for (const Json& item : list(name)) f(item, at(name) + "[" + std::to_string(i++) + "]");
  }
  /// Calls `f(member name, fields)` for each member.
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

void read_tensor(const Fields& fields, TensorSpec& spec) {
  spec.name = fields.string("name");
  if (!dtype_from_name(fields.string("dtype"), spec.dtype)) fields.wrong("dtype", "a dtype of the manifest's table");
  fields.each("shape", [&](const Json& item, const std::string&) {
    if (const auto* size = item.integer(); size != nullptr && *size >= 0) {
      spec.shape.push_back({*size, {}});
    } else if (const auto* symbol = item.string(); symbol != nullptr && !symbol->empty()) {
      spec.shape.push_back({-1, *symbol});
    } else {
      fields.wrong("shape", "a list of sizes and names");
    }
  });
  if (spec.shape.size() > STCA_MAX_RANK) fields.wrong("shape", "of at most " + std::to_string(STCA_MAX_RANK) + " axes");
}

/// Whether every profile has limits for a symbol, and it counts nothing but rows.
bool counts_rows(const EngineEntry& entry, const std::string& symbol) {
  for (const auto* specs : {&entry.spec.inputs, &entry.spec.outputs}) {
    for (const TensorSpec& spec : *specs) {
      for (std::size_t axis = 1; axis < spec.shape.size(); ++axis) {
        if (spec.shape[axis].symbol == symbol) return false;
      }
    }
  }
  return std::all_of(entry.profiles.begin(), entry.profiles.end(),
                     [&](const Profile& profile) { return profile.count(symbol) != 0; });
}

EngineEntry read_engine(const Fields& fields) {
  EngineEntry entry;
  entry.graph = fields.optional_string("graph").value_or("");
  entry.flavour = fields.optional_string("flavour").value_or("");
  entry.file = fields.optional_string("file").value_or("");
  entry.precision = fields.optional_string("precision").value_or("");
  entry.sm = fields.optional_count("sm", 0, true).value_or(0);
  entry.provider = fields.optional_string("provider").value_or("");
  if (entry.flavour != "tensorrt") return entry;  // nothing else of this library reads what plans say
  entry.version = fields.string("version");
  fields.string("precision"), fields.count("sm", 1);
  entry.requests = fields.optional_count("requests", 1, false).value_or(0);
  for (auto [name, specs] : {std::pair{"inputs", &entry.spec.inputs}, {"outputs", &entry.spec.outputs}}) {
    fields.each(name, [specs = specs](const Json& item, const std::string& place) {
      read_tensor({item, place}, specs->emplace_back());
    });
  }
  fields.each("profiles", [&](const Json& item, const std::string& place) {
    Profile& profile = entry.profiles.emplace_back();
    const Fields sizes(item, place);
    sizes.members([&](const std::string& symbol, const Json& json, const std::string&) {
      const Json::List* three = json.list();  // smallest, best, largest
      if (three == nullptr || three->size() != 3 || !(*three)[0].integer() || !(*three)[2].integer()) {
        sizes.wrong(symbol.c_str(), "three sizes");
      }
      profile[symbol] = {*(*three)[0].integer(), *(*three)[2].integer()};
    });
  });
  if (fields.has("padded")) {
    fields.each("padded", [&](const Json& item, const std::string&) {
      const std::string* symbol = item.string();
      if (symbol == nullptr || !counts_rows(entry, *symbol)) {
        fields.wrong("padded", "a list of dimensions that every profile has, and that count rows");
      }
      entry.padded.push_back(*symbol);
    });
  }
  return entry;
}

TensorSpec read_spec(const Json& json, const std::string& place) {
  const Fields fields(json, place);
  TensorSpec spec;
  read_tensor(fields, spec);
  if (const auto scope = fields.optional_string("scope")) {
    if (*scope == "user")
      spec.scope = STCA_USER;
    else if (*scope == "request")
      spec.scope = STCA_REQUEST;
    else if (*scope == "target")
      spec.scope = STCA_TARGET;
    else
      fields.wrong("scope", "user, request or target");
  }
  spec.limit = fields.optional_count("limit", 0, true).value_or(0);
  fields.only({"name", "dtype", "shape", "scope", "limit"});
  return spec;
}

GraphSpec read_graph(const Fields& fields) {
  GraphSpec graph;
  graph.file = fields.string("file");
  for (auto [name, specs] : {std::pair{"inputs", &graph.inputs}, {"outputs", &graph.outputs}}) {
    std::set<std::string> seen;
    fields.each(name, [&, specs = specs, name = name](const Json& item, const std::string& place) {
      specs->push_back(read_spec(item, place));
      if (!seen.insert(specs->back().name).second) fields.wrong(name, "of different names");
    });
  }
  fields.only({"file", "inputs", "outputs"});
  return graph;
}

StateSpec read_state(const Json& json, const std::string& place) {
  const Fields fields(json, place);
  StateSpec spec;
  read_tensor(fields, spec);
  fields.count("bytes_per_token", 0);
  spec.input = fields.optional_string("input");
  fields.only({"name", "dtype", "shape", "bytes_per_token", "input"});
  return spec;
}

/// What a session looks up by name must be there.
void check_names(const Manifest& manifest) {
  std::set<std::string> given, state;
  for (const TensorSpec& spec : manifest.graph("request").inputs) given.insert(spec.name);
  for (const StateSpec& spec : manifest.state) {
    state.insert(spec.name);
    if (spec.input && given.count(*spec.input) == 0) {
      malformed("state '" + spec.name + "' copies '" + *spec.input + "', which is no input of the request graph");
    }
  }
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.outputs.empty()) malformed("graphs." + name + " has no outputs");
    for (const TensorSpec& spec : graph.inputs) {
      if (given.count(spec.name) == 0 && (name != "target_scorer" || state.count(spec.name) == 0)) {
        malformed("graphs." + name + ": input '" + spec.name + "' is no input of the request graph and no state");
      }
    }
  }
}

/// Holds the manifest's text against the digest it carries, which is of the text with zeros in the digest's place.
void check_digest(const fs::path& root, std::string text) {
  constexpr std::string_view field = "\"digest\": \"", digits = "0123456789abcdef";
  constexpr std::size_t length = 64;
  std::size_t at = text.find(field);
  for (; at != std::string::npos; at = text.find(field, at + 1)) {
    const std::size_t begin = at + field.size();
    if (text.find_first_not_of(digits, begin) == begin + length && text[begin + length] == '"') break;
  }
  if (at != std::string::npos) {
    const std::string carried = text.substr(at + field.size(), length);
    Sha256 digest;
    digest.update(text.replace(at + field.size(), length, length, '0'));
    if (digest.hex() == carried) return;
  }
  bundle_error(root.string(), ": ", manifest_name, " was changed; copy the bundle again or export it anew");
}

void check_files(const fs::path& root, const Manifest& manifest) {
  std::set<std::string> present;
  for (const auto& entry : fs::directory_iterator(root)) present.insert(entry.path().filename().string());
  if (present.erase(manifest_name) == 0) bundle_error(root.string(), ": ", manifest_name, " is missing");
  for (const auto& [name, entry] : manifest.files) {
    if (present.count(name) == 0) {
      bundle_error(root.string(), ": ", name, " is missing; copy the bundle again or export it anew");
    }
  }
  for (const std::string& name : present) {
    if (manifest.files.count(name) == 0) {
      bundle_error(root.string(), ": ", name, " is not in the manifest; remove it, or export the bundle anew");
    }
  }
  for (const auto& [name, graph] : manifest.graphs) {
    if (manifest.files.count(graph.file) == 0) {
      bundle_error(root.string(), ": graph file '", graph.file, "' is not among the manifest's files; export it anew");
    }
  }
  for (const auto& [name, entry] : manifest.files) {
    const fs::path file = root / name;
    // Every name was found in the directory's own listing, so none of them leads elsewhere but through a link.
    if (fs::symlink_status(file).type() != fs::file_type::regular) {
      bundle_error(root.string(), ": ", name, " is not a plain file inside the bundle; copy the bundle again");
    }
    if (const auto size = fs::file_size(file); size != static_cast<std::uintmax_t>(entry.bytes)) {
      bundle_error(root.string(), ": ", name, " has ", size, " bytes, the manifest says ", entry.bytes,
                   "; copy it again");
    }
    if (const std::string digest = sha256_of(file); digest != entry.sha256) {
      bundle_error(root.string(), ": ", name, " was changed (SHA-256 ", digest.substr(0, 12), "…, expected ",
                   entry.sha256.substr(0, 12), "…); copy it again");
    }
  }
  const auto weights = manifest.files.find(weights_name);
  if (weights != manifest.files.end() && weights->second.sha256 != manifest.weights) {
    bundle_error(root.string(), ": the weights' version is not the digest of ", weights_name,
                 "; export the bundle anew");
  }
}

std::string read_manifest(const fs::path& root) {
  const fs::path path = root / manifest_name;
  const fs::file_status status = fs::symlink_status(path);
  if (!fs::exists(status)) {
    bundle_error(root.string(), ": has no ", manifest_name, "; this is not a bundle, or its export did not finish");
  }
  if (!fs::is_regular_file(status) || fs::file_size(path) > largest_manifest) {
    bundle_error(path.string(), ": cannot be read (not a plain file of at most 16 MiB)");
  }
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  if (!in || (in.peek() != std::ifstream::traits_type::eof() && !(text << in.rdbuf()))) {
    bundle_error(path.string(), ": cannot be read");
  }
  return text.str();
}

}  // namespace

std::string TensorSpec::shape_text() const {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i > 0 ? ", " : "") + (shape[i].symbol.empty() ? std::to_string(shape[i].size) : shape[i].symbol);
  }
  return text + "]";
}

Manifest Manifest::parse(std::string text) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const JsonError& e) {
    bundle_error(manifest_name, " is not JSON (", e.what(), "); export the bundle again");
  }
  const Json* format = json.find("format");
  if (format == nullptr || format->string() == nullptr || *format->string() != "stca-bundle") {
    bundle_error(manifest_name, " does not say format 'stca-bundle'; this is not a bundle");
  }
  const Json* version = json.find("version");
  if (version == nullptr || version->integer() == nullptr || *version->integer() < 1) {
    bundle_error(manifest_name, " has a wrong version; expected an integer from 1");
  }
  if (*version->integer() > format_version) {
    bundle_error("bundle has manifest version ", *version->integer(), ", this stca reads up to ", format_version,
                 "; upgrade stca");
  }

  Manifest manifest;
  const Fields fields(json, "");
  for (const char* name : {"model", "split", "parity", "producer"}) fields.sub(name);
  manifest.weights = fields.string("weights");
  manifest.precision = fields.string("precision");
  fields.get("attention");
  manifest.appendable = fields.boolean("appendable");
  manifest.max_history = fields.optional_count("max_history", 0, false);
  fields.sub("graphs").members([&](const std::string& name, const Json& graph, const std::string& place) {
    manifest.graphs[name] = read_graph({graph, place});
  });
  for (const char* name : {"request", "user_encoder", "target_scorer"}) fields.sub("graphs").get(name);
  fields.each("state",
              [&](const Json& item, const std::string& place) { manifest.state.push_back(read_state(item, place)); });
  fields.each("engines", [&](const Json& item, const std::string& place) {
    manifest.engines.push_back(read_engine({item, place}));
  });
  fields.sub("files").members([&](const std::string& name, const Json& item, const std::string& place) {
    const Fields entry(item, place);
    manifest.files[name] = {entry.count("bytes", 0), entry.string("sha256")};
    entry.only({"sha256", "bytes"});
  });
  fields.only({"format", "version", "digest", "model", "weights", "precision", "attention", "graphs", "state",
               "appendable", "max_history", "split", "parity", "producer", "engines", "files"});
  check_names(manifest);
  manifest.text = std::move(text);
  return manifest;
}

std::shared_ptr<const Bundle> Bundle::load(const fs::path& path) {
  try {
    if (!fs::is_directory(path)) {
      bundle_error(path.string(), ": no such bundle directory; make one with `stca export`");
    }
    auto bundle = std::make_shared<Bundle>(Bundle{path, Manifest::parse(read_manifest(path)), {}});
    check_files(path, bundle->manifest);
    check_digest(path, bundle->manifest.text);
    for (const auto& [name, graph] : bundle->manifest.graphs) bundle->graph_files[name] = (path / graph.file).string();
    return bundle;
  } catch (const fs::filesystem_error& e) {
    bundle_error(path.string(), ": cannot be read (", e.code().message(), ")");
  } catch (const std::ios_base::failure& e) {
    bundle_error(path.string(), ": cannot be read (", e.what(), ")");
  }
}

}  // namespace stca::core
