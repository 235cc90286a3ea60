#include "model.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "error.hpp"
#include "scores.hpp"

namespace stca::core {
namespace {

/// Most history tokens of several users encoded in one run; session.py says why.
constexpr std::int64_t tokens_together = 256;

/// The longest history that can be encoded and scored with: a longer state would only be in the way.
std::optional<std::int64_t> window_of(const Manifest& manifest, const Engines& engines) {
  const std::int64_t longest = std::min({manifest.max_history.value_or(no_limit), engines.encoder->largest_run().tokens,
                                         engines.scorer->largest_run().tokens});
  return longest == no_limit ? std::nullopt : std::optional(longest);
}

/// States of one text, and of equal weights, can take each other's place: the same tensors, computed by the same graph
/// in the same kind of engine, for the same window.
std::string layout(const std::vector<TensorSpec>& state, const Manifest& manifest, const Engine& encoder,
                   std::optional<std::int64_t> window) {
  std::string text;
  for (const TensorSpec& spec : state) text += spec.name + ":" + dtype_name(spec.dtype) + ":" + spec.shape_text() + ";";
  text += "window:" + (window ? std::to_string(*window) : "none");
  const GraphSpec& graph = manifest.graph("user_encoder");
  text += ";" + manifest.files.at(graph.file).sha256;
  if (!graph.ids.empty()) text += ";" + manifest.files.at(graph.ids).sha256;
  return text + ";" + encoder.name();
}

/// Where the runs end in which neighbours go through an engine together: as many as it takes, and at least one.
std::vector<std::size_t> run_ends(const std::vector<RunSize>& sizes, const RunSize& most) {
  std::vector<std::size_t> ends;
  RunSize sum;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const RunSize more{sum.requests + sizes[i].requests, sum.tokens + sizes[i].tokens, sum.targets + sizes[i].targets};
    const bool fits = more.requests <= most.requests && more.tokens <= most.tokens && more.targets <= most.targets;
    if (!fits && i > 0) ends.push_back(i);
    sum = fits ? more : sizes[i];
  }
  if (!sizes.empty()) ends.push_back(sizes.size());
  return ends;
}

template <class T>
std::vector<T> part(const std::vector<T>& all, std::size_t begin, std::size_t end) {
  return {all.begin() + static_cast<std::ptrdiff_t>(begin), all.begin() + static_cast<std::ptrdiff_t>(end)};
}

template <class Specs>
std::optional<std::size_t> index_of(const Specs& specs, const std::string& name) {
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name == name) return i;
  }
  return std::nullopt;
}

}  // namespace

std::shared_ptr<const Model> Model::load(const std::string& path, const Options& options, const Manifest* served) {
  const bool may_hold = options.make == nullptr;  // the caller's engines read files for themselves
  return with_folder(path, may_hold, [&](const std::shared_ptr<const Folder>& folder) {
    std::shared_ptr<const Bundle> bundle = Bundle::read(folder);
    if (served != nullptr) check_swap(path, *served, bundle->manifest);
    return std::make_shared<const Model>(std::move(bundle), options);
  });
}

Model::Model(std::shared_ptr<const Bundle> bundle, const Options& options)
    : bundle_(std::move(bundle)),
      engines_(make_engines(bundle_, options)),
      window_(window_of(manifest(), engines_)),
      door_(manifest(), window_, options.truncate, options.max_targets),
      check_finite_(options.check_finite) {
  find_sources();
  find_shared();
  if (engines_.encoder->memory().device() != engines_.scorer->memory().device()) {
    fail(STCA_BUILD_ERROR, engines_.encoder->name(), " and ", engines_.scorer->name(),
         " keep states in different memories; run both halves on one engine");
  }
  encoded_together_ = engines_.encoder->largest_run();
  encoded_together_.tokens = std::min(encoded_together_.tokens, tokens_together);
  scored_together_ = engines_.scorer->largest_run();
  for (std::size_t i = 0; i < manifest().state.size(); ++i) {
    const StateSpec& spec = manifest().state[i];
    if (is_offsets(i) || spec.rows_are(tokens_symbol) || spec.rows_are(users_symbol)) continue;
    // What is neither per token nor per user cannot be parted, nor joined.
    encoded_together_.requests = scored_together_.requests = 1;
  }
  if (door_.stacked()) encoded_together_.requests = scored_together_.requests = 1;
  std::string format = layout(state_, manifest(), *engines_.encoder, window_);
  state_kind_ = std::make_shared<StateKind>(StateKind{manifest().weights, std::move(format)});
}

