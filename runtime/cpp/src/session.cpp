#include "session.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "error.hpp"

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
  return text + ";" + manifest.files.at(manifest.graph("user_encoder").file).sha256 + ";" + encoder.name();
}

/// A model's outputs as one array of scores: the only output as it is, several side by side as float32 columns.
Array scores_of(const std::vector<Array>& outputs) {
  if (outputs.size() == 1) return outputs[0];
  const std::int64_t targets = outputs[0].shape[0];
  std::int64_t columns = 0;
  std::vector<Array> parts;
  for (const Array& output : outputs) {
    parts.push_back(converted(output, STCA_FLOAT32));
    columns += static_cast<std::int64_t>(parts.back().row_bytes() / sizeof(float));
  }
  auto [scores, to] = make_array(Memory::host(), STCA_FLOAT32, {targets, columns});
  for (std::int64_t t = 0; t < targets; ++t) {
    for (const Array& part : parts) {
      const std::size_t bytes = part.row_bytes();
      Memory::host().copy(to, static_cast<const std::byte*>(part.data) + static_cast<std::size_t>(t) * bytes, bytes);
      to += bytes;
    }
  }
  return scores;
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

Model::Model(std::shared_ptr<const Bundle> bundle, const Options& options)
    : bundle_(std::move(bundle)),
      engines_(make_engines(bundle_, options)),
      window_(window_of(manifest(), engines_)),
      door_(manifest(), window_, options.truncate) {
  const auto malformed = [&](const std::string& why) {
    bundle_error(bundle_->path.string(), ": ", why, "; export the bundle again");
  };
  const GraphSpec& encoder = engines_.encoder->spec();
  const GraphSpec& scorer = engines_.scorer->spec();
  for (const TensorSpec& spec : encoder.inputs) {
    const int i = door_.find(spec.name);
    if (i < 0 || door_.inputs()[static_cast<std::size_t>(i)].scope != STCA_USER) {
      malformed("user_encoder takes '" + spec.name + "', which is no user input of the request graph");
    }
    encoder_inputs_.push_back({false, static_cast<std::size_t>(i)});
  }
  for (const StateSpec& spec : manifest().state) {
    const auto output = index_of(encoder.outputs, spec.name);
    if (!output) malformed("user_encoder does not give the state '" + spec.name + "'");
    state_outputs_.push_back(*output);
    state_.push_back(encoder.outputs[*output]);
  }
  for (const TensorSpec& spec : scorer.inputs) {
    if (const auto state = index_of(state_, spec.name)) {
      if (state_[*state].dtype != spec.dtype) malformed("the two engines disagree on the type of '" + spec.name + "'");
      scorer_inputs_.push_back({true, *state});
      continue;
    }
    const int i = door_.find(spec.name);
    if (i < 0 || door_.inputs()[static_cast<std::size_t>(i)].scope == STCA_USER) {
      malformed("target_scorer takes '" + spec.name + "', which is neither a state nor a request or target input");
    }
    scorer_inputs_.push_back({false, static_cast<std::size_t>(i)});
  }
  if (scorer.outputs.empty()) malformed("target_scorer has no output");
  for (const TensorSpec& spec : scorer.outputs) {
    if (spec.shape.empty() || kind_of(spec.dtype) != Kind::floating) {
      malformed("target_scorer's output '" + spec.name + "' is not one row of floating-point scores per target");
    }
  }
  if (engines_.encoder->memory().device() != engines_.scorer->memory().device()) {
    fail(STCA_BUILD_ERROR, engines_.encoder->name(), " and ", engines_.scorer->name(),
         " keep states in different memories; run both halves on one engine");
  }
  encoded_together_ = engines_.encoder->largest_run();
  encoded_together_.tokens = std::min(encoded_together_.tokens, tokens_together);
  scored_together_ = engines_.scorer->largest_run();
  std::string format = layout(state_, manifest(), *engines_.encoder, window_);
  state_kind_ = std::make_shared<StateKind>(StateKind{manifest().weights, std::move(format)});
}

bool Model::is_offsets(std::size_t state) const {
  const auto& input = manifest().state[state].input;
  const int i = input ? door_.find(*input) : -1;
  return i >= 0 && door_.is_offsets(i);
}

void Model::check_packable() const {
  door_.check_packable();
  for (std::size_t i = 0; i < manifest().state.size(); ++i) {
    const StateSpec& spec = manifest().state[i];
    if (!is_offsets(i) && !spec.rows_are(tokens_symbol) && !spec.rows_are(users_symbol)) {
      request_error("states of this model cannot be packed into batches (", spec.name, " is ", spec.shape_text(),
                    "); send one Request at a time");
    }
  }
}

void Model::check_output(const Engine& engine, std::size_t index, const Array& output, const Row& counts,
                         std::int64_t users) const {
  const TensorSpec& spec = engine.spec().outputs[index];
  bool fits = output.dtype == spec.dtype && output.shape.rank == static_cast<int>(spec.shape.size());
  for (int i = 0; fits && i < output.shape.rank; ++i) {
    const Axis& axis = spec.shape[static_cast<std::size_t>(i)];
    std::int64_t expected = axis.size;
    if (axis.symbol == tokens_symbol) expected = counts.tokens;
    if (axis.symbol == targets_symbol) expected = counts.targets;
    if (axis.symbol == users_symbol) expected = users;
    if (axis.symbol == offsets_symbol && users >= 0) expected = users + 1;
    fits = expected < 0 || output.shape[i] == expected;  // -1: a size this request does not decide
  }
  if (!fits) {
    fail(STCA_ENGINE_ERROR, engine.name(), " gave ", spec.name, " as ", dtype_name(output.dtype), " ",
         output.shape.text(), ", expected ", dtype_name(spec.dtype), " ", spec.shape_text(), " for ", counts.tokens,
         " tokens, ", counts.targets, " targets, ", users, " users; build the engine from this bundle again");
  }
}

std::vector<StateCache::State> Model::encode(const std::vector<Row>& rows) const {
  std::vector<RunSize> sizes;
  for (const Row& row : rows) sizes.push_back({1, std::max<std::int64_t>(row.tokens, 0), 0});
  std::vector<StateCache::State> states;
  std::size_t begin = 0;
  for (std::size_t end : run_ends(sizes, encoded_together_)) {
    encode_together(part(rows, begin, end), states);
    begin = end;
  }
  return states;
}

void Model::encode_together(const std::vector<Row>& rows, std::vector<StateCache::State>& states) const {
  Row counts;
  for (const Row& row : rows) {
    if (row.tokens >= 0) counts.tokens = std::max<std::int64_t>(counts.tokens, 0) + row.tokens;
  }
  std::vector<Array> feeds;
  feeds.reserve(encoder_inputs_.size());
  for (const Source& source : encoder_inputs_) feeds.push_back(door_.pack(rows, static_cast<int>(source.index)));
  const std::vector<Array> outputs = engines_.encoder->run(feeds);
  const auto users = static_cast<std::int64_t>(rows.size());
  for (std::size_t i : state_outputs_) {
    check_output(*engines_.encoder, i, outputs[i], counts, door_.ragged() ? users : -1);
  }
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

Array Model::score(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const {
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
    scores.push_back(score_together(part(states, begin, end), part(rows, begin, end)));
    begin = end;
  }
  std::vector<const Array*> parts;
  for (const Array& array : scores) parts.push_back(&array);
  return concatenate(Memory::host(), "scores", parts);
}

Array Model::score_together(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const {
  std::vector<Array> feeds;
  feeds.reserve(scorer_inputs_.size());
  for (const Source& source : scorer_inputs_) {
    feeds.push_back(source.state ? join(source.index, states) : door_.pack(rows, static_cast<int>(source.index)));
  }
  const std::vector<Array> outputs = engines_.scorer->run(feeds);
  Row counts;
  for (const Row& row : rows) {
    if (row.targets >= 0) counts.targets = std::max<std::int64_t>(counts.targets, 0) + row.targets;
  }
  const auto users = static_cast<std::int64_t>(rows.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    check_output(*engines_.scorer, i, outputs[i], counts, door_.ragged() ? users : -1);
    if (outputs[i].shape[0] != outputs[0].shape[0])
      fail(STCA_ENGINE_ERROR, "outputs differ in their number of targets");
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

StateCache::State Model::extend(const UserState& old, const UserState& fresh) const {
  const std::int64_t total = old.tokens + fresh.tokens;
  auto state = std::make_shared<UserState>();
  state->tokens = std::min(total, window_.value_or(total));
  const std::int64_t dropped = total - state->tokens;
  for (std::size_t i = 0; i < state_.size(); ++i) {
    if (is_offsets(i)) {
      state->tensors.push_back(offsets_array(state_[i].dtype, {state->tokens}));
    } else if (state_[i].rows_are(tokens_symbol)) {
      // Cut before joining, so that only what is kept is copied, once.
      const Array kept = rows(old.tensors[i], std::min(dropped, old.tokens), old.tokens);
      const Array added = rows(fresh.tensors[i], std::max<std::int64_t>(0, dropped - old.tokens), fresh.tokens);
      state->tensors.push_back(concatenate(engines_.encoder->memory(), state_[i].name, {&kept, &added}));
    } else {
      state->tensors.push_back(old.tensors[i]);
    }
  }
  return state;
}

Session::Session(const std::string& path, Options options)
    : options_(std::move(options)),
      cache_(options_.cache_bytes),
      model_(std::make_shared<const Model>(Bundle::load(path), options_)) {}

std::shared_ptr<const Model> Session::model() const {
  const std::lock_guard lock(mutex_);
  return model_;
}

Array Session::score(const std::vector<RequestView>& requests) { return score(*model(), requests); }

Array Session::score(const stca_request_batch& batch) {
  const ModelPtr model = this->model();
  const std::vector<CutRequest> cut = model->door().unpack(batch);
  std::vector<RequestView> requests;
  for (const CutRequest& r : cut) requests.push_back({{r.inputs.data(), r.inputs.size()}, r.user, r.version});
  return score(*model, requests);
}

Array Session::score(const Model& model, const std::vector<RequestView>& requests) {
  if (requests.empty()) return model.no_scores();
  if (requests.size() > 1) model.check_packable();

  // Everything is checked before anything is computed, so a refused request leaves no trace but a miss.
  const Door& door = model.door();
  std::vector<Row> rows(requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) {
    door.admit(requests[i].inputs, STCA_REQUEST | STCA_TARGET, STCA_USER, rows[i]);
  }
  std::vector<std::optional<StateKey>> keys(requests.size());
  std::vector<StateCache::State> states(requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const RequestView& request = requests[i];
    if (request.user != nullptr && request.version != nullptr) {
      keys[i] = model.key(request.user, request.version);
      states[i] = cache_.get(*keys[i]);
      if (states[i] != nullptr) continue;
      if (door.has_user_inputs() && !door.any_user_input(request.inputs)) {
        request_error("user '", request.user, "': no state of version '", request.version,
                      "' is kept; send the user inputs");
      }
    }
    door.admit(request.inputs, STCA_USER, STCA_REQUEST | STCA_TARGET, rows[i]);
    if (request.user != nullptr && request.version == nullptr) {
      keys[i] = model.key(request.user, door.digest(rows[i]));
      states[i] = cache_.get(*keys[i]);
    }
  }
  std::map<std::pair<std::string, std::string>, std::size_t> first;  // a user of several requests is encoded once
  std::vector<std::size_t> missing, place(requests.size());
  std::vector<Row> users;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (states[i] != nullptr) continue;
    place[i] = missing.size();
    if (keys[i]) place[i] = first.emplace(std::pair{keys[i]->user, keys[i]->version}, missing.size()).first->second;
    if (place[i] < missing.size()) continue;
    missing.push_back(i);
    users.push_back(rows[i]);
  }
  const std::vector<StateCache::State> fresh = model.encode(users);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (states[i] == nullptr) states[i] = fresh[place[i]];
  }
  for (std::size_t i : missing) {
    if (keys[i]) keep(model, std::move(*keys[i]), states[i]);
  }
  return model.score(states, rows);
}

bool Session::keep(const Model& model, StateKey key, const StateCache::State& state,
                   const StateCache::State& instead_of) {
  // After a swap, the state of an old model would only be in the way.
  return this->model().get() == &model && cache_.put(std::move(key), state, instead_of);
}

bool Session::append(const std::string& user, Inputs events, const char* version, const char* after) {
  const ModelPtr model = this->model();
  if (version == nullptr) {
    request_error("version: is null; name the history with the new events, or no request will find it");
  }
  if (!model->manifest().appendable) {
    request_error("this bundle's states cannot be appended to; send the whole history with a new version");
  }
  Row row;
  model->door().admit_events(events, row);
  const auto held = cache_.find(user);
  if (!held || !(*held->first.kind == model->state_kind())) return false;
  if (held->first.version == version) return true;  // the same call again, after a timeout perhaps: its events are in
  if (after != nullptr && held->first.version != after) return false;
  const StateCache::State fresh = model->encode(row);
  return keep(*model, model->key(user, version), model->extend(*held->second, *fresh), held->second);
}

void Session::swap(const std::string& path) {
  const std::shared_ptr<const Bundle> bundle = Bundle::load(path);
  check_swap(path, model()->manifest(), bundle->manifest);
  const auto next = std::make_shared<const Model>(bundle, options_);
  ModelPtr last;
  {
    const std::lock_guard lock(mutex_);
    last = std::exchange(model_, next);
  }
  if (!(last->state_kind() == next->state_kind())) cache_.clear();
}

}  // namespace stca::core
