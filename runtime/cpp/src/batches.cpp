// Batches: cut into their requests at the door, and put together again for a run.
#include <algorithm>

#include "error.hpp"
#include "request.hpp"
#include "values.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

// Of a batch for a model that has no such input.
const std::string target_offsets = "target_offsets";

constexpr std::int64_t most_requests = 1 << 14;

using Bounds = std::vector<std::int64_t>;

/// Where each request's rows begin in a batch, and where the last one's end.
Bounds read_offsets(const std::string& name, Inputs inputs) {
  const auto found = std::find_if(inputs.begin(), inputs.end(),
                                  [&](const stca_tensor& t) { return t.name != nullptr && t.name == name; });
  if (found == inputs.end()) request_error(name, ": is missing; a batch needs it");
  const Array array = view_of(*found);
  if (array.shape.rank != 1 || array.shape[0] < 1 || kind_of(array.dtype) != Kind::integer) {
    request_error(name, ": must be a list of at least one integer, got ", dtype_name(array.dtype), " of shape ",
                  array.shape.text());
  }
  if (const std::int64_t requests = array.shape[0] - 1; requests > most_requests) {
    request_error(name, ": tells of ", requests, " requests, the limit is ", most_requests, "; send fewer at once");
  }
  Bounds offsets(array.shape.elements());
  visit_integer(array.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(array.data);
    if (data[0] != 0) request_error(name, ": starts at ", +data[0], "; it must start at 0");
    for (std::size_t i = 0; i < offsets.size(); ++i) {
      offsets[i] = static_cast<std::int64_t>(data[i]);
      if (i == 0 || offsets[i] >= offsets[i - 1]) continue;
      request_error(name, ": goes backwards at ", i, ", from ", +data[i - 1], " to ", +data[i]);
    }
  });
  return offsets;
}

/// So many requests, of these users and versions.
std::vector<CutRequest> requests_of(const stca_request_batch& batch, std::size_t count) {
  if (batch.user_count != 0 && batch.user_count != count) {
    request_error("users: has ", batch.user_count, " entries for ", count, " requests");
  }
  if (batch.version_count != 0 && batch.version_count != count) {
    request_error("versions: has ", batch.version_count, " entries for ", count, " requests");
  }
  std::vector<CutRequest> requests(count);
  for (std::size_t r = 0; r < count; ++r) {
    if (batch.user_count != 0) requests[r].user = batch.users[r];
    if (batch.version_count != 0 && requests[r].user != nullptr) requests[r].version = batch.versions[r];
  }
  return requests;
}

/// Gives each request its rows of a tensor.
void cut(const stca_tensor& tensor, const Array& array, const Bounds& bounds, std::vector<CutRequest>& requests) {
  for (std::size_t r = 0; r < requests.size(); ++r) {
    const Array part = rows(array, bounds[r], bounds[r + 1]);
    stca_tensor& own = requests[r].inputs.emplace_back(tensor);
    own.data = part.data;
    own.shape[0] = part.shape[0];
  }
}

Bounds one_each(std::size_t requests) {
  Bounds bounds;
  for (std::size_t i = 0; i <= requests; ++i) bounds.push_back(static_cast<std::int64_t>(i));
  return bounds;
}

}  // namespace

void Door::check_packable() const {
  if (!stacked_ && (!unpackable_.empty() || !ragged_)) {
    request_error("this model's inputs cannot be packed into batches; send one Request at a time");
  }
}

std::vector<CutRequest> Door::unpack(const stca_request_batch& batch) const {
  if (stacked_) return unstack(batch);
  check_packable();
  const Inputs inputs{batch.inputs, batch.input_count};
  Bounds token_bounds, target_bounds;
  std::string names, ends;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    if (!offsets_[i]) continue;
    const std::string& name = inputs_[i].name;
    Bounds& bounds = inputs_[i].scope == STCA_USER ? token_bounds : target_bounds;
    bounds = read_offsets(name, inputs);
    (names += names.empty() ? "" : " and ") += name;
    ((ends += ends.empty() ? "" : ", ") += name) += " at " + std::to_string(bounds.back());
  }
  if (!token_bounds.empty() && !target_bounds.empty() && token_bounds.size() != target_bounds.size()) {
    request_error(names, ": differ in length; each needs one entry more than requests");
  }
  std::vector<CutRequest> requests = requests_of(batch, std::max(token_bounds.size(), target_bounds.size()) - 1);
  const Bounds user_bounds = one_each(requests.size());
  for (const stca_tensor& tensor : inputs) {
    const int found = find(tensor.name);
    if (found >= 0 && is_offsets(found)) continue;
    if (found < 0) {  // refused by name when the first request is admitted
      if (tensor.name != nullptr) view_of(tensor);
      for (CutRequest& request : requests) request.inputs.push_back(tensor);
      continue;
    }
    const TensorSpec& spec = inputs_[static_cast<std::size_t>(found)];
    const Bounds& bounds = spec.rows_are(tokens_symbol)    ? token_bounds
                           : spec.rows_are(targets_symbol) ? target_bounds
                                                           : user_bounds;
    const Array array = view_of(tensor);
    if (array.shape.rank < 1 || array.shape[0] != bounds.back()) {
      request_error(spec.name, ": has shape ", array.shape.text(), ", expected ", bounds.back(), " rows for ",
                    requests.size(), " requests; the offsets end: ", ends);
    }
    cut(tensor, array, bounds, requests);
  }
  return requests;
}

/// Users stacked `[requests, …]`, and their targets, which `target_offsets` tell apart.
std::vector<CutRequest> Door::unstack(const stca_request_batch& batch) const {
  const Inputs inputs{batch.inputs, batch.input_count};
  const Bounds bounds = read_offsets(target_offsets, inputs);
  std::vector<CutRequest> requests = requests_of(batch, bounds.size() - 1);
  const Bounds user_bounds = one_each(requests.size());
  for (const stca_tensor& tensor : inputs) {
    if (tensor.name == nullptr) request_error("an input has no name");
    if (tensor.name == target_offsets) continue;
    const int found = find(tensor.name);
    const bool of_targets = found >= 0 && inputs_[static_cast<std::size_t>(found)].scope == STCA_TARGET;
    const Array array = view_of(tensor);
    const bool any = array.shape.rank > 0;
    const Bounds& wanted = of_targets ? bounds : user_bounds;
    if (!any || array.shape[0] != wanted.back()) {
      request_error(tensor.name, ": has ", any ? std::to_string(array.shape[0]) : "no", " rows, expected ", wanted.back(), " for ", requests.size(),
                    " requests; ", target_offsets, " ends at ", bounds.back());
    }
    cut(tensor, array, wanted, requests);
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

}  // namespace stca::core