/// The manifest's contract says that each is there; only the engines' types are their own.
void Model::find_sources() {
  const GraphSpec& encoder = engines_.encoder->spec();
  const GraphSpec& scorer = engines_.scorer->spec();
  for (const TensorSpec& spec : encoder.inputs) {
    encoder_inputs_.push_back({false, static_cast<std::size_t>(door_.find(spec.name))});
  }
  for (const StateSpec& spec : manifest().state) {
    state_outputs_.push_back(index_of(encoder.outputs, spec.name).value());
    state_.push_back(encoder.outputs[state_outputs_.back()]);
  }
  for (const TensorSpec& spec : scorer.inputs) {
    const auto state = index_of(state_, spec.name);
    if (state && state_[*state].dtype != spec.dtype) {
      bundle_error(bundle_->path.string(), ": the two engines disagree on the type of '", shown(spec.name),
                   "'; build both again");
    }
    scorer_inputs_.push_back({state.has_value(), state ? *state : static_cast<std::size_t>(door_.find(spec.name))});
  }
  std::size_t sum = 0;  // the next of the state's sums, which the grower takes in their order
  for (const TensorSpec& spec : engines_.grower ? engines_.grower->spec().inputs : std::vector<TensorSpec>{}) {
    const bool kept = spec.scope == STCA_NO_SCOPE;
    while (kept && !manifest().state[sum].is_sum) ++sum;
    grower_inputs_.push_back({kept, kept ? sum++ : static_cast<std::size_t>(door_.find(spec.name))});
  }
}

void Model::find_shared() {
  std::map<std::string, std::pair<std::size_t, int>> known;
  const std::vector<TensorSpec>& inputs = door_.inputs();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].scope == STCA_USER || door_.is_offsets(static_cast<int>(i))) continue;
    for (std::size_t axis = 0; axis < inputs[i].shape.size(); ++axis) {
      const std::string& symbol = inputs[i].shape[axis].symbol;
      if (!symbol.empty()) known[symbol] = {i, static_cast<int>(axis)};
    }
  }
  for (std::size_t s = 0; s < state_.size(); ++s) {
    for (std::size_t axis = 0; axis < state_[s].shape.size(); ++axis) {
      const auto found = known.find(state_[s].shape[axis].symbol);
      if (found == known.end()) continue;
      shared_.push_back({s, static_cast<int>(axis), found->second.first, found->second.second});
    }
  }
}

void Model::check_shared(const UserState& state, const Row& row) const {
  for (const Shared& one : shared_) {
    const Array& array = row.arrays[one.input];
    const std::int64_t has = array.shape[one.input_axis], kept = state.tensors[one.state].shape[one.state_axis];
    if (has == kept) continue;
    const TensorSpec& spec = door_.inputs()[one.input];
    request_error(spec.name, ": has shape ", array.shape.text(), ", with ",
                  spec.shape[static_cast<std::size_t>(one.input_axis)].symbol, " = ", has, "; the user's inputs had ", kept);
  }
}

bool Model::is_offsets(std::size_t state) const {
  const auto& input = manifest().state[state].input;
  const int i = input ? door_.find(*input) : -1;
  return i >= 0 && door_.is_offsets(i);
}

void Model::check_output(const Engine& engine, std::size_t index, const Array& output,
                         const std::vector<Row>& rows) const {
  const TensorSpec& spec = engine.spec().outputs[index];
  bool fits = output.dtype == spec.dtype && output.shape.rank == static_cast<int>(spec.shape.size());
  for (int i = 0; fits && i < output.shape.rank; ++i) {
    const Axis& axis = spec.shape[static_cast<std::size_t>(i)];
    const std::int64_t expected = axis.symbol.empty() ? axis.size : door_.size_of(axis.symbol, rows);
    fits = expected < 0 || output.shape[i] == expected;  // -1: a size that requests do not decide
  }
  if (!fits) {
    engine_error(shown(engine.name()), " gave ", shown(spec.name), " as ", dtype_name(output.dtype), " ",
                 output.shape.text(), ", expected ", dtype_name(spec.dtype), " ", spec.shape_text(), " for ",
                 door_.size_of(tokens_symbol, rows), " tokens, ", door_.targets(rows), " targets, ", rows.size(),
                 " users; build the engine from this bundle again");
  }
}

std::vector<StateCache::State> Model::encode(const std::vector<Row>& rows) const {
  std::vector<StateCache::State> states(rows.size());
  encode(rows, Deadline::never(), [&](std::size_t i, std::shared_ptr<UserState> state) { states[i] = std::move(state); });
  return states;
}

void Model::encode(const std::vector<Row>& rows, const Deadline& deadline, const Made& made) const {
  std::vector<RunSize> sizes;
  for (const Row& row : rows) sizes.push_back({1, std::max<std::int64_t>(row.tokens, 0), 0});
  std::size_t begin = 0;
  for (std::size_t end : run_ends(sizes, encoded_together_)) {
    deadline.check();
    for (auto& state : encode_together(part(rows, begin, end))) made(begin++, std::move(state));
  }
}

