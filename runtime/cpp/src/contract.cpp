#include "contract.hpp"

#include <algorithm>
#include <iterator>
#include <map>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "error.hpp"

namespace stca::core {
namespace {

/// More than this under the first axis is no row of a request or a state, and its bytes might not be counted.
constexpr std::size_t largest_row = std::size_t{1} << 30;
/// Real graphs have some hundreds.
constexpr std::size_t most_tensors = 2000;

[[noreturn]] void broken(const std::string& why) {
  bundle_error("manifest.json is malformed (", why, "); export the bundle again");
}

std::string described(const TensorSpec& spec) { return std::string(dtype_name(spec.dtype)) + " " + spec.shape_text(); }

/// Whether two names of sizes mean the same one. Those without a fixed meaning are names that an exporter made up.
bool same_symbol(const std::string& one, const std::string& other) {
  const auto known = [](const std::string& symbol) {
    return symbol == tokens_symbol || symbol == targets_symbol || symbol == users_symbol || symbol == offsets_symbol;
  };
  return one == other || (!known(one) && !known(other));
}

bool same_shape(const TensorSpec& one, const TensorSpec& other) {
  return std::equal(one.shape.begin(), one.shape.end(), other.shape.begin(), other.shape.end(),
                    [](const Axis& a, const Axis& b) {
                      if (a.symbol.empty() || b.symbol.empty()) return a.symbol == b.symbol && a.size == b.size;
                      return same_symbol(a.symbol, b.symbol);
                    });
}

using ByName = std::unordered_map<std::string_view, const TensorSpec*>;

/// Whether an axis other than the first has this symbol.
bool counts_beyond_first(const TensorSpec& spec, std::string_view symbol) {
  return !spec.shape.empty() &&
         std::any_of(spec.shape.begin() + 1, spec.shape.end(), [&](const Axis& axis) { return axis.symbol == symbol; });
}

template <class Specs>
ByName by_name(const Specs& specs) {
  ByName names;
  for (const TensorSpec& spec : specs) names.emplace(spec.name, &spec);
  return names;
}

/// The tensor of that name, or null.
const TensorSpec* find(const ByName& names, const std::string& name) {
  const auto found = names.find(name);
  return found == names.end() ? nullptr : found->second;
}

/// Throws when a name comes more than once.
template <class Specs>
void check_once(const Specs& specs, const std::string& where) {
  std::unordered_set<std::string_view> seen;
  for (const TensorSpec& spec : specs) {
    if (!seen.insert(spec.name).second) broken(in_quotes(spec.name) + " comes twice in " + where);
  }
}

/// `spec` is `other` by another route; `where` each stands.
void same_tensor(const TensorSpec& spec, const std::string& where, const TensorSpec& other, const std::string& there) {
  if (spec.dtype != other.dtype || !same_shape(spec, other)) {
    broken(in_quotes(spec.name) + " is " + described(spec) + " in " + where + ", " + described(other) + " in " + there);
  }
}

void check_tensor(const TensorSpec& spec, const std::string& where) {
  Shape row;
  for (std::size_t i = 0; i < spec.shape.size(); ++i) {
    row[row.rank++] = spec.shape[i].symbol.empty() ? std::max<std::int64_t>(spec.shape[i].size, 1) : 1;
  }
  if (!row.addressable(item_bytes(spec.dtype)) || row.elements() * item_bytes(spec.dtype) > largest_row) {
    broken(in_quotes(spec.name) + " in " + where + " is " + described(spec) + ", larger than any row");
  }
  if (!spec.counts(offsets_symbol)) return;
  if (spec.shape.size() != 1 || (spec.dtype != STCA_INT32 && spec.dtype != STCA_INT64)) {
    broken(in_quotes(spec.name) + " in " + where + " is " + described(spec) + "; offsets are int32 or int64 [B_plus_1]");
  }
}

void check_inputs(const Manifest& manifest) {
  const std::vector<TensorSpec>& given = manifest.graph("request").inputs;
  for (const TensorSpec& spec : given) {
    if (spec.scope == STCA_NO_SCOPE) broken("input " + in_quotes(spec.name) + " has no scope");
    if (spec.scope == STCA_REQUEST && spec.counts(offsets_symbol)) {
      broken("offsets " + in_quotes(spec.name) + " are of scope request; they count tokens of a user, or targets");
    }
    if (spec.limit > 0 && kind_of(spec.dtype) != Kind::integer) {
      broken("input " + in_quotes(spec.name) + " is " + dtype_name(spec.dtype) + " and has a limit of ids");
    }
  }
  const ByName inputs = by_name(given), states = by_name(manifest.state);
  for (const char* half : {"user_encoder", "target_scorer"}) {
    for (const TensorSpec& spec : manifest.graph(half).inputs) {
      const std::string where = "graphs." + std::string(half);
      if (half == std::string_view("target_scorer") && find(states, spec.name) != nullptr) continue;
      const TensorSpec* input = find(inputs, spec.name);
      if (input == nullptr)
        broken(where + ": input " + in_quotes(spec.name) + " is no input of the request graph and no state");
      same_tensor(spec, where, *input, "graphs.request");
      if (spec.scope != STCA_NO_SCOPE && spec.scope != input->scope) {
        broken(in_quotes(spec.name) + " has another scope in " + where + " than in graphs.request");
      }
      if ((input->scope == STCA_USER) != (half == std::string_view("user_encoder"))) {
        broken(where + ": input " + in_quotes(spec.name) + " is " + (input->scope == STCA_USER ? "" : "not ") +
               "of scope user");
      }
    }
  }
}

/// Whether any of the tensors has an axis of this symbol.
bool any_counts(const std::vector<TensorSpec>& specs, std::string_view symbol) {
  return std::any_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) { return spec.counts(symbol); });
}

