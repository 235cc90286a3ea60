#include "state.hpp"

#include <algorithm>

#include "request.hpp"

namespace stca::core {
namespace {

/// What the allocator takes for one block: a header, and sizes in steps of 16.
std::size_t block(std::size_t bytes) {
  return bytes == 0 ? 0 : (bytes + 8 + 15) / 16 * 16 < 32 ? 32 : (bytes + 8 + 15) / 16 * 16;
}

/// A string's characters, where they do not lie within the object.
std::size_t text(const std::string& string) {
  return string.size() < sizeof(std::string) / 2 ? 0 : block(string.size() + 1);
}

constexpr std::size_t pointer = sizeof(void*), shared_count = 4 * pointer;  // counts, a virtual table, a pointer

}  // namespace

std::size_t UserState::bytes() const {
  std::size_t sum = 0;
  for (const Array& tensor : tensors) sum += tensor.bytes();
  return sum;
}

std::size_t UserState::memory_bytes() const {
  std::size_t sum = (room == nullptr ? 0 : room->bytes()) + (waiting == nullptr ? 0 : waiting->bytes());
  for (const Array& tensor : tensors) sum += room != nullptr && room->holds(tensor) ? 0 : tensor.bytes();
  return sum;
}

std::size_t cost_of(const StateKey& key, const UserState& state) {
  // The list's node, the age's node, the table's node and its share of the buckets, and the state with its tensors.
  std::size_t sum = block(2 * pointer + sizeof(StateKey) + sizeof(StateCache::State) + 6 * pointer) +
                    block(2 * pointer + sizeof(std::string)) + block(3 * pointer + sizeof(std::string)) + 2 * pointer +
                    block(shared_count + sizeof(UserState)) + block(state.tensors.capacity() * sizeof(Array));
  sum += 3 * text(key.user) + text(key.version) + text(state.history);
  const auto memory = [&](const Array& array) {
    sum += block(array.bytes() == 0 ? 1 : array.bytes()) + block(shared_count);
  };
  for (const Array& tensor : state.tensors) {
    if (state.room == nullptr || !state.room->holds(tensor)) memory(tensor);
  }
  if (state.waiting != nullptr) {
    sum += block(shared_count + sizeof(Row)) + block(state.waiting->arrays.capacity() * sizeof(Array)) +
           block(state.waiting->sizes.capacity() * sizeof(std::int64_t));
    for (const Array& array : state.waiting->arrays) memory(array);
  }
  if (state.room == nullptr) return sum;
  for (const NewArray& grown : state.room->memory()) memory(grown.array);
  return sum + block(shared_count + sizeof(Room)) + block(state.room->memory().size() * sizeof(NewArray));
}

StateCache::State StateCache::held(const StateKey& key) {
  const auto found = by_user_.find(key.user);
  if (found == by_user_.end() || !(found->second->key == key)) return nullptr;
  order_.splice(order_.end(), order_, found->second);
  return found->second->state;
}

double StateCache::seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

StateCache::LookedUp StateCache::get(const StateKey& key) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &key.user);
  if (State state = held(key)) return {std::move(state), Came::memory};
  const auto found = by_user_.find(key.user);
  if (found == by_user_.end()) return {nullptr, gone_.why(key.user)};
  return {nullptr, *found->second->key.kind == *key.kind ? Came::version : Came::weights};
}

void StateCache::count(Came came, std::int64_t requests) {
  const std::lock_guard lock(mutex_);
  counts_[static_cast<std::size_t>(came)] += static_cast<std::uint64_t>(requests);
}

void StateCache::count_warmed() {
  const std::lock_guard lock(mutex_);
  ++warmed_;
}

bool StateCache::flying(const StateKey& key) const {
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = flights_.equal_range(key.user);
  for (auto flight = begin; flight != end; ++flight) {
    if (flight->second->key == key) return true;
  }
  return false;
}

