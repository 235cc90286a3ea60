#include "room.hpp"

#include <algorithm>

namespace stca::core {
namespace {

/// Room for so many rows to come, or for a part of those that are there. When it is full, the window moves into another:
/// by then an eighth of its rows were written, so a new row costs eight copied ones at most.
constexpr std::int64_t least_rows = 64, part = 8;

}  // namespace

Room::Room(const std::vector<Array>& rows, std::int64_t more) : size_(rows.front().shape[0]), used_(size_) {
  size_ += more + std::max(least_rows, (size_ + more) / part);
  for (const Array& array : rows) {
    Shape shape = array.shape;
    shape[0] = size_;
    memory_.push_back(make_array(Memory::host(), array.dtype, shape));
    Memory::host().copy(memory_.back().data, array.data, array.bytes());
  }
}

std::size_t Room::bytes() const {
  std::size_t sum = 0;
  for (const NewArray& memory : memory_) sum += memory.array.bytes();
  return sum;
}

bool Room::holds(const Array& array) const {
  return std::any_of(memory_.begin(), memory_.end(),
                     [&](const NewArray& memory) { return memory.array.owner == array.owner; });
}

bool Room::take(std::int64_t end, std::int64_t count) {
  return count <= size_ - end && used_.compare_exchange_strong(end, end + count);
}

Array Room::write(std::size_t i, std::int64_t end, const Array& rows, std::int64_t shown) {
  const NewArray& memory = memory_[i];
  if (rows.bytes() > 0) {
    Memory::host().copy(memory.data + static_cast<std::size_t>(end) * memory.array.row_bytes(), rows.data, rows.bytes());
  }
  const std::int64_t last = end + rows.shape[0];
  return core::rows(memory.array, last - shown, last);
}

}  // namespace stca::core
