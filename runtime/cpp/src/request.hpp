// Requests, and the one place where they are checked: whatever passes this door is right by the time it is computed.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bundle.hpp"
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
};

/// Checks requests against a bundle's manifest and turns them into arrays the graphs take.
class Door {
 public:
  /// `window`: most tokens of a history, where there is a limit. `truncate`: keep the most recent ones of a longer
  /// history instead of refusing it.
  Door(const Manifest& manifest, std::optional<std::int64_t> window, bool truncate);
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;

  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  /// Index of an input, -1 when there is none of this name.
  int find(std::string_view name) const;
  bool is_offsets(int index) const { return offsets_[static_cast<std::size_t>(index)]; }
  /// Whether the model takes offsets: then a request is one user's, and sizes of symbol B are 1.
  bool ragged() const { return ragged_; }
  /// Throws RequestError when this model's requests cannot be packed into batches.
  void check_packable() const;
  bool has_user_inputs() const { return has_user_inputs_; }
  /// Whether any of `inputs` is of scope user, offsets aside.
  bool any_user_input(Inputs inputs) const;

  /// Checks the inputs of `scopes` and puts them into `row`; those of the scopes `others` are left for another call.
  /// Arrays of the right dtype are not copied. Throws RequestError naming the input, the value and the limit.
  void admit(Inputs inputs, int scopes, int others, Row& row) const;
  /// `admit` for the per-token user inputs alone, with any valid value where there is one per user.
  void admit_events(Inputs events, Row& row) const;

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
  using Sizes = std::vector<Bound>;

  Given sort(Inputs inputs, int scopes, int others) const;
  void admit_sorted(const Given& given, int scopes, bool events, Row& row) const;
  Array array(std::size_t index, const stca_tensor& value, Sizes& sizes) const;
  void limit_history(Row& row, Bound& tokens) const;
  bool once_per_user(std::size_t index) const;
  std::string names() const;

  std::vector<TensorSpec> inputs_;
  std::unordered_map<std::string_view, int> index_;
  std::vector<bool> offsets_;
  std::vector<std::vector<int>> symbols_;  // of each input's axes: which symbol, -1 where the size is fixed
  std::size_t symbol_count_ = 0;
  std::optional<std::int64_t> window_;
  std::string unpackable_;  // an input whose rows cannot be told apart in a batch
  bool truncate_ = false, ragged_ = false, has_user_inputs_ = false;
};

/// Whoever sends requests for one bundle must be able to send them to the other: the same inputs, and scores of the
/// same form. Weights, id limits, the longest history and all that is inside the graphs may differ. `bundle` names the
/// one with the manifest `other`. Throws BundleError naming the first input that differs, or the outputs.
void check_swap(const std::string& bundle, const Manifest& served, const Manifest& other);

/// `[0, counts[0], counts[0] + counts[1], …]` of an integer dtype.
Array offsets_array(DType dtype, const std::vector<std::int64_t>& counts);

}  // namespace stca::core