/// A sum is of one user, of one size whatever the history, and made.
void check_sum(const Manifest& manifest, const StateSpec& spec) {
  const std::string what = "state " + in_quotes(spec.name);
  if (!manifest.appendable || any_counts(manifest.graph("user_encoder").inputs, offsets_symbol)) {
    broken(what + " is a sum over tokens, in a bundle whose states are not appended to as such");
  }
  const bool varies = spec.counts(tokens_symbol) || spec.counts(targets_symbol) || spec.counts(users_symbol) ||
                      spec.counts(offsets_symbol);
  if (spec.input || varies || (spec.dtype != STCA_FLOAT32 && spec.dtype != STCA_FLOAT64)) {
    broken(what + " is " + described(spec) + ", and no sum over tokens is: float32 or float64, of one size");
  }
}

void check_state(const Manifest& manifest) {
  const GraphSpec &encoder = manifest.graph("user_encoder"), &scorer = manifest.graph("target_scorer");
  const ByName given = by_name(encoder.inputs), made = by_name(encoder.outputs), taken = by_name(scorer.inputs);
  const bool tokens = any_counts(encoder.inputs, tokens_symbol);
  const bool users = any_counts(encoder.inputs, users_symbol) || any_counts(encoder.inputs, offsets_symbol);
  for (const StateSpec& spec : manifest.state) {
    const std::string what = "state " + in_quotes(spec.name);
    const TensorSpec *output = find(made, spec.name), *input = find(taken, spec.name);
    if (output == nullptr) broken("the user encoder does not give the " + what);
    if (input == nullptr && !spec.is_sum) broken("the target scorer does not take the " + what);
    same_tensor(spec, "state", *output, "graphs.user_encoder");
    if (input != nullptr) same_tensor(spec, "state", *input, "graphs.target_scorer");
    if (spec.input) {
      const TensorSpec* copied = find(given, *spec.input);
      if (copied == nullptr) {
        broken(what + " copies " + in_quotes(*spec.input) + ", which is no input of the user encoder");
      }
      if (copied->dtype != spec.dtype || !same_shape(*copied, spec)) {
        broken(what + " is " + described(spec) + ", and copies " + in_quotes(*spec.input) + ", " + described(*copied));
      }
    } else if (spec.counts(offsets_symbol)) {
      broken(what + " is of offsets, and copies no input");
    }
    for (const auto& [symbol, counted] : {std::pair{tokens_symbol, tokens}, {users_symbol, users}}) {
      if (spec.counts(symbol) && !counted)
        broken(what + " counts " + std::string(symbol) + ", which no input of the encoder does");
    }
    if (spec.counts(targets_symbol)) broken(what + " counts targets");
    if (spec.is_sum) check_sum(manifest, spec);
    if (manifest.appendable && counts_beyond_first(spec, tokens_symbol)) {
      broken(what + " has its history tokens on another axis than the first, so nothing can be appended to it");
    }
  }
  const ByName states = by_name(manifest.state);
  for (const TensorSpec& output : encoder.outputs) {
    if (find(states, output.name) == nullptr) {
      broken("the user encoder gives " + in_quotes(output.name) + ", which is no state");
    }
  }
}

