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

  Scored score(const std::vector<RequestView>& requests);
  Scored score(const stca_request_batch& batch);
  /// `version` must not be null; `after` may.
  bool append(const std::string& user, Inputs events, const char* version, const char* after);
  /// Makes and keeps a state ahead of its request, once a processor is free; whether it is kept. `version` may be null;
  /// `seconds` from now it is not wanted any more, unless they are infinite.
  bool warm(const std::string& user, Inputs history, const char* version, double seconds);
  bool forget(const std::string& user);
  void swap(const std::string& path);

  stca_cache_stats stats() const;
  std::shared_ptr<const Model> model() const;

 private:
  using ModelPtr = std::shared_ptr<const Model>;
  struct Pending;
  class Leading;
  class Joining;
  Scored score(const Model& model, const std::vector<RequestView>& requests);
  /// Its state where one is kept, its user inputs where there is none.
  void look_up(const Model& model, Pending& one);
  /// Where versions are checked, throws RequestError when a history is sent with the version of another one.
  void check_version(const Model& model, const Pending& one) const;
  std::vector<StateCache::State> encode(const Model& model, const std::vector<Row>& rows) const;
  /// Gives each its state: a kept one, one that is encoded here, or one that another call encodes.
  void find_states(const Model& model, std::vector<Pending>& pending);
  /// Whether the state is to be encoded here; if not, it is there, or there is a flight to wait for.
  bool find_state(Pending& one);
  [[noreturn]] static void history_needed(const RequestView& request);
  void check_process() const;

  const Options options_;
  const std::uint64_t born_;  // in which process
  std::unique_ptr<StateCache> cache_;
  ModelPtr model_;
  Turns turns_;
  mutable std::mutex mutex_;  // of model_
  std::mutex swapping_;
};

}  // namespace stca::core
