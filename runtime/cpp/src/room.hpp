// Memory in which a user's rows grow: new ones are written behind the last, and the oldest fall off in front.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "tensor.hpp"

namespace stca::core {

/// Rows of several tensors that grow together, in host memory. A state is a window on them, so an append writes the new
/// rows alone for as long as there is room. Rows are written once, behind all that any state shows: a request that
/// still scores with an older window sees the rows it began with. Safe to share between threads.
class Room {
 public:
  /// Copies `rows`, as many of each tensor, into memory of their own with room for `more` and some to spare.
  Room(const std::vector<Array>& rows, std::int64_t more);

  std::size_t bytes() const;
  /// Whether `count` rows behind row `end` are the caller's to write: they are free, and nobody was faster.
  bool take(std::int64_t end, std::int64_t count);
  /// Writes `rows` of tensor `i` behind row `end`, which were taken; that tensor's last `shown` rows, in place.
  Array write(std::size_t i, std::int64_t end, const Array& rows, std::int64_t shown);

  /// Whether an array is a window on it.
  bool holds(const Array& array) const;

  const std::vector<NewArray>& memory() const { return memory_; }

 private:
  std::vector<NewArray> memory_;
  std::int64_t size_;
  std::atomic<std::int64_t> used_;
};

}  // namespace stca::core