/// It gives what the encoder gives, of the sums that are kept, in the state's order, and of users' inputs.
void check_grower(const Manifest& manifest) {
  const std::string where = std::string("graphs.") + user_grower;
  const ByName given = by_name(manifest.graph("request").inputs);
  std::vector<const TensorSpec*> taken, sums;
  for (const StateSpec& spec : manifest.state) {
    if (spec.is_sum) sums.push_back(&spec);
  }
  const std::vector<TensorSpec> none;
  for (const TensorSpec& spec : manifest.grows() ? manifest.graph(user_grower).inputs : none) {
    if (spec.scope == STCA_NO_SCOPE) {
      taken.push_back(&spec);
      continue;
    }
    const TensorSpec* input = find(given, spec.name);
    if (input == nullptr || input->scope != STCA_USER) {
      broken(where + ": input " + in_quotes(spec.name) + " is no user input of the request graph");
    }
    same_tensor(spec, where, *input, "graphs.request");
  }
  if (taken.size() != sums.size()) {
    broken(std::string("graphs: ") + user_grower + " takes " + std::to_string(taken.size()) + " sums, the state has " +
           std::to_string(sums.size()));
  }
  if (!manifest.grows()) return;
  for (std::size_t i = 0; i < sums.size(); ++i) same_tensor(*taken[i], where, *sums[i], "state");
  const std::vector<TensorSpec>&made = manifest.graph(user_grower).outputs, &its = manifest.graph("user_encoder").outputs;
  if (!std::equal(made.begin(), made.end(), its.begin(), its.end(),
                  [](const TensorSpec& a, const TensorSpec& b) { return a.name == b.name; })) {
    broken(where + ": its outputs are not those of the user encoder");
  }
  for (std::size_t i = 0; i < its.size(); ++i) same_tensor(made[i], where, its[i], "graphs.user_encoder");
}

void check_scores(const Manifest& manifest) {
  for (const char* graph : {"request", "target_scorer"}) {
    for (const TensorSpec& spec : manifest.graph(graph).outputs) {
      if (spec.shape.empty() || kind_of(spec.dtype) != Kind::floating || counts_beyond_first(spec, targets_symbol)) {
        broken("graphs." + std::string(graph) + ": output " + in_quotes(spec.name) + " is " + described(spec) +
               ", not a row of floating-point scores for each target");
      }
    }
  }
  // A column that is another output's would be a wrong score under a right name.
  const std::vector<TensorSpec>&promised = manifest.graph("request").outputs,
       &given = manifest.graph("target_scorer").outputs;
  for (std::size_t i = 0; i < std::max(promised.size(), given.size()); ++i) {
    const TensorSpec *spec = i < promised.size() ? &promised[i] : nullptr, *its = i < given.size() ? &given[i] : nullptr;
    if (spec == nullptr || its == nullptr || spec->name != its->name) {
      const auto name = [](const TensorSpec* one) { return one == nullptr ? "missing" : in_quotes(one->name); };
      broken("output " + std::to_string(i) + " is " + name(its) + " in graphs.target_scorer, " + name(spec) +
             " in graphs.request");
    }
    same_tensor(*its, "graphs.target_scorer", *spec, "graphs.request");
  }
}

