// User states and where they are kept between requests.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "tensor.hpp"

namespace stca::core {

/// What a model's states have in common: the weights' version, and the tensors' names, dtypes and shapes.
struct StateKind {
  std::string weights, format;

  bool operator==(const StateKind& other) const { return weights == other.weights && format == other.format; }
};

/// What makes two states interchangeable: the user, their history's version, the weights and the state's format.
struct StateKey {
  std::string user, version;
  std::shared_ptr<const StateKind> kind;  // shared by all keys of a model, so that a look-up copies no long strings

  bool operator==(const StateKey& other) const {
    return user == other.user && version == other.version && (kind == other.kind || *kind == *other.kind);
  }
};

/// What the user encoder made of one user: tensors in the manifest's order, and the history tokens in them.
struct UserState {
  std::vector<Array> tensors;
  std::int64_t tokens = 0;

  /// Bytes of all tensors.
  std::size_t bytes() const;
};

/// At most one state per user, least recently used out first, within a byte budget. Safe to share between threads.
///
/// A state that does not fit is not kept; that never fails a request. A state handed out stays whole after it was
/// evicted, for as long as someone holds it.
class StateCache {
 public:
  using State = std::shared_ptr<const UserState>;

  explicit StateCache(std::uint64_t budget) : budget_(budget) {}

  /// The state with exactly this key, or null.
  State get(const StateKey& key);
  /// Keeps `state` in place of the user's last one; false when it is larger than the budget. With `instead_of`, only
  /// while that is still the one kept: what came or went meanwhile wins.
  bool put(StateKey key, State state, const State& instead_of = nullptr);
  /// Whatever is kept for `user`, without counting as a hit.
  std::optional<std::pair<StateKey, State>> find(const std::string& user) const;
  /// Drops the user's state; false when there was none.
  bool forget(const std::string& user);
  /// Drops everything; the counters stay.
  void clear();
  /// Counters and sizes, taken at one moment.
  stca_cache_stats stats() const;

 private:
  struct Held {
    StateKey key;
    State state;
    std::size_t bytes;
  };
  using Order = std::list<Held>;  // least recently used first

  /// Takes `held` out, into `dropped`, which the caller frees after the lock: states can be tens of megabytes.
  void remove(Order::iterator held, Order& dropped);

  const std::uint64_t budget_;
  mutable std::mutex mutex_;
  Order order_;
  std::unordered_map<std::string, Order::iterator> by_user_;
  std::uint64_t bytes_ = 0, hits_ = 0, misses_ = 0, evictions_ = 0, refused_ = 0;
};

}  // namespace stca::core