StateCache::Found StateCache::begin(const StateKey& key, bool can_encode, std::uint64_t call, State late) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &key.user);
  State state = held(key);
  if (state != nullptr && (late == nullptr || state->waiting == nullptr)) return {std::move(state), nullptr, false};
  const auto [begin, end] = flights_.equal_range(key.user);
  for (auto flight = begin; flight != end; ++flight) {
    if (flight->second->key == key) return {nullptr, flight->second, false};
  }
  if (!can_encode) return {};
  const auto flight = std::make_shared<Flight>(key, call == 0 ? next_call() : call, std::move(late));
  return {nullptr, flights_.emplace(key.user, flight)->second, true};
}

bool StateCache::land(const FlightPtr& flight, State state) {
  Order dropped;
  bool kept = false;
  {
    const std::lock_guard lock(mutex_);
    expire(dropped, &flight->key.user);
    const auto [begin, end] = flights_.equal_range(flight->key.user);
    for (auto other = begin; other != end; ++other) {
      if (other->second != flight) continue;
      flights_.erase(other);
      break;
    }
    if (state != nullptr) {
      kept = !flight->forgotten && keep(flight->key, state, flight->late, 0, flight->call, dropped);
    } else if (const auto held = by_user_.find(flight->key.user);
               flight->late != nullptr && held != by_user_.end() && held->second->state == flight->late) {
      remove(held->second, dropped);
    }
  }
  const std::lock_guard lock(flight->mutex);
  flight->state = std::move(state);
  flight->done = true;
  flight->landed.notify_all();
  return kept;
}

StateCache::State StateCache::wait(const FlightPtr& flight, const Deadline& deadline) {
  std::unique_lock lock(flight->mutex);
  deadline.wait(flight->landed, lock, [&] { return flight->done; });
  return flight->state;
}

bool StateCache::put(StateKey key, State state, const State& instead_of, std::uint64_t call) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &key.user);
  return keep(std::move(key), std::move(state), instead_of, 0, call == 0 ? next_call() : call, dropped);
}

bool StateCache::fits(const StateKey& key, const UserState& state) const {
  return cost_of(key, state) <= limits_.bytes;
}

bool StateCache::restore(StateKey key, State state, double age, std::uint64_t call) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &key.user);
  return keep(std::move(key), std::move(state), nullptr, age, call, dropped);
}

bool StateCache::keep(StateKey key, State state, const State& instead_of, double age, std::uint64_t call,
                      Order& dropped) {
  // After a swap, the state of an old model would only be in the way.
  if (kind_ != nullptr && !(*key.kind == *kind_)) return false;
  const std::size_t bytes = cost_of(key, *state);
  const auto found = by_user_.find(key.user);
  if (instead_of != nullptr && (found == by_user_.end() || found->second->state != instead_of)) return false;
  if (instead_of == nullptr && found != by_user_.end() && found->second->call >= call) return false;
  // The same history in another form is as old: it keeps its place among those that expire.
  const bool finished = instead_of != nullptr && found->second->key == key;
  const double since = finished ? found->second->since : clock_() - age;
  if (finished) call = found->second->call;
  const auto place = ages_.insert(finished ? found->second->age : ages_.end(), key.user);
  if (found != by_user_.end()) remove(found->second, dropped);
  if (bytes > limits_.bytes) {
    ages_.erase(place);
    ++refused_;
    gone_.note(key.user, Came::too_large);
    return false;
  }
  while (bytes_ + bytes > limits_.bytes || (limits_.users > 0 && order_.size() >= limits_.users)) {
    gone_.note(order_.front().key.user, Came::evicted);
    remove(order_.begin(), dropped);
    ++evictions_;
  }
  state_bytes_ += state->bytes();
  room_bytes_ += state->memory_bytes();
  if (instead_of != nullptr) {
    appends_ += finished ? 0 : 1;
    appended_bytes_ += state->written;
  }
  order_.push_back({std::move(key), std::move(state), bytes, since, call, place});
  bytes_ += bytes;
  by_user_.emplace(order_.back().key.user, std::prev(order_.end()));
  return true;
}

