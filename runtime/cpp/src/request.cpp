#include "request.hpp"

#include <algorithm>
#include <limits>

#include "digest.hpp"
#include "error.hpp"
#include "text.hpp"
#include "values.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

// Symbols every door knows, in this order; the model's own follow.
constexpr std::string_view known_symbols[] = {tokens_symbol, targets_symbol, users_symbol, offsets_symbol};
enum : std::size_t { tokens_id, targets_id, users_id, offsets_id };

/// A shape as Python writes it, "(3, 2)" or "(3,)": the two runtimes' digests of a history are one.
std::string tuple_text(const Shape& shape) {
  std::string text = shape.text();
  text.front() = '(';
  text.back() = shape.rank == 1 ? ',' : ')';
  return shape.rank == 1 ? text + ")" : text;
}

/// What to do about several values of an input of which a request has one: they may have been meant for targets.
std::string advice(const TensorSpec& spec, const Shape& shape) {
  const int rank = static_cast<int>(spec.shape.size());
  const bool row = rank > 0 && (spec.shape[0].size == 1 || spec.rows_are(users_symbol));
  const bool once = rank < shape.rank || (rank == shape.rank && row);
  if (spec.scope != STCA_REQUEST || !once || shape[0] == 1) return "";
  return "; it has one value per request: make it a target input if it differs between targets";
}

}  // namespace

Door::Door(const Manifest& manifest, std::optional<std::int64_t> window, bool truncate, std::int64_t max_targets)
    : inputs_(manifest.graph("request").inputs),
      window_(window),
      shortest_(manifest.min_history),
      max_targets_(max_targets),
      truncate_(truncate) {
  for (std::string_view symbol : known_symbols) symbol_ids_.emplace(symbol, symbol_ids_.size());
  bool tokens = false, targets = false;
  for (const TensorSpec& spec : inputs_) {
    index_.emplace(spec.name, static_cast<int>(index_.size()));
    offsets_.push_back(spec.rows_are(offsets_symbol));
    if (offsets_.back()) (spec.scope == STCA_USER ? tokens : targets) = true;
    has_user_inputs_ = has_user_inputs_ || (spec.scope == STCA_USER && !offsets_.back());
    std::vector<int>& axes = symbols_.emplace_back();
    for (const Axis& axis : spec.shape) {
      const std::size_t next = symbol_ids_.size();
      axes.push_back(axis.symbol.empty() ? -1 : static_cast<int>(symbol_ids_.emplace(axis.symbol, next).first->second));
    }
  }
  ragged_ = tokens || targets;
  grows_ = manifest.grows();
  for (const TensorSpec& spec : inputs_) {
    const auto found = symbol_ids_.find(spec.length_of);
    const bool counts = found != symbol_ids_.end() && kind_of(spec.dtype) == Kind::integer;
    length_of_.push_back(counts ? static_cast<int>(found->second) : -1);
  }
  for (const Padding& padding : manifest.padding) {
    histories_.emplace_back(padding, inputs_, manifest.min_history, window, truncate);
  }
  stacked_ = !inputs_.empty();
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const TensorSpec& spec = inputs_[i];
    stacked_ = stacked_ && (spec.scope == STCA_TARGET ? spec.rows_are(targets_symbol)
                                                      : !spec.shape.empty() && spec.shape[0].size == 1);
    const bool packable = offsets_[i] || spec.rows_are(users_symbol) || (tokens && spec.rows_are(tokens_symbol)) ||
                          (targets && spec.rows_are(targets_symbol));
    if (!packable) unpackable_ = spec.name;
  }
  // Targets are counted by the symbol that has that meaning, or by the one that the scores' rows have.
  const std::vector<Axis>& scores = manifest.graph("target_scorer").outputs[0].shape;
  for (const TensorSpec& spec : inputs_) {
    if (spec.counts(targets_symbol)) target_symbol_ = static_cast<int>(targets_id);
  }
  const auto rows = symbol_ids_.find(scores[0].symbol);
  if (target_symbol_ < 0 && rows != symbol_ids_.end()) target_symbol_ = static_cast<int>(rows->second);
}

std::int64_t Door::size_of(std::string_view symbol, const std::vector<Row>& rows) const {
  const auto found = symbol_ids_.find(symbol);
  if (found == symbol_ids_.end()) return -1;
  const std::size_t id = found->second;
  if (ragged_ && id == users_id) return static_cast<std::int64_t>(rows.size());
  if (ragged_ && id == offsets_id) return static_cast<std::int64_t>(rows.size()) + 1;
  std::int64_t sum = 0;
  for (const Row& row : rows) {
    if (row.sizes.empty() || row.sizes[id] < 0) return -1;
    sum += row.sizes[id];
  }
  return id == tokens_id || id == targets_id || rows.size() == 1 ? sum : -1;
}