std::vector<std::shared_ptr<UserState>> Model::encode_together(const std::vector<Row>& rows) const {
  std::vector<std::shared_ptr<UserState>> states;
  const std::vector<Array> outputs = engines_.encoder->run(feeds(encoder_inputs_, {}, rows));
  const auto users = static_cast<std::int64_t>(rows.size());
  for (std::size_t i : state_outputs_) check_output(*engines_.encoder, i, outputs[i], rows);
  std::int64_t begin = 0;
  for (std::int64_t user = 0; user < users; ++user) {
    auto state = std::make_shared<UserState>();
    state->tokens = std::max<std::int64_t>(rows[static_cast<std::size_t>(user)].tokens, 0);
    const std::int64_t end = begin + state->tokens;
    for (std::size_t i = 0; i < state_.size(); ++i) {
      const Array& all = outputs[state_outputs_[i]];
      if (users == 1) {
        state->tensors.push_back(all);
      } else if (is_offsets(i)) {
        state->tensors.push_back(offsets_array(state_[i].dtype, {state->tokens}));
      } else {  // copied: a view would keep all of them alive, uncounted
        const bool per_token = state_[i].rows_are(tokens_symbol);
        const Array part = core::rows(all, per_token ? begin : user, per_token ? end : user + 1);
        state->tensors.push_back(concatenate(engines_.encoder->memory(), state_[i].name, {&part}));
      }
    }
    begin = end;
    states.push_back(std::move(state));
  }
  return states;
}

std::vector<Array> Model::feeds(const std::vector<Source>& sources, const std::vector<StateCache::State>& states,
                                const std::vector<Row>& rows) const {
  std::vector<Array> arrays;
  arrays.reserve(sources.size());
  for (const Source& source : sources) {
    arrays.push_back(source.state ? join(source.index, states) : door_.pack(rows, static_cast<int>(source.index)));
  }
  return arrays;
}

Array Model::join(std::size_t index, const std::vector<StateCache::State>& states) const {
  if (states.size() == 1) return states[0]->tensors[index];
  if (is_offsets(index)) {
    std::vector<std::int64_t> counts;
    for (const auto& state : states) counts.push_back(state->tokens);
    return offsets_array(state_[index].dtype, counts);
  }
  std::vector<const Array*> parts;
  for (const auto& state : states) parts.push_back(&state->tensors[index]);
  return concatenate(engines_.scorer->memory(), state_[index].name, parts);
}

Array Model::score(const std::vector<StateCache::State>& states, const std::vector<Row>& rows,
                   const Deadline& deadline) const {
  deadline.check();
  if (rows.size() == 1) return score_together(states, rows);
  std::vector<RunSize> sizes;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    sizes.push_back({1, states[i]->tokens, std::max<std::int64_t>(rows[i].targets, 0)});
  }
  const std::vector<std::size_t> ends = run_ends(sizes, scored_together_);
  if (ends.size() == 1) return score_together(states, rows);
  std::vector<Array> scores;
  std::size_t begin = 0;
  for (std::size_t end : ends) {
    deadline.check();
    scores.push_back(score_together(part(states, begin, end), part(rows, begin, end)));
    begin = end;
  }
  std::vector<const Array*> parts;
  for (const Array& array : scores) parts.push_back(&array);
  return concatenate(Memory::host(), "scores", parts);
}

bool Model::gives_finite(const StateCache::State& state) const {
  std::vector<Row> rows(1);
  door_.make_up(state->tokens, rows[0]);
  const std::vector<Array> outputs = run_scorer({state}, rows);
  return std::all_of(outputs.begin(), outputs.end(), all_finite);
}

