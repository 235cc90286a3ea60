#include "request.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "error.hpp"
#include "sha256.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

// Symbols every door knows, in this order; the model's own follow.
constexpr std::string_view known_symbols[] = {tokens_symbol, targets_symbol, users_symbol, offsets_symbol};
enum : std::size_t { tokens_id, targets_id, users_id };

const char* scope_name(stca_scope scope) {
  return scope == STCA_USER ? "user" : scope == STCA_REQUEST ? "request" : "target";
}

/// The caller's tensor as an array that borrows its memory, if it can be one at all.
Array view_of(const stca_tensor& tensor) {
  if (tensor.dtype < STCA_BOOL || tensor.dtype > STCA_UINT64) {
    request_error(tensor.name, ": has dtype number ", tensor.dtype, ", which is none of stca_dtype");
  }
  if (tensor.rank < 0 || tensor.rank > STCA_MAX_RANK) {
    request_error(tensor.name, ": has ", tensor.rank, " axes, the limit is ", STCA_MAX_RANK);
  }
  Array array;
  array.dtype = static_cast<DType>(tensor.dtype);
  array.data = tensor.data;
  array.shape.rank = tensor.rank;
  const auto item = item_bytes(array.dtype);
  auto left = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) / item;  // no product may overflow
  for (int i = 0; i < tensor.rank; ++i) {
    const std::int64_t n = array.shape[i] = tensor.shape[i];
    if (n < 0 || (n > 0 && static_cast<std::uint64_t>(n) > left)) {
      request_error(tensor.name, ": has ", n, " rows on axis ", i, "; no array has this shape");
    }
    if (n > 0) left /= static_cast<std::uint64_t>(n);
  }
  if (array.shape.elements() > 0) {
    if (tensor.data == nullptr) request_error(tensor.name, ": has shape ", array.shape.text(), " but no data");
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % item != 0) {
      request_error(tensor.name, ": its data is not aligned to the ", item, " bytes of a ", dtype_name(array.dtype));
    }
  }
  return array;
}

/// Index of the first element outside [low, high], or `count`.
template <class T>
std::size_t first_outside(const T* data, std::size_t count, std::int64_t low, std::uint64_t high) {
  if (!std::is_signed_v<T> && low < 0) low = 0;
  // Both limits in one comparison: counted from `low`, what lies below it wraps round to above `span`.
  const auto base = static_cast<std::uint64_t>(low), span = high - base;
  const auto outside = [&](T x) {
    return static_cast<std::uint64_t>(
               static_cast<std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>>(x)) -
               base >
           span;
  };
  bool any = false;
  for (std::size_t i = 0; i < count; ++i) any |= outside(data[i]);  // without a branch, this is what the hot path pays
  if (!any) return count;
  std::size_t i = 0;
  while (!outside(data[i])) ++i;
  return i;
}

/// "[1, 0]", the place of an element counted row by row.
std::string place_of(std::size_t index, const Shape& shape) {
  Shape place = shape;
  for (int i = shape.rank - 1; i >= 0; --i) {
    place[i] = static_cast<std::int64_t>(index % static_cast<std::size_t>(shape[i]));
    index /= static_cast<std::size_t>(shape[i]);
  }
  return place.text();
}

/// `array` is what `given` became in the model's type: a float64 can be finite and yet too large for it.
void check_finite(const TensorSpec& spec, const Array& array, const Array& given) {
  visit_floating(array.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(array.data);
    for (std::size_t i = 0, count = array.shape.elements(); i < count; ++i) {
      if (std::isfinite(static_cast<double>(data[i]))) continue;
      visit_floating(given.dtype, [&](auto given_type) {
        const auto value = static_cast<double>(static_cast<const decltype(given_type)*>(given.data)[i]);
        request_error(spec.name, ": holds ", value, " at ", place_of(i, array.shape), "; values must be finite as ",
                      dtype_name(spec.dtype));
      });
    }
  });
}