std::int64_t Door::targets(const std::vector<Row>& rows) const {
  std::int64_t sum = 0;
  for (const Row& row : rows) {
    if (row.targets < 0) return -1;
    sum += row.targets;
  }
  return sum;
}

std::int64_t Door::targets_of(const Row& row) const {
  if (target_symbol_ >= 0 && row.sizes[static_cast<std::size_t>(target_symbol_)] >= 0) {
    return row.sizes[static_cast<std::size_t>(target_symbol_)];
  }
  std::int64_t targets = -1;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].scope != STCA_TARGET || offsets_[i]) continue;
    const Shape& shape = row.arrays[i].shape;
    if (shape.rank < 1 || (targets >= 0 && shape[0] != targets)) return -1;
    targets = shape[0];
  }
  return targets;
}

int Door::find(const char* name) const { return name == nullptr ? -1 : find(std::string_view(name)); }

int Door::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? -1 : found->second;
}

bool Door::any_user_input(Inputs inputs) const {
  for (const stca_tensor& tensor : inputs) {
    const int i = find(tensor.name);
    if (i >= 0 && !is_offsets(i) && inputs_[static_cast<std::size_t>(i)].scope == STCA_USER) return true;
  }
  return false;
}

std::vector<std::string> Door::known_names() const {
  std::vector<std::string> known;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (!offsets_[i]) known.push_back(inputs_[i].name);
  }
  return known;
}

std::string Door::names() const {
  std::string text;
  for (const std::string& name : known_names()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

bool Door::once_per_user(std::size_t index) const {
  return !grows_ && inputs_[index].scope == STCA_USER && !offsets_[index] && !inputs_[index].rows_are(tokens_symbol);
}

Door::Given Door::sort(Inputs inputs, int scopes, int others, const char* call) const {
  Given given(inputs_.size());
  for (const stca_tensor& tensor : inputs) {
    if (tensor.name == nullptr) request_error("an input has no name");
    const int found = find(tensor.name);
    if (found < 0) {
      request_error(in_quotes(tensor.name), ": the model has no such input; it takes ", head(names(), 600),
                    did_you_mean(tensor.name, known_names()));
    }
    if (is_offsets(found)) {
      request_error(shown(tensor.name), ": is made by the runtime for a single request; leave it out");
    }
    const auto i = static_cast<std::size_t>(found);
    if ((inputs_[i].scope & (scopes | others)) == 0) {
      request_error(shown(tensor.name), ": is no part of an event; ", call, " takes the ", grows_ ? "" : "per-token ",
                    "user inputs alone");
    }
    if (given[i] != nullptr) request_error(shown(tensor.name), ": is given twice");
    given[i] = &tensor;
  }
  return given;
}

void Door::admit(Inputs inputs, int scopes, int others, Row& row) const {
  admit_sorted(sort(inputs, scopes, others, ""), scopes, false, true, row);
}

void Door::admit_events(Inputs events, const char* call, bool cut, Row& row) const {
  const Given given = sort(events, STCA_USER, 0, call);
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (given[i] != nullptr && once_per_user(i)) {
      request_error(inputs_[i].name, ": is no part of an event; ", call, " takes the per-token user inputs alone");
    }
  }
  admit_sorted(given, STCA_USER, true, cut, row);
}

void Door::admit_sorted(const Given& given, int scopes, bool events, bool cut, Row& row) const {
  Agreed sizes(symbol_ids_.size());
  if (ragged_) sizes[users_id] = {1, "one request"};
  row.arrays.resize(inputs_.size());
  History::Sent completed;
  if (!histories_.empty() && (scopes & STCA_USER) != 0) completed = complete(given);
  std::vector<std::pair<std::size_t, Array>> shared;  // one target's value, without the axis of targets
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const TensorSpec& spec = inputs_[i];
    if ((spec.scope & scopes) == 0 || offsets_[i]) continue;
    if (events && once_per_user(i)) {
      row.arrays[i] = placeholder(spec);
      continue;
    }
    if (!completed.empty() && completed[i]) {
      row.arrays[i] = array(i, *completed[i], sizes);
      continue;
    }
    if (given[i] == nullptr) {
      request_error(spec.name, ": is missing; the model needs it (", scope_name(spec.scope), " input)");
    }
    const Array raw = of_kind(i, *given[i]);
    if (spec.scope == STCA_TARGET && raw.shape.rank == static_cast<int>(symbols_[i].size()) - 1 && symbols_[i][0] >= 0) {
      shared.emplace_back(i, raw);
    } else {
      row.arrays[i] = array(i, raw, sizes);
    }
  }
  for (const auto& [i, raw] : shared) {
    const std::int64_t targets = sizes[static_cast<std::size_t>(symbols_[i][0])].size;
    row.arrays[i] = array(i, repeated(raw, targets < 0 ? 1 : targets), sizes);
  }
  check_lengths(row, sizes);
  if ((scopes & STCA_USER) != 0) {
    limit_history(row, sizes[tokens_id], cut);
    row.tokens = sizes[tokens_id].size;
  }
  if (const TensorSpec* const spec = events ? nullptr : only_blank(row)) {
    request_error(spec->name, ": holds nothing but ", *spec->blank,
                  ", for which the model has no finite score; send at least one other value");
  }
  row.sizes.resize(sizes.size(), -1);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i].size >= 0) row.sizes[i] = sizes[i].size;
  }
  if ((scopes & STCA_TARGET) != 0) row.targets = targets_of(row);
}

