// The state store: states in memory and, where a folder was given, in files.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "file_tier.hpp"
#include "state.hpp"

namespace stca::core {

/// Where a user's state is, what it takes there, and the version of its history: nothing where a file alone knows it.
struct Residence {
  stca_tier tier;
  std::uint64_t bytes;
  std::optional<std::string> version;
};

/// Keeps states by user, history version, weights and format. Safe to share between threads. What it does not say here
/// is as of StateCache.
class StateStore {
 public:
  using State = StateCache::State;

  explicit StateStore(const KeepLimits& limits) : memory_(limits), seconds_(limits.seconds) {}
  StateStore(const StateStore&) = delete;
  StateStore& operator=(const StateStore&) = delete;

  /// From now on states lie in files of `folder` too, `bytes` of them at most. Before any other call.
  void open(const std::string& folder, std::uint64_t bytes);

  /// The state with exactly this key, and where it was; or why there is none.
  StateCache::LookedUp look_up(const StateKey& key);
  /// Whether it is in memory.
  bool at_hand(const StateKey& key) { return memory_.get(key).state != nullptr; }
  /// Whatever is kept of `user` in memory, or else in a file under one of the keys `wanted`, for an append.
  std::optional<std::pair<StateKey, State>> find(const std::string& user, const std::vector<StateKey>& wanted);
  /// Where the user's state is, of this version where it is not null; nothing where there is none. It counts as no use.
  std::optional<Residence> residence(const std::string& user, const char* version);
  /// Whether states are kept in files, too.
  bool on_file() const { return file_ != nullptr; }
  bool put(StateKey key, State state, const State& instead_of, std::uint64_t call);
  void land(const StateCache::FlightPtr& flight, State state);
  /// Drops all that is kept of a user, wherever; false when there was nothing.
  bool forget(const std::string& user);
  void serve(const std::shared_ptr<const StateKind>& kind);
  stca_cache_stats stats();

  bool flying(const StateKey& key) const { return memory_.flying(key); }
  std::uint64_t next_call() { return memory_.next_call(); }
  StateCache::Found begin(const StateKey& key, bool can_encode, std::uint64_t call, State late = nullptr) {
    return memory_.begin(key, can_encode, call, std::move(late));
  }
  bool fits(const StateKey& key, const UserState& state) const { return memory_.fits(key, state); }
  void count(Came came, std::int64_t requests) { memory_.count(came, requests); }
  void count_warmed() { memory_.count_warmed(); }

 private:
  StateCache memory_;
  const double seconds_;
  std::unique_ptr<FileTier> file_;  // reads the memory, so it goes first
};

}  // namespace stca::core