void check_range(const TensorSpec& spec, const Array& array) {
  if (spec.limit == 0 && array.dtype == spec.dtype) return;
  std::int64_t low = 0;
  std::uint64_t high = 0;
  if (spec.limit > 0) {
    high = static_cast<std::uint64_t>(spec.limit - 1);
  } else {
    visit_integer(spec.dtype, [&](auto type) {
      low = static_cast<std::int64_t>(std::numeric_limits<decltype(type)>::min());
      high = static_cast<std::uint64_t>(std::numeric_limits<decltype(type)>::max());
    });
  }
  visit_integer(array.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(array.data);
    const std::size_t count = array.shape.elements(), at = first_outside(data, count, low, high);
    if (at == count) return;
    request_error(spec.name, ": holds ", +data[at], " at ", place_of(at, array.shape), "; it must be in [", low, ", ",
                  high, "]");
  });
}

std::vector<std::int64_t> read_offsets(const stca_tensor& tensor) {
  const Array array = view_of(tensor);
  if (array.shape.rank != 1 || array.shape[0] < 1 || kind_of(array.dtype) != Kind::integer) {
    request_error(tensor.name, ": must be a list of at least one integer, got ", dtype_name(array.dtype), " of shape ",
                  array.shape.text());
  }
  std::vector<std::int64_t> offsets(array.shape.elements());
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = integer_at(array, i);
  if (offsets[0] != 0) request_error(tensor.name, ": starts at ", offsets[0], "; it must start at 0");
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1]) {
      request_error(tensor.name, ": goes backwards at ", i, ", from ", offsets[i - 1], " to ", offsets[i]);
    }
  }
  return offsets;
}

}  // namespace

Door::Door(const Manifest& manifest, std::optional<std::int64_t> window, bool truncate)
    : inputs_(manifest.graph("request").inputs), window_(window), truncate_(truncate) {
  std::unordered_map<std::string_view, int> ids;
  for (std::string_view symbol : known_symbols) ids.emplace(symbol, static_cast<int>(ids.size()));
  for (const TensorSpec& spec : inputs_) {
    if (spec.scope == STCA_NO_SCOPE) bundle_error("input '", spec.name, "' has no scope; export the bundle again");
    index_.emplace(spec.name, static_cast<int>(index_.size()));
    offsets_.push_back(spec.shape.size() == 1 && spec.rows_are(offsets_symbol));
    if (offsets_.back() && kind_of(spec.dtype) != Kind::integer) {
      bundle_error("offsets '", spec.name, "' are not integers; export the bundle again");
    }
    ragged_ = ragged_ || offsets_.back();
    has_user_inputs_ = has_user_inputs_ || (spec.scope == STCA_USER && !offsets_.back());
    std::vector<int>& axes = symbols_.emplace_back();
    for (const Axis& axis : spec.shape) {
      const int next = static_cast<int>(ids.size());
      axes.push_back(axis.symbol.empty() ? -1 : ids.emplace(axis.symbol, next).first->second);
    }
  }
  symbol_count_ = ids.size();
  bool tokens = false, targets = false;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (offsets_[i]) (inputs_[i].scope == STCA_USER ? tokens : targets) = true;
  }
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const TensorSpec& spec = inputs_[i];
    const bool packable = offsets_[i] || spec.rows_are(users_symbol) || (tokens && spec.rows_are(tokens_symbol)) ||
                          (targets && spec.rows_are(targets_symbol));
    if (!packable) unpackable_ = spec.name;
  }
}

void Door::check_packable() const {
  if (!unpackable_.empty()) {
    request_error("this model's requests cannot be packed into batches (", unpackable_,
                  " has no offsets); send one Request at a time");
  }
}

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

std::string Door::names() const {
  std::string text;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (!offsets_[i]) text += (text.empty() ? "" : ", ") + inputs_[i].name;
  }
  return text;
}

