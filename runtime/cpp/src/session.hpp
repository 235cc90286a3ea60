// The production front: score, append, forget, swap, with the user side computed once and reused.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "model.hpp"
#include "request.hpp"
#include "state.hpp"
#include "store.hpp"
#include "turns.hpp"

namespace stca::core {

/// Scores of all targets, and of how many requests the user side was at hand.
struct Scored {
  Array scores;
  std::size_t hits = 0;
};

/// Scores targets for users. One session serves many threads.
class Session {
 public:
  Session(const std::string& path, Options options);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  Scored score(const std::vector<RequestView>& requests, const Deadline& deadline);
  Scored score(const stca_request_batch& batch, const Deadline& deadline);
  /// `version` must not be null; `after` may.
  bool append(const std::string& user, Inputs events, const char* version, const char* after) {
    return change(user, events, version, after, std::nullopt);
  }
  /// The same with corrected events, in the place of the kept ones from `at` on.
  bool amend(const std::string& user, Inputs events, const char* version, std::int64_t at, const char* after) {
    return change(user, events, version, after, at);
  }
  /// Makes and keeps a state ahead of its request, once a processor is free; whether it is kept. `version` may be null.
  bool warm(const std::string& user, Inputs history, const char* version, const Deadline& deadline);
  bool forget(const std::string& user);
  /// As StateStore's.
  std::optional<Residence> residence(const std::string& user, const char* version) const;
  void swap(const std::string& path);

  stca_cache_stats stats() const;
  std::shared_ptr<const Model> model() const;

 private:
  using ModelPtr = std::shared_ptr<const Model>;
  struct Pending;
  class Leading;
  class Joining;
  Scored score(const Model& model, const std::vector<RequestView>& requests, const Deadline& deadline);
  /// Encodes the events and keeps the changed state; whether it is kept. Without `at`, they are appended.
  bool change(const std::string& user, Inputs events, const char* version, const char* after,
              std::optional<std::int64_t> at);
  /// Its state where one is kept, its user inputs where there is none.
  void look_up(const Model& model, Pending& one);
  /// Where versions are checked, throws RequestError when a history is sent with the version of another one.
  void check_version(const Model& model, const Pending& one) const;
  /// Gives each its state, run by run: those of the runs before one that fails are theirs.
  void encode(const Model& model, const std::vector<Pending*>& pending, const Deadline& deadline) const;
  /// Gives each its state: a kept one, one that is encoded here, or one that another call encodes.
  void find_states(const Model& model, std::vector<Pending>& pending, const Deadline& deadline);
  /// Whether the state is to be encoded here; if not, it is there, or there is a flight to wait for.
  bool find_state(Pending& one);
  /// Gives one whose state has events that wait the finished state, which is kept in its place; by one call for all.
  void finish(const Model& model, Pending& one, const Deadline& deadline);
  /// The old state with these events, to be kept under `key`.
  StateCache::State changed(const Model& model, const StateKey& key, const UserState& old, const Row& row,
                            std::optional<std::int64_t> at);
  [[noreturn]] static void history_needed(const RequestView& request);
  void check_process() const;

  const Options options_;
  const std::uint64_t born_;  // in which process
  std::unique_ptr<StateStore> store_;
  ModelPtr model_;
  Turns turns_;
  mutable std::mutex mutex_;  // of model_
  std::mutex swapping_;
};

}  // namespace stca::core
