// User states and where they are kept between requests.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "deadline.hpp"
#include "gone.hpp"
#include "room.hpp"
#include "tensor.hpp"

namespace stca::core {

/// What a model's states have in common: the weights' version, and the tensors' names, dtypes and shapes.
struct StateKind {
  std::string weights, format;

  bool operator==(const StateKind& other) const { return weights == other.weights && format == other.format; }
};

struct Row;

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
  /// Digest of the user inputs it was made of, where versions are checked and nothing was appended.
  std::string history;
  /// Where the rows of tokens lie after an append, to end there at row `end`.
  std::shared_ptr<Room> room;
  std::int64_t end = 0;
  /// What an append or an amendment wrote for it, in bytes.
  std::size_t written = 0;
  /// Where states hold sums, the inputs of new events: `tokens` counts them, but `tensors` are without them until a
  /// request reads the state. Their memory is its own.
  std::shared_ptr<const Row> waiting;

  /// Bytes of all tensors.
  std::size_t bytes() const;
  /// Bytes of the memory that they lie in, with what is free behind their rows and what waits.
  std::size_t memory_bytes() const;
};

/// How much is kept, and how long.
struct KeepLimits {
  std::uint64_t bytes = std::uint64_t{1} << 30;
  std::uint64_t users = 0;  ///< 0 for no limit
  double seconds = 0;       ///< since the state was encoded or appended to; 0 for no limit
};

/// At most one state per user, least recently used out first, within a budget of all the memory that an entry takes.
/// Safe to share between threads.
///
/// A state that does not fit is not kept; that never fails a request. A state handed out stays whole after it was
/// evicted, for as long as someone holds it. States that are too old go with the next call, whichever it is. Versions
/// are labels without an order, so the order of calls decides what is newer: a state is not put in the place of one that
/// a later call made, however long its own took.
class StateCache {
 public:
  using State = std::shared_ptr<const UserState>;
  class Flight;
  using FlightPtr = std::shared_ptr<Flight>;
  /// Seconds that only grow.
  using Clock = std::function<double()>;

  /// A state, or null and why it is not kept, as far as that is remembered.
  struct LookedUp {
    State state;
    Came came = Came::memory;
    std::uint64_t call = 0;  ///< the number of the call that asked, for what it makes
  };

  /// What is there for a key: its state; or an encoding of it that is under way; or, with `ours`, one that the caller
  /// has to run, and to bring to an end with `land`.
  struct Found {
    State state;
    FlightPtr flight;
    bool ours = false;
  };

  explicit StateCache(const KeepLimits& limits, Clock clock = seconds)
      : limits_(limits), clock_(std::move(clock)) {}

  /// A state, the seconds since it was made, and which call made it.
  struct Aged {
    StateKey key;
    State state;
    double age;
    std::uint64_t call = 0;
  };

  /// The number of a call that may make a state, taken before it looks for one.
  std::uint64_t next_call() { return ++calls_; }

  /// The state with exactly this key.
  LookedUp get(const StateKey& key);
  /// Whether an encoding for this key is under way.
  bool flying(const StateKey& key) const;
  /// The state, or else the one encoding of this key at this time. Nothing of them when there is none and the caller
  /// `can_encode` none. Of what is encoded, `call` is the maker; 0 for a call that comes now.
  /// With `late`, a kept state that is still to be finished counts as none, and what is made takes the place of `late`.
  Found begin(const StateKey& key, bool can_encode, std::uint64_t call = 0, State late = nullptr);
  /// Counts requests of users by how they came by a state. What is less than 0 takes back what was counted too soon.
  void count(Came came, std::int64_t requests);
  /// Counts a state that is made ahead of its request.
  void count_warmed();
  /// Ends an encoding: keeps its state, unless the user was forgotten meanwhile; null when it failed. Whether it is kept.
  /// What could not be finished goes: no request for it could be answered, not even one with the history.
  bool land(const FlightPtr& flight, State state);
  /// Waits for an encoding that another thread runs. Null when it failed; throws what the deadline does.
  static State wait(const FlightPtr& flight, const Deadline& deadline = Deadline::never());

  /// Keeps `state` in place of the user's last one; false when that was made by a later call than `call` (0 for one that
  /// comes now), or this one is larger than the budget. With `instead_of`, only while that is still the one kept: what
  /// came or went meanwhile wins.
  bool put(StateKey key, State state, const State& instead_of = nullptr, std::uint64_t call = 0);
  /// Whether the whole budget is enough for this state.
  bool fits(const StateKey& key, const UserState& state) const;
  /// Keeps a state from a file that `call` made `age` seconds ago, unless a later call made the one that is here.
  bool restore(StateKey key, State state, double age, std::uint64_t call);
  /// Whatever is kept for `user`, without counting as a hit.
  std::optional<std::pair<StateKey, State>> find(const std::string& user);
  /// The same, with its age.
  std::optional<Aged> fetch(const std::string& user);
  /// Drops the user's state, and that of an encoding under way when it is done; false when there was neither.
  bool forget(const std::string& user);
  /// Keeps states of this kind from now on, and drops those of any other.
  void serve(const std::shared_ptr<const StateKind>& kind);
  /// Counters and sizes, taken at one moment.
  stca_cache_stats stats();

 private:
  struct Held {
    StateKey key;
    State state;
    std::size_t bytes;
    double since;
    std::uint64_t call;
    std::list<std::string>::iterator age;
  };
  using Order = std::list<Held>;  // least recently used first

  // With the lock held. What leaves goes into `dropped`, which the caller frees after the lock: states can be tens of
  // megabytes.
  State held(const StateKey& key);
  bool keep(StateKey key, State state, const State& instead_of, double age, std::uint64_t call, Order& dropped);
  void remove(Order::iterator held, Order& dropped);
  /// Of `asked`, whenever it was put: one from a file was made before that.
  void expire(Order& dropped, const std::string* asked = nullptr);
  void remove_old(Order::iterator held, Order& dropped);

  static double seconds();
  std::uint64_t counted(Came came) const { return counts_[static_cast<std::size_t>(came)]; }

  const KeepLimits limits_;
  const Clock clock_;
  mutable std::mutex mutex_;
  Order order_;
  std::list<std::string> ages_;  // users, who was put first comes first
  std::unordered_map<std::string, Order::iterator> by_user_;
  std::unordered_multimap<std::string, FlightPtr> flights_;  // by user
  std::shared_ptr<const StateKind> kind_;
  Gone gone_;
  std::array<std::uint64_t, came_count> counts_{};
  std::atomic<std::uint64_t> calls_{0};
  std::uint64_t bytes_ = 0, state_bytes_ = 0, room_bytes_ = 0, evictions_ = 0, refused_ = 0, expired_ = 0;
  std::uint64_t warmed_ = 0, appends_ = 0, appended_bytes_ = 0;
};

/// An encoding under way.
class StateCache::Flight {
 public:
  Flight(StateKey of, std::uint64_t maker, State before) : key(std::move(of)), call(maker), late(std::move(before)) {}
  const std::string& user() const { return key.user; }

 private:
  friend class StateCache;
  const StateKey key;
  const std::uint64_t call;
  const State late;  // what is being finished; null where a history is encoded
  bool forgotten = false;  // under the cache's lock
  std::mutex mutex;
  std::condition_variable landed;
  bool done = false;
  State state;
};

/// All the memory that keeping a state takes: its tensors, the objects around them, and the names it is found by.
std::size_t cost_of(const StateKey& key, const UserState& state);

}  // namespace stca::core