/// Tables that can be files of their sizes, and look-ups of tables that there are by ids that there are.
void check_tables(const Manifest& manifest) {
  constexpr std::int64_t most_rows = std::int64_t{1} << 40;
  constexpr std::size_t most_bytes = std::size_t{1} << 62;  // else a few bytes could pass for all of them
  std::unordered_set<std::string_view> names;
  for (const TableSpec& table : manifest.tables) {
    if (!names.insert(table.name).second) broken("tables: two have one name");
    const std::string where = "table " + in_quotes(table.name);
    constexpr DType known[] = {STCA_FLOAT32, STCA_FLOAT16, STCA_BFLOAT16, STCA_INT8, STCA_FLOAT8_E4M3};
    if (std::find(std::begin(known), std::end(known), table.dtype) == std::end(known)) {
      broken(where + ": dtype is '" + dtype_name(table.dtype) +
             "', expected float32, float16, bfloat16, int8 or float8_e4m3fn");
    }
    const bool narrow = table.width > 0 && table.width <= static_cast<std::int64_t>(largest_row);
    const bool large = !narrow || table.row_bytes() > largest_row || table.rows >= most_rows;
    if (table.rows < 1 || large || static_cast<std::size_t>(table.rows) > most_bytes / table.row_bytes()) {
      broken(where + ": has the shape [" + std::to_string(table.rows) + ", " + std::to_string(table.width) +
             "], which is no table's");
    }
    const std::int64_t block = table.block_rows;
    if (block < 1 || block > static_cast<std::int64_t>(largest_row) || (block & (block - 1)) != 0) {
      broken(where + ": block_rows is " + std::to_string(block) + ", expected a power of two");
    }
    for (const std::string& file : {table.file, table.digests}) {
      if (file.empty() || file == "." || file == ".." || file.find_first_of("/\\") != file.npos) {
        broken(where + ": " + in_quotes(file) + " is no name of a file in the bundle");
      }
    }
  }
  for (const auto& [name, graph] : manifest.graphs) {
    const ByName inputs = by_name(graph.inputs);
    for (const Lookup& lookup : graph.lookups) {
      const std::string what = "graphs." + shown(name) + ": rows " + in_quotes(lookup.rows);
      if (names.count(lookup.table) == 0) {
        broken(what + " are of table " + in_quotes(lookup.table) + ", which the bundle does not have");
      }
      if (find(inputs, lookup.rows) != nullptr) broken(what + " have the name of an input");
      const TensorSpec* ids = find(inputs, lookup.ids);
      if (ids == nullptr && graph.ids.empty()) {
        broken(what + " are looked up by " + in_quotes(lookup.ids) + ", which is no input");
      }
      if (ids != nullptr && (kind_of(ids->dtype) != Kind::integer || ids->shape.size() >= STCA_MAX_RANK)) {
        broken(what + " are looked up by " + in_quotes(lookup.ids) + ", which holds no ids");
      }
    }
  }
}

/// What one axis of a tensor is, and what the engine says it is.
bool contradicts(const Axis& promised, const Axis& found, bool input) {
  if (promised.symbol.empty()) return found.size >= 0 && found.size != promised.size;
  if (found.size >= 0) return input;  // an engine may know more of what it gives, not take less than was promised
  return !found.symbol.empty() && !same_symbol(promised.symbol, found.symbol);
}

/// Sizes that an engine has one name for, and what the manifest says they are.
using Same = std::map<std::string, Axis>;