std::optional<std::pair<StateKey, StateCache::State>> StateCache::find(const std::string& user) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &user);
  const auto found = by_user_.find(user);
  if (found == by_user_.end()) return std::nullopt;
  return std::pair{found->second->key, found->second->state};
}

std::optional<StateCache::Aged> StateCache::fetch(const std::string& user) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &user);
  const auto found = by_user_.find(user);
  if (found == by_user_.end()) return std::nullopt;
  const Held& held = *found->second;
  return Aged{held.key, held.state, std::max(0.0, clock_() - held.since), held.call};
}

bool StateCache::forget(const std::string& user) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped, &user);
  gone_.forget(user);
  const auto [begin, end] = flights_.equal_range(user);
  for (auto flight = begin; flight != end; ++flight) flight->second->forgotten = true;
  const bool under_way = begin != end;
  flights_.erase(begin, end);  // who asks from now on is not to be served with what was forgotten
  const auto found = by_user_.find(user);
  if (found == by_user_.end()) return under_way;
  remove(found->second, dropped);
  return true;
}

void StateCache::remove(Order::iterator held, Order& dropped) {
  bytes_ -= held->bytes;
  state_bytes_ -= held->state->bytes();
  room_bytes_ -= held->state->memory_bytes();
  ages_.erase(held->age);
  by_user_.erase(held->key.user);
  dropped.splice(dropped.end(), order_, held);
}

void StateCache::expire(Order& dropped, const std::string* asked) {
  if (limits_.seconds <= 0 || ages_.empty()) return;
  const double now = clock_();
  const auto is_old = [&](Order::iterator held) { return now >= held->since + limits_.seconds; };
  if (asked != nullptr) {
    const auto found = by_user_.find(*asked);
    if (found != by_user_.end() && is_old(found->second)) remove_old(found->second, dropped);
  }
  while (!ages_.empty()) {
    const auto oldest = by_user_.find(ages_.front())->second;
    if (!is_old(oldest)) return;
    remove_old(oldest, dropped);
  }
}

void StateCache::remove_old(Order::iterator held, Order& dropped) {
  gone_.note(held->key.user, Came::expired);
  remove(held, dropped);
  ++expired_;
}

void StateCache::serve(const std::shared_ptr<const StateKind>& kind) {
  Order dropped;
  const std::lock_guard lock(mutex_);
  const bool same = kind_ != nullptr && *kind_ == *kind;
  kind_ = kind;
  if (same) return;
  for (const Held& held : order_) gone_.note(held.key.user, Came::weights);
  dropped.swap(order_);
  by_user_.clear();
  ages_.clear();
  bytes_ = state_bytes_ = room_bytes_ = 0;
}

stca_cache_stats StateCache::stats() {
  Order dropped;
  const std::lock_guard lock(mutex_);
  expire(dropped);
  stca_cache_stats stats{};
  stats.hits_memory = counted(Came::memory);
  stats.hits_joined = counted(Came::joined);
  stats.misses_new_user = counted(Came::new_user);
  stats.misses_version = counted(Came::version);
  stats.misses_expired = counted(Came::expired);
  stats.misses_evicted = counted(Came::evicted);
  stats.misses_weights = counted(Came::weights);
  stats.misses_too_large = counted(Came::too_large);
  stats.hits_file = counted(Came::file);
  stats.misses_damaged = counted(Came::damaged);
  stats.hits = stats.hits_memory + stats.hits_joined + stats.hits_file;
  stats.misses = stats.misses_damaged + stats.misses_new_user + stats.misses_version + stats.misses_expired + stats.misses_evicted +
                 stats.misses_weights + stats.misses_too_large;
  stats.evictions = evictions_;
  stats.refused = refused_;
  stats.users = order_.size();
  stats.bytes = bytes_;
  stats.budget = limits_.bytes;
  stats.expired = expired_;
  stats.state_bytes = state_bytes_;
  stats.warmed = warmed_;
  stats.appends = appends_;
  stats.room_bytes = room_bytes_;
  stats.appended_bytes = appended_bytes_;
  return stats;
}

}  // namespace stca::core