History::Sent Door::complete(const Given& given) const {
  History::Sent sent(inputs_.size());
  for (const History& history : histories_) {
    for (const std::size_t i : history.inputs()) {
      if (given[i] == nullptr) continue;
      sent[i] = of_kind(i, *given[i]);
      checked(inputs_[i], *sent[i]);  // here, where each value has the place that the caller knows
    }
    history.complete(sent);
  }
  return sent;
}

std::string Door::why_not_changeable(bool amend) const {
  const std::string done = amend ? "amended" : "appended";
  for (const History& history : histories_) {
    if (history.size() >= 0) {
      return "the model's history is padded to " + std::to_string(history.size()) + " events, so none can be " + done;
    }
  }
  for (const TensorSpec& spec : inputs_) {
    if (spec.scope == STCA_USER && spec.counts(tokens_symbol) && !spec.rows_are(tokens_symbol)) {
      return "the model has the events of " + spec.name + " on another axis than the first, so none can be " + done;
    }
  }
  return "this bundle's states cannot be " + (amend ? done : "appended to") +
         ": their events depend on each other or on other inputs";
}

Array Door::of_kind(std::size_t index, const stca_tensor& value) const {
  const TensorSpec& spec = inputs_[index];
  Array raw = view_of(value);
  if (raw.shape.elements() == 0 && raw.dtype == STCA_FLOAT64) raw.dtype = spec.dtype;  // an empty list has no dtype of its own
  if (kind_of(raw.dtype) != kind_of(spec.dtype)) {
    request_error(spec.name, ": has dtype ", dtype_name(raw.dtype), ", expected ", dtype_name(spec.dtype));
  }
  return raw;
}

Array Door::array(std::size_t index, Array raw, Agreed& sizes) const {
  const TensorSpec& spec = inputs_[index];
  const std::vector<int>& symbols = symbols_[index];
  const int rank = static_cast<int>(symbols.size());
  if (raw.shape.rank == rank - 1 &&
      (symbols[0] >= 0 ? sizes[static_cast<std::size_t>(symbols[0])].size : spec.shape[0].size) == 1) {
    Shape shape{1};  // one user's value, given without the batch axis
    for (int i = 0; i < raw.shape.rank; ++i) shape[shape.rank++] = raw.shape[i];
    raw.shape = shape;
  }
  if (raw.shape.rank != rank) {
    request_error(spec.name, ": has shape ", raw.shape.text(), ", expected ", spec.shape_text(), advice(spec, raw.shape));
  }
  for (int i = 0; i < rank; ++i) {
    const Axis& axis = spec.shape[static_cast<std::size_t>(i)];
    Bound fixed{axis.size, ""};
    const int symbol = symbols[static_cast<std::size_t>(i)];
    Bound& bound = symbol < 0 ? fixed : sizes[static_cast<std::size_t>(symbol)];
    if (bound.size < 0) bound = {raw.shape[i], spec.name.c_str()};
    if (raw.shape[i] == bound.size) {
      if (symbol == static_cast<int>(tokens_id) && !truncate_) check_history(bound);  // before values are looked at
      if (symbol == static_cast<int>(targets_id)) check_targets(bound.size, spec.name);
      continue;
    }
    std::string wrong = "expected " + spec.shape_text();
    if (symbol >= 0 && *bound.because != 0) {  // which of the two is wrong, nothing tells
      wrong = "so " + axis.symbol + " = " + std::to_string(raw.shape[i]) + ", but " + bound.because + " has " +
              axis.symbol + " = " + std::to_string(bound.size) + "; send as many of both";
    }
    request_error(spec.name, ": has shape ", raw.shape.text(), ", ", wrong, advice(spec, raw.shape));
  }
  return checked(spec, raw);
}

