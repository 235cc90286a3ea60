// Requests, and the one place where they are checked: whatever passes this door is right by the time it is computed.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bundle.hpp"
#include "padding.hpp"
#include "tensor.hpp"

namespace stca::core {

/// The tensors of a request as the caller gave them.
struct Inputs {
  const stca_tensor* data = nullptr;
  std::size_t count = 0;

  const stca_tensor* begin() const { return data; }
  const stca_tensor* end() const { return data + count; }
};

/// One user's request; null strings as in stca_request.
struct RequestView {
  Inputs inputs;
  const char* user = nullptr;
  const char* version = nullptr;
};

/// A request cut out of a batch: tensors that point into the batch's.
struct CutRequest {
  std::vector<stca_tensor> inputs;
  const char* user = nullptr;
  const char* version = nullptr;
};

/// One request's admitted inputs, by their index in the manifest's request graph; offsets stay empty.
struct Row {
  std::vector<Array> arrays;
  std::int64_t tokens = -1, targets = -1;  ///< -1 where the model has no input that counts them
  std::vector<std::int64_t> sizes;  ///< of each symbol, by its number at the door; -1 where nothing admitted has it

  /// Of all arrays.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const Array& array : arrays) sum += array.data == nullptr ? 0 : array.bytes();
    return sum;
  }
};

/// A valid value of an input in each place, for a run whose result does not depend on it: one row, or `tokens` of them.
Array placeholder(const TensorSpec& spec, std::int64_t tokens = 1);

/// Checks requests against a bundle's manifest and turns them into arrays the graphs take.
class Door {
 public:
  /// `window`: most tokens of a history, where there is a limit. `truncate`: keep the most recent ones of a longer
  /// history instead of refusing it. `max_targets`: most of a request, or of a batch together.
  Door(const Manifest& manifest, std::optional<std::int64_t> window, bool truncate, std::int64_t max_targets);
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;

  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  /// Index of an input, -1 when there is none of this name.
  int find(std::string_view name) const;
  int find(const char* name) const;
  int find(const std::string& name) const { return find(std::string_view(name)); }
  bool is_offsets(int index) const { return offsets_[static_cast<std::size_t>(index)]; }
  /// Whether there is one row of users and requests and a row per target, without offsets: then the users of a batch
  /// are stacked, and run one after the other.
  bool stacked() const { return stacked_; }
  /// Throws RequestError when this model's requests cannot be packed into batches.
  void check_packable() const;
  /// What a symbol amounts to when these are computed together; -1 when no input that was admitted has it.
  std::int64_t size_of(std::string_view symbol, const std::vector<Row>& rows) const;
  /// Targets of all; -1 when the inputs do not say.
  std::int64_t targets(const std::vector<Row>& rows) const;
  /// Throws RequestError when these are too many targets for a request, or for a batch together.
  void check_targets(std::int64_t targets, const std::string& name) const;
  bool has_user_inputs() const { return has_user_inputs_; }
  /// Whether any of `inputs` is of scope user, offsets aside.
  bool any_user_input(Inputs inputs) const;

  /// Checks the inputs of `scopes` and puts them into `row`; those of the scopes `others` are left for another call.
  /// Arrays of the right dtype are not copied. Throws RequestError naming the input, the value and the limit.
  void admit(Inputs inputs, int scopes, int others, Row& row) const;
  /// `admit` for the per-token user inputs alone, with any valid value where there is one per user; for all user inputs
  /// where states hold sums, since what follows from no event is made again.
  /// `call` is what takes them, for its messages. `cut`: drop the oldest beyond the limit, where the session truncates;
  /// otherwise all are left.
  void admit_events(Inputs events, const char* call, bool cut, Row& row) const;

  /// A user's new events behind those of `first`, unless that is null, with what there is once per user now: copies,
  /// for what is admitted is the caller's.
  Row behind(const Row* first, const Row& events) const;

  /// An admitted input that holds nothing but what stands for no event, where the model has no score for that; or null.
  const TensorSpec* only_blank(const Row& row) const;
  /// The request and target inputs of one made-up target and a history of `tokens`, for a run whose result does not
  /// depend on them.
  void make_up(std::int64_t tokens, Row& row) const;

  /// Why events are not appended, or amended, of a bundle whose states cannot be.
  std::string why_not_changeable(bool amend) const;

  /// Checks a batch's offsets and cuts it into its requests, without copying.
  std::vector<CutRequest> unpack(const stca_request_batch& batch) const;

  /// Input `index` of several requests as one array: rows one after the other, or the offsets that say where each
  /// one's begin. A single request's array is passed on as it is.
  Array pack(const std::vector<Row>& rows, int index) const;

  /// A version for a history that has none.
  std::string digest(const Row& row) const;

 private:
  struct Bound {
    std::int64_t size = -1;
    const char* because = "";
  };
  using Given = std::vector<const stca_tensor*>;
  using Agreed = std::vector<Bound>;

  std::vector<CutRequest> unstack(const stca_request_batch& batch) const;
  Given sort(Inputs inputs, int scopes, int others, const char* call) const;
  /// `events`: they are a part of a history. Any of its events may be blank, as long as others are not.
  void admit_sorted(const Given& given, int scopes, bool events, bool cut, Row& row) const;
  Array of_kind(std::size_t index, const stca_tensor& value) const;
  Array array(std::size_t index, Array raw, Agreed& sizes) const;
  History::Sent complete(const Given& given) const;
  void check_lengths(const Row& row, const Agreed& sizes) const;
  void check_history(const Bound& tokens) const;
  void limit_history(Row& row, Bound& tokens, bool cut) const;
  /// The last `window_` tokens of a user input.
  Array recent(std::size_t index, Array array) const;
  std::int64_t targets_of(const Row& row) const;
  bool once_per_user(std::size_t index) const;
  std::vector<std::string> known_names() const;
  std::string names() const;

  std::vector<TensorSpec> inputs_;
  std::unordered_map<std::string_view, int> index_;
  std::unordered_map<std::string_view, std::size_t> symbol_ids_;
  std::vector<bool> offsets_;
  std::vector<int> length_of_;             // of each input: the symbol whose rows it counts, -1 for none
  std::vector<std::vector<int>> symbols_;  // of each input's axes: which symbol, -1 where the size is fixed
  int target_symbol_ = -1;                 // which symbol counts targets, if any does
  std::optional<std::int64_t> window_;
  std::int64_t shortest_ = 0, max_targets_ = 0;  // fewest tokens of a history, most targets
  std::vector<History> histories_;
  std::string unpackable_;  // an input whose rows cannot be told apart in a batch
  bool ragged_ = false;  ///< the model takes offsets: a request is one user's, and sizes of symbol B are 1
  bool truncate_ = false, stacked_ = false, has_user_inputs_ = false;
  bool grows_ = false;  // states hold sums, and an append brings what there is once per user as it is now
};

/// Whoever sends requests for one bundle must be able to send them to the other: the same inputs, and scores of the
/// same form. Weights, id limits, the longest history and all that is inside the graphs may differ. `bundle` names the
/// one with the manifest `other`. Throws BundleError naming the first input that differs, or the outputs.
void check_swap(const std::string& bundle, const Manifest& served, const Manifest& other);

/// `[0, counts[0], counts[0] + counts[1], …]` of an integer dtype.
Array offsets_array(DType dtype, const std::vector<std::int64_t>& counts);

}  // namespace stca::core
