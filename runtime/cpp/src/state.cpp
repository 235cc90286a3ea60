#include "state.hpp"

namespace stca::core {

std::size_t UserState::bytes() const {
  std::size_t sum = 0;
  for (const Array& tensor : tensors) sum += tensor.bytes();
  return sum;
}

StateCache::State StateCache::get(const StateKey& key) {
  const std::lock_guard lock(mutex_);
  const auto found = by_user_.find(key.user);
  if (found == by_user_.end() || !(found->second->key == key)) {
    ++misses_;
    return nullptr;
  }
  order_.splice(order_.end(), order_, found->second);
  ++hits_;
  return found->second->state;
}

bool StateCache::put(StateKey key, State state, const State& instead_of) {
  const std::size_t bytes = state->bytes();
  Order dropped;
  const std::lock_guard lock(mutex_);
  const auto found = by_user_.find(key.user);
  if (instead_of != nullptr && (found == by_user_.end() || found->second->state != instead_of)) return false;
  if (found != by_user_.end()) remove(found->second, dropped);
  if (bytes > budget_) {
    ++refused_;
    return false;
  }
  while (bytes_ + bytes > budget_) {
    remove(order_.begin(), dropped);
    ++evictions_;
  }
  order_.push_back({std::move(key), std::move(state), bytes});
  bytes_ += bytes;
  by_user_.emplace(order_.back().key.user, std::prev(order_.end()));
  return true;
}

std::optional<std::pair<StateKey, StateCache::State>> StateCache::find(const std::string& user) const {
  const std::lock_guard lock(mutex_);
  const auto found = by_user_.find(user);
  if (found == by_user_.end()) return std::nullopt;
  return std::pair{found->second->key, found->second->state};
}

bool StateCache::forget(const std::string& user) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  const auto found = by_user_.find(user);
  if (found == by_user_.end()) return false;
  remove(found->second, dropped);
  return true;
}

void StateCache::remove(Order::iterator held, Order& dropped) {
  bytes_ -= held->bytes;
  by_user_.erase(held->key.user);
  dropped.splice(dropped.end(), order_, held);
}

void StateCache::clear() {
  Order dropped;
  const std::lock_guard lock(mutex_);
  dropped.swap(order_);
  by_user_.clear();
  bytes_ = 0;
}

stca_cache_stats StateCache::stats() const {
  const std::lock_guard lock(mutex_);
  return {hits_, misses_, evictions_, refused_, order_.size(), bytes_, budget_};
}

}  // namespace stca::core
