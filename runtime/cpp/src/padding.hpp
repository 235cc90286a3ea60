// Histories of models that take them padded: requests bring events, and the model gets as many places as it has.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "tensor.hpp"

namespace stca::core {

/// Throws BundleError unless the histories that a manifest declares are of its own user inputs, of one size each.
void check_padding(const Manifest& manifest);

/// `count` times the same value, along a new first axis.
Array repeated(const Array& value, std::int64_t count);

/// One history of a model, as its manifest declares it.
class History {
 public:
  /// A request's inputs by their index; nothing where it brings none.
  using Sent = std::vector<std::optional<Array>>;

  /// `window`: most events that are served, where there is a limit. `truncate`: keep the most recent of more.
  History(const Padding& padding, const std::vector<TensorSpec>& inputs, std::int64_t least,
          std::optional<std::int64_t> window, bool truncate);

  /// Indices of the inputs that it fills in or pads.
  std::vector<std::size_t> inputs() const;
  /// Places of a fixed length; -1 where requests decide it.
  std::int64_t size() const { return size_; }
  /// Brings its inputs to what the model takes. Throws RequestError naming the input, its events and the limit.
  void complete(Sent& sent) const;

 private:
  struct Entry {
    std::size_t index;
    const TensorSpec* spec;
    const EventInput* event;
  };

  Array with_all_axes(const Entry& entry, Array raw) const;
  std::int64_t count(const Sent& sent) const;
  std::int64_t kept(std::int64_t count, const std::string& name) const;
  bool full(const Sent& sent, std::int64_t count) const;
  Array padded(const Entry& entry, const Array& events, std::int64_t count, std::int64_t kept) const;
  Array length(const std::optional<Array>& sent, std::int64_t kept, std::int64_t count, bool full) const;

  Padding padding_;
  std::vector<TensorSpec> specs_;  // of the events, then of the lengths
  std::vector<Entry> entries_;
  std::optional<std::size_t> lengths_;
  std::int64_t size_ = -1, least_ = 0;
  std::optional<std::int64_t> limit_;
  bool truncate_ = false;
};

}  // namespace stca::core
