#include "bundle.hpp"

#include <algorithm>
#include <limits>
#include <set>

#include "contract.hpp"
#include "digest.hpp"
#include "error.hpp"
#include "fields.hpp"
#include "json.hpp"
#include "padding.hpp"
#include "tables.hpp"

namespace stca::core {
namespace {

namespace fs = std::filesystem;

constexpr const char* weights_name = "weights.safetensors";
constexpr std::int64_t format_version = 3;
// Real ones have some tens of kilobytes and some ten files.
constexpr std::size_t largest_manifest = 16 << 20, most_files = 10'000;

/// What holds of inputs that requests bring.
void check_input(const TensorSpec& spec) {
  const std::string what = "input " + in_quotes(spec.name);
  const bool is_integer = spec.dtype >= STCA_INT8 && spec.dtype <= STCA_INT64;
  if (spec.name.empty()) malformed(what + " has no name");
  if (spec.dtype == STCA_BFLOAT16 || spec.dtype == STCA_FLOAT8_E4M3) {
    malformed(what + " is " + dtype_name(spec.dtype) + ", which is for states alone");
  }
  if (spec.limit > 0 && !is_integer) malformed(what + " is " + dtype_name(spec.dtype) + " and has a limit of ids");
  if (spec.limit > 0 && spec.low && *spec.low >= spec.limit) {
    malformed(what + " has ids from " + std::to_string(*spec.low) + " and below " + std::to_string(spec.limit));
  }
  if (spec.low && spec.dtype == STCA_BOOL) malformed(what + " is bool and has a least value");
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
  spec.limit = fields.optional_count("limit", spec.scope == STCA_NO_SCOPE ? 0 : 1, true).value_or(0);
  spec.low = fields.optional_count("low", std::numeric_limits<std::int64_t>::min(), true);
  const auto length_of = fields.optional_string("length_of");
  if (spec.scope != STCA_NO_SCOPE && length_of && length_of->empty()) fields.wrong("length_of", "the name of a size");
  spec.length_of = length_of.value_or("");
  spec.blank = fields.optional_count("blank", std::numeric_limits<std::int64_t>::min(), true);
  fields.only({"name", "dtype", "shape", "scope", "limit", "low", "length_of", "blank"});
  if (spec.scope != STCA_NO_SCOPE) check_input(spec);
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
  if (fields.has("lookups") && !fields.get("lookups").is_null()) {
    fields.each("lookups", [&](const Json& item, const std::string& place) {
      const Fields lookup(item, place);
      graph.lookups.push_back({lookup.string("rows"), lookup.string("table"), lookup.string("ids")});
      lookup.only({"rows", "table", "ids"});
    });
  }
  graph.ids = fields.optional_string("ids").value_or("");
  fields.only({"file", "inputs", "outputs", "lookups", "ids"});
  return graph;
}

TableSpec read_table(const Fields& fields) {
  TableSpec table;
  table.name = fields.string("name");
  table.file = fields.string("file");
  table.digests = fields.string("digests");
  if (!dtype_from_name(fields.string("dtype"), table.dtype)) fields.wrong("dtype", "a dtype of the manifest's table");
  table.rows = fields.count("rows", 0);
  table.width = fields.count("width", 0);
  table.block_rows = fields.count("block_rows", 0);
  fields.only({"name", "file", "digests", "dtype", "rows", "width", "block_rows"});
  return table;
}

StateSpec read_state(const Json& json, const std::string& place) {
  const Fields fields(json, place);
  StateSpec spec;
  read_tensor(fields, spec);
  fields.count("bytes_per_token", 0);
  spec.input = fields.optional_string("input");
  if (const auto append = fields.optional_string("append")) {
    if (*append != "sum") fields.wrong("append", "sum");
    spec.is_sum = true;
  }
  fields.only({"name", "dtype", "shape", "bytes_per_token", "input", "append"});
  return spec;
}

Padding read_padding(const Fields& fields) {
  Padding padding;
  fields.each("inputs", [&](const Json& item, const std::string& place) {
    const Fields event(item, place);
    constexpr auto lowest = std::numeric_limits<std::int64_t>::min();
    padding.inputs.push_back({event.string("name"), static_cast<int>(std::min<std::int64_t>(event.count("axis", 0), 2)),
                              event.count("value", lowest),
                              event.optional_count("event", lowest, true)});
    event.only({"name", "axis", "value", "event"});
  });
  if (const auto side = fields.optional_string("side")) {
    if (*side != "left" && *side != "right") fields.wrong("side", "left or right");
    padding.side = *side == "left" ? Side::left : Side::right;
  }
  padding.lengths = fields.optional_string("lengths").value_or("");
  fields.only({"inputs", "side", "lengths"});
  return padding;
}

/// Holds the manifest's text against the digest it carries, which is of the text with zeros in the digest's place. That
/// is among the first fields, before any that could hold another text like it.
void check_digest(const Folder& folder, std::string text) {
  constexpr std::string_view field = "\"digest\": \"", digits = "0123456789abcdef";
  constexpr std::size_t length = 64;
  const std::size_t at = text.find(field), begin = at + field.size();
  if (at < text.find_first_of("{[", 1) && text.find_first_not_of(digits, begin) == begin + length &&
      text[begin + length] == '"') {
    const std::string carried = text.substr(begin, length);
    Sha256 digest;
    digest.update(text.replace(begin, length, length, '0'));
    if (digest.hex() == carried) return;
  }
  bundle_error(shown(folder.path().string()), ": ", manifest_name,
               " was changed; copy the bundle again or export it anew");
}

/// Whether each file is there once, and nothing else.
void check_names(const Folder& folder, const Manifest& manifest) {
  const std::string root = shown(folder.path().string());
  std::set<std::string> present;
  for (std::string& name : folder.names()) present.insert(std::move(name));
  present.erase(manifest_name);
  present.erase("manifest.sig");  // for those who check who made a bundle; this library does not
  std::set<std::string> named;
  for (const auto& [name, entry] : manifest.files) named.insert(name);
  for (const TableSpec& table : manifest.tables) named.insert(table.file);
  for (const std::string& name : named) {
    if (present.count(name) == 0) {
      bundle_error(root, ": ", shown(name), " is missing; copy the bundle again or export it anew");
    }
  }
  for (const std::string& name : present) {
    if (named.count(name) == 0) {
      bundle_error(root, ": ", shown(name), " is not in the manifest; remove it, or export the bundle anew");
    }
  }
  for (const auto& [name, graph] : manifest.graphs) {
    for (const std::string& file : {graph.file, graph.ids.empty() ? graph.file : graph.ids}) {
      if (manifest.files.count(file) == 0) {
        bundle_error(root, ": graph file '", shown(file), "' is not among the manifest's files; export it anew");
      }
    }
  }
  for (const TableSpec& table : manifest.tables) {
    if (manifest.files.count(table.digests) == 0 || manifest.files.count(table.file) != 0) {
      bundle_error(root, ": the digests of table ", in_quotes(table.name), " are not pinned; export the bundle anew");
    }
  }
  for (const EngineEntry& entry : manifest.engines) {
    if (manifest.files.count(entry.file) == 0) {
      bundle_error(root, ": engine file '", shown(entry.file),
                   "' is not among the manifest's files; build the engine again");
    }
  }
}

/// What names a bundle's weights: the digest of their file or, where tables left, of that and of the tables' digests.
std::string weights_version(const Manifest& manifest, const std::string& weights) {
  if (manifest.tables.empty()) return weights;
  Sha256 sha;
  sha.update(weights);
  for (const TableSpec& table : manifest.tables) sha.update("\n" + manifest.files.at(table.digests).sha256);
  return sha.hex();
}

void check_files(const Folder& folder, const Manifest& manifest) {
  check_names(folder, manifest);
  const std::string root = shown(folder.path().string());
  for (const auto& [name, entry] : manifest.files) {
    // Every name was found in the directory's own listing, so none of them leads elsewhere but through a link.
    if (const std::uint64_t size = folder.size_of(name); size != static_cast<std::uint64_t>(entry.bytes)) {
      bundle_error(root, ": ", shown(name), " has ", size, " bytes, the manifest says ", entry.bytes,
                   "; copy it again");
    }
    Sha256 sha;
    folder.read(name, [&](std::string_view piece) { sha.update(piece); });
    if (const std::string digest = sha.hex(); digest != entry.sha256) {
      bundle_error(root, ": ", shown(name), " was changed (SHA-256 ", digest.substr(0, 12), "…, expected ",
                   shown(entry.sha256.substr(0, 12)), "…); copy it again");
    }
  }
  for (const TableSpec& table : manifest.tables) check_table(folder, table);
  const auto weights = manifest.files.find(weights_name);
  if (weights != manifest.files.end() && weights_version(manifest, weights->second.sha256) != manifest.weights) {
    bundle_error(root, ": the weights' version is not the digest of ", weights_name, "; export the bundle anew");
  }
}

std::string read_manifest(const Folder& folder) {
  const std::vector<std::string> names = folder.names();
  if (std::find(names.begin(), names.end(), manifest_name) == names.end()) {
    bundle_error(shown(folder.path().string()), ": has no ", manifest_name,
                 "; this is not a bundle, or its export did not finish");
  }
  std::string text;
  folder.read(manifest_name, [&](std::string_view piece) {
    text += piece;
    if (text.size() > largest_manifest) {
      bundle_error(shown(folder.path().string()), ": ", manifest_name,
                   " is larger than 16 MiB; export the bundle again");
    }
  });
  return text;
}

/// Refuses int8 matrices of an older stca: ONNX Runtime fails on them where a processor lacks VNNI.
void check_zero_points(const Json& manifest) {
  const auto member = [](const Json* of, const char* name) { return of == nullptr ? nullptr : of->find(name); };
  const Json* matrices = member(member(&manifest, "quantization"), "weights");
  const Json* kind = member(matrices, "kind");
  const Json* told = member(matrices, "zero_points");
  const bool int8 = kind != nullptr && kind->string() != nullptr && *kind->string() == "int8";
  if (!int8 || (told != nullptr && told->boolean() != nullptr && *told->boolean())) return;
  bundle_error("the bundle's int8 matrices have no zero points of their own, without which processors that lack VNNI "
               "fail; calibrate the float32 bundle again");
}

}  // namespace

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

bool TensorSpec::counts(std::string_view symbol) const {
  return std::any_of(shape.begin(), shape.end(), [&](const Axis& axis) { return axis.symbol == symbol; });
}

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
  for (const char* name : {"model", "split", "parity"}) fields.sub(name);
  const Fields producer = fields.sub("producer");
  producer.members([&](const std::string& name, const Json&, const std::string&) { producer.string(name.c_str()); });
  if (fields.has("quantization") && !fields.get("quantization").is_null()) fields.sub("quantization");
  manifest.weights = fields.string("weights");
  manifest.precision = fields.string("precision");
  fields.get("attention"), fields.optional_string("attention");
  manifest.appendable = fields.boolean("appendable");
  manifest.max_history = fields.optional_count("max_history", 0, false);
  manifest.min_history = fields.optional_count("min_history", 0, true).value_or(0);
  if (fields.has("padding") && !fields.get("padding").is_null()) {
    fields.each("padding", [&](const Json& item, const std::string& place) {
      manifest.padding.push_back(read_padding({item, place}));
    });
  }
  if (fields.has("tables") && !fields.get("tables").is_null()) {
    fields.each("tables", [&](const Json& item, const std::string& place) {
      manifest.tables.push_back(read_table({item, place}));
    });
  }
  fields.sub("graphs").members([&](const std::string& name, const Json& graph, const std::string& place) {
    manifest.graphs[name] = read_graph({graph, place});
  });
  for (const char* name : {"request", "user_encoder", "target_scorer"}) fields.sub("graphs").get(name);
  fields.each("state",
              [&](const Json& item, const std::string& place) { manifest.state.push_back(read_state(item, place)); });
  fields.each("engines", [&](const Json& item, const std::string& place) {
    manifest.engines.push_back(read_engine({item, place}));
  });
  const Fields files = fields.sub("files");
  if (files.count() > most_files) {
    malformed("files: has " + std::to_string(files.count()) + " entries, more than " + std::to_string(most_files));
  }
  files.members([&](const std::string& name, const Json& item, const std::string& place) {
    const Fields entry(item, place);
    manifest.files[name] = {entry.count("bytes", 0), entry.string("sha256")};
    entry.only({"sha256", "bytes"});
  });
  fields.only({"format", "version", "digest", "model", "weights", "precision", "attention", "graphs", "state",
               "appendable", "max_history", "min_history", "padding", "split", "parity", "producer", "quantization",
               "engines", "tables", "files"});
  check_zero_points(json);
  check_padding(manifest);
  check_contract(manifest);
  manifest.text = std::move(text);
  return manifest;
}

std::shared_ptr<const Bundle> Bundle::load(const fs::path& path) {
  return with_folder(path, true, [](const std::shared_ptr<const Folder>& opened) { return read(opened); });
}

std::shared_ptr<const Bundle> Bundle::read(const std::shared_ptr<const Folder>& folder) {
  auto bundle = std::make_shared<Bundle>(Bundle{folder->path(), Manifest::parse(read_manifest(*folder)), folder, {}});
  check_files(*folder, bundle->manifest);
  check_digest(*folder, bundle->manifest.text);
  for (const auto& [name, graph] : bundle->manifest.graphs) bundle->graph_files[name] = folder->path_of(graph.file);
  return bundle;
}

}  // namespace stca::core
