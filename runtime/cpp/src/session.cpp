#include "session.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "error.hpp"

namespace stca::core {
namespace {

std::string layout(const Manifest& manifest) {
  std::string text;
  for (const StateSpec& spec : manifest.state)
    text += spec.name + ":" + dtype_name(spec.dtype) + ":" + spec.shape_text() + ";";
  return text;
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
      door_(manifest(), options.truncate),
      state_kind_(std::make_shared<StateKind>(StateKind{manifest().weights, layout(manifest())})) {
  const auto malformed = [&](const std::string& why) {
    bundle_error(bundle_->path.string(), ": ", why, "; export the bundle again");
  };
  const GraphSpec& encoder = manifest().graph("user_encoder");
  const GraphSpec& scorer = manifest().graph("target_scorer");
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
  }
  for (const TensorSpec& spec : scorer.inputs) {
    if (const auto state = index_of(manifest().state, spec.name)) {
      scorer_inputs_.push_back({true, *state});
      continue;
    }
    const int i = door_.find(spec.name);
    if (i < 0 || door_.inputs()[static_cast<std::size_t>(i)].scope == STCA_USER) {
      malformed("target_scorer takes '" + spec.name + "', which is neither a state nor a request or target input");
    }
    scorer_inputs_.push_back({false, static_cast<std::size_t>(i)});
  }
  if (scorer.outputs.empty() || scorer.outputs[0].shape.empty() || kind_of(scorer.outputs[0].dtype) != Kind::floating) {
    malformed("target_scorer has no floating-point output with one row per target");
  }
  engines_ = make_engines(bundle_, options);
  if (engines_.encoder->memory().device() != engines_.scorer->memory().device()) {
    fail(STCA_BUILD_ERROR, engines_.encoder->name(), " and ", engines_.scorer->name(),
         " keep states in different memories; run both halves on one engine");
  }
}

bool Model::is_offsets(const StateSpec& spec) const {
  const int i = spec.input ? door_.find(*spec.input) : -1;
  return i >= 0 && door_.is_offsets(i);
}

void Model::check_packable() const {
  door_.check_packable();
  for (const StateSpec& spec : manifest().state) {
    if (!is_offsets(spec) && !spec.rows_are(tokens_symbol) && !spec.rows_are(users_symbol)) {
      request_error("states of this model cannot be packed into batches (", spec.name, " is ", spec.shape_text(),
                    "); send one Request at a time");
    }
  }
}

void Model::check_output(const std::string& graph, const TensorSpec& spec, const Array& output, const Row& counts,
                         std::int64_t users) const {
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
    fail(STCA_BUILD_ERROR, graph, ": the engine gave ", spec.name, " as ", dtype_name(output.dtype), " ",
         output.shape.text(), ", the manifest says ", dtype_name(spec.dtype), " ", spec.shape_text(),
         "; build the engine from this bundle again");
  }
}

StateCache::State Model::encode(const Row& row) const {
  std::vector<Array> feeds;
  feeds.reserve(encoder_inputs_.size());
  for (const Source& source : encoder_inputs_) {
    const bool offsets = door_.is_offsets(static_cast<int>(source.index));
    const std::int64_t tokens = std::max<std::int64_t>(row.tokens, 0);
    feeds.push_back(offsets ? offsets_array(door_.inputs()[source.index].dtype, {tokens}) : row.arrays[source.index]);
  }
  const std::vector<Array> outputs = engines_.encoder->run(feeds);
  auto state = std::make_shared<UserState>();
  state->tokens = std::max<std::int64_t>(row.tokens, 0);
  const GraphSpec& graph = manifest().graph("user_encoder");
  for (std::size_t i : state_outputs_) {
    check_output("user_encoder", graph.outputs[i], outputs[i], row, door_.ragged() ? 1 : -1);
    state->tensors.push_back(outputs[i]);
  }
  return state;
}

Array Model::join(std::size_t index, const std::vector<StateCache::State>& states) const {
  if (states.size() == 1) return states[0]->tensors[index];
  const StateSpec& spec = manifest().state[index];
  if (is_offsets(spec)) {
    std::vector<std::int64_t> counts;
    for (const auto& state : states) counts.push_back(state->tokens);
    return offsets_array(spec.dtype, counts);
  }
  std::vector<const Array*> parts;
  for (const auto& state : states) parts.push_back(&state->tensors[index]);
  return concatenate(engines_.scorer->memory(), spec.name, parts);
}

Array Model::score(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const {
  std::vector<Array> feeds;
  feeds.reserve(scorer_inputs_.size());
  for (const Source& source : scorer_inputs_) {
    feeds.push_back(source.state ? join(source.index, states) : door_.pack(rows, static_cast<int>(source.index)));
  }
  std::vector<Array> outputs = engines_.scorer->run(feeds);
  Row counts;
  for (const Row& row : rows)
    counts.targets = row.targets < 0 ? -1 : std::max<std::int64_t>(counts.targets, 0) + row.targets;
  const auto users = static_cast<std::int64_t>(rows.size());
  check_output("target_scorer", manifest().graph("target_scorer").outputs[0], outputs[0], counts,
               door_.ragged() ? users : -1);
  return outputs[0];
}

StateCache::State Model::extend(const UserState& old, const UserState& fresh) const {
  const std::int64_t total = old.tokens + fresh.tokens;
  auto state = std::make_shared<UserState>();
  state->tokens = std::min(total, manifest().max_history.value_or(total));
  const std::int64_t dropped = total - state->tokens;
  for (std::size_t i = 0; i < manifest().state.size(); ++i) {
    const StateSpec& spec = manifest().state[i];
    if (is_offsets(spec)) {
      state->tensors.push_back(offsets_array(spec.dtype, {state->tokens}));
    } else if (spec.rows_are(tokens_symbol)) {
      // Cut before joining, so that only what is kept is copied, once.
      const Array kept = rows(old.tensors[i], std::min(dropped, old.tokens), old.tokens);
      const Array added = rows(fresh.tensors[i], std::max<std::int64_t>(0, dropped - old.tokens), fresh.tokens);
      state->tensors.push_back(concatenate(engines_.encoder->memory(), spec.name, {&kept, &added}));
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
  if (requests.empty()) {
    const TensorSpec& spec = model.manifest().graph("target_scorer").outputs[0];
    Shape shape{0};
    for (std::size_t i = 1; i < spec.shape.size(); ++i)
      shape[shape.rank++] = std::max<std::int64_t>(spec.shape[i].size, 0);
    return make_array(Memory::host(), spec.dtype, shape).array;
  }
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
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (states[i] != nullptr) continue;
    states[i] = model.encode(rows[i]);
    if (keys[i]) cache_.put(std::move(*keys[i]), states[i]);
  }
  return model.score(states, rows);
}

bool Session::append(const std::string& user, Inputs events, const std::string& version) {
  const ModelPtr model = this->model();
  if (!model->manifest().appendable) {
    request_error("this bundle's states cannot be appended to; send the whole history with a new version");
  }
  Row row;
  model->door().admit_events(events, row);
  const auto held = cache_.find(user);
  if (!held || !(*held->first.kind == model->state_kind())) return false;
  const StateCache::State fresh = model->encode(row);
  return cache_.put(model->key(user, version), model->extend(*held->second, *fresh));
}

void Session::swap(const std::string& path) {
  auto next = std::make_shared<const Model>(Bundle::load(path), options_);
  ModelPtr last;
  {
    const std::lock_guard lock(mutex_);
    last = std::exchange(model_, next);
  }
  if (!(last->state_kind() == next->state_kind())) cache_.clear();
}

}  // namespace stca::core