void Door::check_lengths(const Row& row, const Agreed& sizes) const {
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (length_of_[i] < 0 || row.arrays[i].data == nullptr) continue;
    const Bound& of = sizes[static_cast<std::size_t>(length_of_[i])];
    if (of.size < 0) continue;
    std::int64_t most = std::numeric_limits<std::int64_t>::min();
    for (std::size_t k = 0; k < row.arrays[i].shape.elements(); ++k) most = std::max(most, integer_at(row.arrays[i], k));
    if (most > of.size) {
      request_error(inputs_[i].name, ": holds ", most, ", which is more than the ", of.size, " rows of ", of.because);
    }
  }
}

void Door::check_targets(std::int64_t targets, const std::string& name) const {
  if (targets <= max_targets_) return;
  request_error(name, ": has ", targets, " targets, the limit is ", max_targets_,
                "; send fewer at once, or load the session with max_targets");
}

void Door::check_history(const Bound& tokens) const {
  if (!window_ || tokens.size <= *window_) return;
  request_error(tokens.because, ": has ", tokens.size, " tokens, the limit is ", *window_,
                "; send the most recent ones, or load the session with truncate=True");
}

void Door::limit_history(Row& row, Bound& tokens, bool cut) const {
  if (tokens.size >= 0 && tokens.size < shortest_) {
    request_error(tokens.because, ": has ", tokens.size, " tokens, the model needs at least ", shortest_);
  }
  if (!window_ || tokens.size <= *window_ || !cut) return;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].scope == STCA_USER && inputs_[i].counts(tokens_symbol)) row.arrays[i] = recent(i, row.arrays[i]);
  }
  tokens.size = *window_;
}

Array Door::recent(std::size_t index, Array array) const {
  const Shape whole = array.shape;
  int before = 0;  // axes of 1 before the history's
  while (inputs_[index].shape[static_cast<std::size_t>(before)].symbol != tokens_symbol) {
    if (whole[before++] != 1) {
      request_error(inputs_[index].name, ": has ", whole.text(), ", of which the most recent ", *window_,
                    " cannot be kept; send no more than those");
    }
  }
  array.shape.rank = whole.rank - before;
  for (int i = before; i < whole.rank; ++i) array.shape[i - before] = whole[i];
  array = rows(array, whole[before] - *window_, whole[before]);
  array.shape = whole;
  array.shape[before] = *window_;
  return array;
}

Row Door::behind(const Row* first, const Row& events) const {
  Row both = events;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].scope != STCA_USER || offsets_[i]) continue;
    const auto counted = std::find(symbols_[i].begin(), symbols_[i].end(), static_cast<int>(tokens_id));
    std::vector<const Array*> parts{&events.arrays[i]};
    if (first != nullptr && counted != symbols_[i].end()) parts.insert(parts.begin(), &first->arrays[i]);
    const auto axis = counted == symbols_[i].end() ? 0 : static_cast<int>(counted - symbols_[i].begin());
    Shape like = parts.front()->shape;
    like[axis] = events.arrays[i].shape[axis];
    if (!(like == events.arrays[i].shape)) {
      request_error(inputs_[i].name, ": has shape ", events.arrays[i].shape.text(), ", and the events before have ",
                    parts.front()->shape.text(), "; they must agree in all but axis ", axis,
                    ", or send the whole history with a new version");
    }
    both.arrays[i] = concatenate(Memory::host(), inputs_[i].name, parts, axis);
  }
  if (first != nullptr) {
    both.tokens += first->tokens;
    both.sizes[tokens_id] += first->sizes[tokens_id];
  }
  return both;
}

std::string Door::digest(const Row& row) const {
  Sha1 digest;  // speed matters here, not secrecy
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].scope != STCA_USER || offsets_[i]) continue;
    digest.update(tuple_text(row.arrays[i].shape));
    digest.update(row.arrays[i].data, row.arrays[i].bytes());
  }
  return digest.hex();
}

}  // namespace stca::core