std::vector<Array> Model::run_scorer(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const {
  return engines_.scorer->run(feeds(scorer_inputs_, states, rows));
}

Array Model::score_together(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const {
  if (door_.targets(rows) == 0) return no_scores();  // of a batch whose other requests have some
  if (states.size() == 1) check_shared(*states[0], rows[0]);
  const std::vector<Array> outputs = run_scorer(states, rows);
  const std::int64_t targets = door_.targets(rows);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    check_output(*engines_.scorer, i, outputs[i], rows);
    if (outputs[i].shape[0] != (targets < 0 ? outputs[0].shape[0] : targets)) {
      engine_error(shown(engines_.scorer->name()), " gave ", shown(engines_.scorer->spec().outputs[i].name),
                   " of shape ", outputs[i].shape.text(), " for ", targets < 0 ? outputs[0].shape[0] : targets,
                   " targets; a model gives one row of scores for each");
    }
    if (check_finite_) check_scores(*engines_.scorer, engines_.scorer->spec().outputs[i], outputs[i]);
  }
  return scores_of(outputs);
}

Array Model::no_scores() const {
  std::vector<Array> outputs;
  for (const TensorSpec& spec : engines_.scorer->spec().outputs) {
    Shape shape{0};
    for (std::size_t i = 1; i < spec.shape.size(); ++i) {
      shape[shape.rank++] = std::max<std::int64_t>(spec.shape[i].size, 0);
    }
    outputs.push_back(make_array(Memory::host(), spec.dtype, shape).array);
  }
  return scores_of(outputs);
}

StateCache::State Model::put_off(const UserState& old, const Row& row) const {
  if (engines_.grower == nullptr) {
    request_error("append: ", shown(engines_.encoder->name()), " keeps sums of its own, to which nothing is added; send ",
                  "the whole history with a new version, or load with the engine \"graphs\"");
  }
  auto late = std::make_shared<UserState>(old);
  late->history.clear();
  late->tokens += std::max<std::int64_t>(row.tokens, 0);
  late->written = row.bytes();
  late->waiting = std::make_shared<const Row>(door_.behind(old.waiting.get(), row));
  return late;
}

StateCache::State Model::finished(const UserState& state) const {
  auto before = std::make_shared<UserState>(state);
  const Row& events = *before->waiting;
  UserState fresh;
  fresh.tokens = std::max<std::int64_t>(events.tokens, 0);
  before->tokens -= fresh.tokens;
  const std::vector<Array> outputs = engines_.grower->run(feeds(grower_inputs_, {before}, {events}));
  for (std::size_t i : state_outputs_) {
    check_output(*engines_.grower, i, outputs[i], {events});
    fresh.tensors.push_back(outputs[i]);
  }
  return extend(*before, fresh);
}

StateCache::State Model::extend(const UserState& old, const UserState& fresh) const {
  const std::int64_t total = old.tokens + fresh.tokens;
  auto state = std::make_shared<UserState>();
  state->tokens = std::min(total, window_.value_or(total));
  const std::int64_t dropped = total - state->tokens;
  std::vector<Array> kept, added;  // of each tensor with a row a token; cut first, so that only what is kept is copied
  for (std::size_t i = 0; i < state_.size(); ++i) {
    if (is_offsets(i) || !state_[i].rows_are(tokens_symbol)) continue;
    kept.push_back(rows(old.tensors[i], std::min(dropped, old.tokens), old.tokens));
    added.push_back(rows(fresh.tensors[i], std::max<std::int64_t>(0, dropped - old.tokens), fresh.tokens));
  }
  const bool in_place = !kept.empty() && dropped < old.tokens && !engines_.encoder->memory().device();
  if (in_place) {
    state->room = old.room;
    state->end = old.end;
    if (state->room == nullptr || !state->room->take(state->end, fresh.tokens)) {
      state->room = std::make_shared<Room>(kept, fresh.tokens);
      state->end = state->tokens - fresh.tokens;
      state->room->take(state->end, fresh.tokens);
      for (const Array& array : kept) state->written += array.bytes();
    }
  }
  std::size_t next = 0;  // of `kept` and `added`
  for (std::size_t i = 0; i < state_.size(); ++i) {
    if (manifest().grows() && !state_[i].rows_are(tokens_symbol)) state->written += fresh.tensors[i].bytes();
    if (is_offsets(i)) {
      state->tensors.push_back(offsets_array(state_[i].dtype, {state->tokens}));
    } else if (!state_[i].rows_are(tokens_symbol)) {
      state->tensors.push_back(manifest().grows() ? fresh.tensors[i] : old.tensors[i]);
    } else if (in_place) {
      state->tensors.push_back(state->room->write(next, state->end, added[next], state->tokens));
      state->written += added[next++].bytes();
    } else {
      const std::vector<const Array*> both{&kept[next], &added[next]};
      state->tensors.push_back(concatenate(engines_.encoder->memory(), state_[i].name, both));
      state->written += state->tensors.back().bytes();
      ++next;
    }
  }
  if (in_place) state->end += fresh.tokens;
  return state;
}

StateCache::State Model::replace(const UserState& old, const UserState& fresh, std::int64_t first) const {
  auto state = std::make_shared<UserState>();
  state->tokens = old.tokens;
  for (std::size_t i = 0; i < state_.size(); ++i) {
    if (is_offsets(i) || !state_[i].rows_are(tokens_symbol)) {
      state->tensors.push_back(old.tensors[i]);
      continue;
    }
    const Array before = rows(old.tensors[i], 0, first);
    const Array after = rows(old.tensors[i], first + fresh.tokens, old.tokens);
    state->tensors.push_back(
        concatenate(engines_.encoder->memory(), state_[i].name, {&before, &fresh.tensors[i], &after}));
    state->written += state->tensors.back().bytes();
  }
  return state;
}

}  // namespace stca::core