void check_axes(const std::string& who, const char* what, const TensorSpec& spec, const TensorSpec& its, Same& same,
                const std::string& remedy) {
  bool fits = its.dtype == spec.dtype && its.shape.size() == spec.shape.size();
  for (std::size_t i = 0; fits && i < spec.shape.size(); ++i)
    fits = !contradicts(spec.shape[i], its.shape[i], what == std::string_view("input"));
  if (!fits) {
    bundle_error(who, ": its ", what, " ", in_quotes(spec.name), " is ", described(its), ", the manifest says ",
                 described(spec), "; ", remedy);
  }
  for (std::size_t i = 0; i < spec.shape.size(); ++i) {
    if (its.shape[i].symbol.empty()) continue;
    const Axis& said = spec.shape[i];
    const Axis& before = same.emplace(its.shape[i].symbol, said).first->second;
    const bool one = said.symbol == before.symbol && said.size == before.size;
    if (one || (!said.symbol.empty() && !before.symbol.empty())) continue;
    const auto text = [](const Axis& axis) { return axis.symbol.empty() ? std::to_string(axis.size) : axis.symbol; };
    bundle_error(who, ": ", shown(its.shape[i].symbol), " of its ", what, " ", in_quotes(spec.name),
                 " is one size, the manifest says ", text(said), " and ", text(before), "; ", remedy);
  }
}

}  // namespace

void check_contract(const Manifest& manifest) {
  for (const auto& [name, graph] : manifest.graphs) {
    const std::string where = "graphs." + shown(name);
    const std::size_t count = std::max({graph.inputs.size(), graph.outputs.size(), manifest.state.size()});
    if (count > most_tensors) {
      broken(where + " or state has " + std::to_string(count) + " tensors, the limit is " +
             std::to_string(most_tensors));
    }
    if (graph.outputs.empty()) broken(where + " has no outputs");
    for (const auto* specs : {&graph.inputs, &graph.outputs}) {
      check_once(*specs, where);
      for (const TensorSpec& spec : *specs) {
        check_tensor(spec, where);
        if (spec.dtype == STCA_FLOAT8_E4M3 && name != pieces_scorer &&
            find(by_name(manifest.state), spec.name) == nullptr) {
          broken(in_quotes(spec.name) + " in " + where + " is " + described(spec) + "; that type is for states alone");
        }
      }
    }
  }
  check_once(manifest.state, "state");
  for (const StateSpec& spec : manifest.state) check_tensor(spec, "state");
  check_inputs(manifest);
  check_tables(manifest);
  check_state(manifest);
  check_grower(manifest);
  check_scores(manifest);
}

void check_signature(const std::string& who, const GraphSpec& promised, const Signature& found, bool may_leave_out,
                     const std::string& remedy) {
  Same same;
  for (auto [what, specs, its] :
       {std::tuple{"input", &promised.inputs, &found.inputs}, {"output", &promised.outputs, &found.outputs}}) {
    const bool inputs = specs == &promised.inputs;
    const ByName theirs = by_name(*its), ours = by_name(*specs);
    for (const TensorSpec& spec : *specs) {
      const TensorSpec* one = find(theirs, spec.name);
      if (one != nullptr) {
        check_axes(who, what, spec, *one, same, remedy);
      } else if (!inputs || !may_leave_out) {
        bundle_error(who, ": has no ", what, " ", in_quotes(spec.name), "; ", remedy);
      }
    }
    for (const TensorSpec& spec : *its) {
      if (inputs && find(ours, spec.name) == nullptr) {
        bundle_error(who, ": takes ", in_quotes(spec.name), ", of which the manifest says nothing; ", remedy);
      }
    }
    if (theirs.size() != its->size()) bundle_error(who, ": has an ", what, " twice; ", remedy);
  }
}

GraphSpec as_built(const Manifest& manifest, const EngineEntry& entry) {
  GraphSpec graph = manifest.graph(entry.graph);
  const ByName states = by_name(manifest.state);
  for (auto* specs : {&graph.inputs, &graph.outputs}) {
    for (TensorSpec& spec : *specs) {
      const TensorSpec* state = find(states, spec.name);
      if (state != nullptr && state->dtype == STCA_FLOAT32) {
        spec.dtype = entry.precision == "fp16"   ? STCA_FLOAT16
                     : entry.precision == "bf16" ? STCA_BFLOAT16
                                                 : STCA_FLOAT32;
      }
      for (Axis& axis : spec.shape) {
        if (entry.requests != 1) continue;
        if (axis.symbol == users_symbol) axis = {1, {}};
        if (axis.symbol == offsets_symbol) axis = {2, {}};
      }
    }
  }
  return graph;
}

}  // namespace stca::core