bool Door::once_per_user(std::size_t index) const {
  return inputs_[index].scope == STCA_USER && !offsets_[index] && !inputs_[index].rows_are(tokens_symbol);
}

Door::Given Door::sort(Inputs inputs, int scopes, int others) const {
  Given given(inputs_.size());
  for (const stca_tensor& tensor : inputs) {
    if (tensor.name == nullptr) request_error("an input has no name");
    const int found = find(tensor.name);
    if (found < 0) request_error(tensor.name, ": the model has no such input; it takes ", names());
    if (is_offsets(found)) {
      request_error(tensor.name, ": is made by the runtime for a single request; leave it out");
    }
    const auto i = static_cast<std::size_t>(found);
    if ((inputs_[i].scope & (scopes | others)) == 0) {
      request_error(tensor.name, ": is no part of an event; append takes the per-token user inputs alone");
    }
    if (given[i] != nullptr) request_error(tensor.name, ": is given twice");
    given[i] = &tensor;
  }
  return given;
}

void Door::admit(Inputs inputs, int scopes, int others, Row& row) const {
  admit_sorted(sort(inputs, scopes, others), scopes, false, row);
}

void Door::admit_events(Inputs events, Row& row) const {
  const Given given = sort(events, STCA_USER, 0);
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (given[i] != nullptr && once_per_user(i)) {
      request_error(inputs_[i].name, ": is no part of an event; append takes the per-token user inputs alone");
    }
  }
  admit_sorted(given, STCA_USER, true, row);
}

void Door::admit_sorted(const Given& given, int scopes, bool events, Row& row) const {
  Sizes sizes(symbol_count_);
  if (ragged_) sizes[users_id] = {1, "one request"};
  row.arrays.resize(inputs_.size());
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const TensorSpec& spec = inputs_[i];
    if ((spec.scope & scopes) == 0 || offsets_[i]) continue;
    if (events && once_per_user(i)) {
      Shape shape;
      for (const Axis& axis : spec.shape) shape[shape.rank++] = axis.symbol.empty() ? axis.size : 1;
      auto [zeros, data] = make_array(Memory::host(), spec.dtype, shape);
      std::memset(data, 0, zeros.bytes());
      row.arrays[i] = zeros;
      continue;
    }
    if (given[i] == nullptr) {
      request_error(spec.name, ": is missing; the model needs it (", scope_name(spec.scope), " input)");
    }
    row.arrays[i] = array(i, *given[i], sizes);
  }
  if ((scopes & STCA_USER) != 0) {
    limit_history(row, sizes[tokens_id]);
    row.tokens = sizes[tokens_id].size;
  }
  if ((scopes & STCA_TARGET) != 0) row.targets = sizes[targets_id].size;
}

Array Door::array(std::size_t index, const stca_tensor& value, Sizes& sizes) const {
  const TensorSpec& spec = inputs_[index];
  Array raw = view_of(value);
  const std::size_t elements = raw.shape.elements();
  if (elements == 0 && raw.dtype == STCA_FLOAT64) raw.dtype = spec.dtype;  // an empty list has no dtype of its own
  if (kind_of(raw.dtype) != kind_of(spec.dtype)) {
    request_error(spec.name, ": has dtype ", dtype_name(raw.dtype), ", expected ", dtype_name(spec.dtype));
  }
  const std::vector<int>& symbols = symbols_[index];
  const int rank = static_cast<int>(symbols.size());
  if (raw.shape.rank == rank - 1 && symbols[0] >= 0 && sizes[static_cast<std::size_t>(symbols[0])].size == 1) {
    Shape shape{1};  // one user's value, given without the batch axis
    for (int i = 0; i < raw.shape.rank; ++i) shape[shape.rank++] = raw.shape[i];
    raw.shape = shape;
  }
  if (raw.shape.rank != rank) {
    request_error(spec.name, ": has shape ", raw.shape.text(), ", expected ", spec.shape_text());
  }
  for (int i = 0; i < rank; ++i) {
    const Axis& axis = spec.shape[static_cast<std::size_t>(i)];
    Bound fixed{axis.size, "the model"};
    const int symbol = symbols[static_cast<std::size_t>(i)];
    Bound& bound = symbol < 0 ? fixed : sizes[static_cast<std::size_t>(symbol)];
    if (bound.size < 0) bound = {raw.shape[i], spec.name.c_str()};
    if (raw.shape[i] != bound.size) {
      request_error(spec.name, ": has shape ", raw.shape.text(), ", expected ", spec.shape_text(), " with ",
                    symbol < 0 ? std::to_string(axis.size) : axis.symbol, " = ", bound.size, " as in ", bound.because);
    }
  }
  if (elements > 0 && kind_of(spec.dtype) == Kind::integer) check_range(spec, raw);
  const Array fitting = converted(raw, spec.dtype);
  if (elements > 0 && kind_of(spec.dtype) == Kind::floating) check_finite(spec, fitting, raw);
  return fitting;
}

