// Engines that a manifest names: read as strictly as in Python, whichever library they are for.
#include <algorithm>
#include <limits>

#include "fields.hpp"

namespace stca::core {
namespace {

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

/// Inputs or outputs; an earlier release wrote names of outputs alone, which are the graph's own.
void read_tensors(const Fields& fields, const char* name, std::vector<TensorSpec>& specs) {
  if (!fields.has(name)) return;
  const Json::List& items = fields.list(name);
  if (std::all_of(items.begin(), items.end(), [](const Json& item) { return item.string() != nullptr; }) &&
      name == std::string_view("outputs")) {
    return;
  }
  fields.each(name, [&](const Json& item, const std::string& place) {
    const Fields tensor(item, place);
    read_tensor(tensor, specs.emplace_back());
    tensor.only({"name", "dtype", "shape"});
  });
}

void read_profiles(const Fields& fields, std::vector<Profile>& profiles) {
  if (!fields.has("profiles")) return;
  fields.each("profiles", [&](const Json& item, const std::string& place) {
    Profile& profile = profiles.emplace_back();
    const Fields sizes(item, place);
    sizes.members([&](const std::string& symbol, const Json& json, const std::string&) {
      const Json::List* three = json.list();  // smallest, best, largest
      const auto fits = [&] {
        if (three == nullptr || three->size() != 3) return false;
        std::int64_t least = 0;
        for (const Json& size : *three) {
          if (size.integer() == nullptr || *size.integer() < least) return false;
          least = *size.integer();
        }
        return true;
      };
      if (!fits()) sizes.wrong(symbol.c_str(), "three sizes that rise");
      profile[symbol] = {*(*three)[0].integer(), *(*three)[2].integer()};
    });
  });
}

void read_padded(const Fields& fields, EngineEntry& entry) {
  if (!fields.has("padded")) return;
  fields.each("padded", [&](const Json& item, const std::string&) {
    const std::string* symbol = item.string();
    if (symbol == nullptr || !counts_rows(entry, *symbol)) {
      fields.wrong("padded", "a list of dimensions that every profile has, and that count rows");
    }
    entry.padded.push_back(*symbol);
  });
}

/// What only people and other tools read.
void check_notes(const Fields& fields) {
  fields.optional_string("attention");
  if (fields.has("refit")) fields.string("refit");
  if (fields.has("bytes")) fields.count("bytes", 0);
  if (fields.has("seconds")) fields.number("seconds");
  if (fields.has("key")) fields.sub("key");
  for (const char* name : {"memory", "layers"}) {
    if (!fields.has(name)) continue;
    const Fields counts = fields.sub(name);
    counts.members([&](const std::string& member, const Json&, const std::string&) { counts.count(member.c_str(), 0); });
  }
}

}  // namespace

EngineEntry read_engine(const Fields& fields) {
  EngineEntry entry;
  entry.graph = fields.string("graph");
  if (entry.graph != "user_encoder" && entry.graph != "target_scorer") {
    fields.wrong("graph", "user_encoder or target_scorer");
  }
  entry.flavour = fields.string("flavour");
  entry.file = fields.string("file");
  entry.precision = fields.string("precision");
  if (fields.has("version")) entry.version = fields.string("version");
  entry.sm = fields.optional_count("sm", 0, true).value_or(0);
  entry.provider = fields.optional_string("provider").value_or("");
  entry.lowering = fields.optional_string("lowering").value_or("");
  entry.requests = fields.optional_count("requests", 1, true).value_or(0);
  read_tensors(fields, "inputs", entry.spec.inputs);
  read_tensors(fields, "outputs", entry.spec.outputs);
  read_profiles(fields, entry.profiles);
  read_padded(fields, entry);
  check_notes(fields);
  fields.only({"graph", "file", "flavour", "precision", "version", "sm", "provider", "lowering", "attention", "requests",
               "refit", "profiles", "inputs", "outputs", "padded", "memory", "seconds", "bytes", "layers",
               "fused_layers", "key"});
  return entry;
}

}  // namespace stca::core