void Door::limit_history(Row& row, Bound& tokens) const {
  if (!window_ || tokens.size <= *window_) return;
  if (!truncate_) {
    request_error(tokens.because, ": has ", tokens.size, " tokens, the limit is ", *window_,
                  "; send the most recent ones, or load the session with truncate");
  }
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].scope == STCA_USER && inputs_[i].rows_are(tokens_symbol)) {
      row.arrays[i] = rows(row.arrays[i], tokens.size - *window_, tokens.size);
    }
  }
  tokens.size = *window_;
}

std::vector<CutRequest> Door::unpack(const stca_request_batch& batch) const {
  check_packable();
  const Inputs inputs{batch.inputs, batch.input_count};
  std::vector<std::int64_t> token_bounds, target_bounds, user_bounds;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (!offsets_[i]) continue;
    const stca_tensor* found = nullptr;
    for (const stca_tensor& tensor : inputs) {
      if (tensor.name != nullptr && tensor.name == inputs_[i].name) found = &tensor;
    }
    if (found == nullptr) request_error(inputs_[i].name, ": is missing; a batch needs it");
    (inputs_[i].scope == STCA_USER ? token_bounds : target_bounds) = read_offsets(*found);
  }
  if (!token_bounds.empty() && !target_bounds.empty() && token_bounds.size() != target_bounds.size()) {
    request_error("history and target offsets differ in length (", token_bounds.size(), " and ", target_bounds.size(),
                  "); each needs one entry more than requests");
  }
  if (token_bounds.empty() && target_bounds.empty()) {
    request_error("this model has no offsets to tell requests apart; send one Request at a time");
  }
  const std::size_t count = std::max(token_bounds.size(), target_bounds.size()) - 1;
  for (std::size_t i = 0; i <= count; ++i) user_bounds.push_back(static_cast<std::int64_t>(i));
  if (batch.user_count != 0 && batch.user_count != count) {
    request_error("users: has ", batch.user_count, " entries for ", count, " requests");
  }
  if (batch.version_count != 0 && batch.version_count != count) {
    request_error("versions: has ", batch.version_count, " entries for ", count, " requests");
  }

  std::vector<CutRequest> requests(count);
  for (std::size_t r = 0; r < count; ++r) {
    if (batch.user_count != 0) requests[r].user = batch.users[r];
    if (batch.version_count != 0) requests[r].version = batch.versions[r];
  }
  for (const stca_tensor& tensor : inputs) {
    const int found = tensor.name == nullptr ? -1 : find(tensor.name);
    if (found >= 0 && is_offsets(found)) continue;
    if (found < 0) {  // refused by name when the first request is admitted
      for (CutRequest& request : requests) request.inputs.push_back(tensor);
      continue;
    }
    const TensorSpec& spec = inputs_[static_cast<std::size_t>(found)];
    const std::vector<std::int64_t>& bounds = spec.rows_are(tokens_symbol)    ? token_bounds
                                              : spec.rows_are(targets_symbol) ? target_bounds
                                                                              : user_bounds;
    const Array array = view_of(tensor);
    if (array.shape.rank < 1 || array.shape[0] != bounds.back()) {
      request_error(spec.name, ": has shape ", array.shape.text(), ", the offsets end at ", bounds.back());
    }
    for (std::size_t r = 0; r < count; ++r) {
      const Array part = rows(array, bounds[r], bounds[r + 1]);
      stca_tensor& cut = requests[r].inputs.emplace_back(tensor);
      cut.data = part.data;
      cut.shape[0] = part.shape[0];
    }
  }
  return requests;
}

Array Door::pack(const std::vector<Row>& rows, int index) const {
  const auto i = static_cast<std::size_t>(index);
  if (offsets_[i]) {
    std::vector<std::int64_t> counts;
    for (const Row& row : rows) {
      counts.push_back(std::max<std::int64_t>(inputs_[i].scope == STCA_USER ? row.tokens : row.targets, 0));
    }
    return offsets_array(inputs_[i].dtype, counts);
  }
  if (rows.size() == 1) return rows[0].arrays[i];
  std::vector<const Array*> parts;
  for (const Row& row : rows) parts.push_back(&row.arrays[i]);
  return concatenate(Memory::host(), inputs_[i].name, parts);
}

std::string Door::digest(const Row& row) const {
  Sha256 digest;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].scope != STCA_USER || offsets_[i]) continue;
    digest.update(row.arrays[i].shape.text());
    digest.update(row.arrays[i].data, row.arrays[i].bytes());
  }
  return digest.hex();
}

Array offsets_array(DType dtype, const std::vector<std::int64_t>& counts) {
  auto [offsets, data] = make_array(Memory::host(), dtype, {static_cast<std::int64_t>(counts.size()) + 1});
  visit_integer(dtype, [&, data = data](auto type) {
    auto* out = reinterpret_cast<decltype(type)*>(data);
    std::int64_t sum = 0;
    *out++ = 0;
    for (std::int64_t n : counts) *out++ = static_cast<decltype(type)>(sum += n);
  });
  return offsets;
}

void check_swap(const std::string& bundle, const Manifest& served, const Manifest& other) {
  const auto refuse = [&](const std::string& what, const std::string& in_it, const std::string& there) {
    bundle_error(bundle, ": cannot take the place of the bundle being served: ", what, " is ", in_it, " in it, ", there,
                 " there; load it as a session of its own");
  };
  const std::vector<TensorSpec>&old = served.graph("request").inputs, &fresh = other.graph("request").inputs;
  const auto input = [](const std::vector<TensorSpec>& specs, const std::string& name) -> std::string {
    for (const TensorSpec& spec : specs) {
      if (spec.name != name) continue;
      return std::string(dtype_name(spec.dtype)) + " " + spec.shape_text() + " of scope " + scope_name(spec.scope);
    }
    return "missing";
  };
  for (const auto* specs : {&old, &fresh}) {
    for (const TensorSpec& spec : *specs) {
      const std::string there = input(old, spec.name), in_it = input(fresh, spec.name);
      if (there != in_it) refuse("input '" + spec.name + "'", in_it, there);
    }
  }
  const auto outputs = [](const Manifest& manifest) {
    std::string text;
    for (TensorSpec spec : manifest.graph("request").outputs) {
      for (Axis& axis : spec.shape) {
        if (!axis.symbol.empty()) axis.symbol = "*";  // symbolic sizes of outputs are names that an exporter made up
      }
      text += std::string(text.empty() ? "" : ", ") + dtype_name(spec.dtype) + " " + spec.shape_text();
    }
    return text;
  };
  if (outputs(served) != outputs(other)) refuse("the output", outputs(other), outputs(served));
}

}  // namespace stca::core
