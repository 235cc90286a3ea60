// The production front: score, append, forget, swap, with the user side computed once and reused.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "engine.hpp"
#include "request.hpp"
#include "state.hpp"

namespace stca::core {

/// One loaded bundle; immutable, so that a swap is one assignment and running requests finish on what they began.
class Model {
 public:
  Model(std::shared_ptr<const Bundle> bundle, const Options& options);

  const std::shared_ptr<const Bundle>& bundle() const { return bundle_; }
  const Manifest& manifest() const { return bundle_->manifest; }
  const Door& door() const { return door_; }

  const Engine& engine(bool encoder) const { return encoder ? *engines_.encoder : *engines_.scorer; }
  const Engines& engines() const { return engines_; }
  const StateKind& state_kind() const { return *state_kind_; }
  StateKey key(std::string user, std::string version) const {
    return {std::move(user), std::move(version), state_kind_};
  }

  /// Runs the user encoder on one user's admitted inputs.
  StateCache::State encode(const Row& row) const { return encode(std::vector<Row>{row})[0]; }
  /// The same for several users, those with short histories together.
  std::vector<StateCache::State> encode(const std::vector<Row>& rows) const;
  /// Runs the target scorer for several users, all at once where it can; `rows` hold their request and target inputs.
  Array score(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const;
  /// Scores of no target.
  Array no_scores() const;
  /// The state of both histories one after the other, its oldest tokens dropped beyond the window.
  StateCache::State extend(const UserState& old, const UserState& fresh) const;
  /// Throws RequestError when requests cannot be computed together.
  void check_packable() const;

 private:
  /// Where a graph's input comes from: a state tensor, or an input of the request.
  struct Source {
    bool state;
    std::size_t index;
  };
  bool is_offsets(std::size_t state) const;
  void encode_together(const std::vector<Row>& rows, std::vector<StateCache::State>& states) const;
  Array score_together(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const;
  Array join(std::size_t index, const std::vector<StateCache::State>& states) const;
  void check_output(const Engine& engine, std::size_t index, const Array& output, const Row& counts,
                    std::int64_t users) const;

  std::shared_ptr<const Bundle> bundle_;
  Engines engines_;
  std::optional<std::int64_t> window_;  // the longest history that the bundle and both engines serve
  Door door_;
  std::shared_ptr<const StateKind> state_kind_;
  std::vector<Source> encoder_inputs_, scorer_inputs_;
  std::vector<std::size_t> state_outputs_;  // of each state tensor, which output of the user encoder it is
  std::vector<TensorSpec> state_;           // in the encoder's own types
  /// The most of one run of each half.
  RunSize encoded_together_, scored_together_;
};

/// Scores targets for users. One session serves many threads.
class Session {
 public:
  Session(const std::string& path, Options options);

  Array score(const std::vector<RequestView>& requests);
  Array score(const stca_request_batch& batch);
  /// `version` must not be null; `after` may.
  bool append(const std::string& user, Inputs events, const char* version, const char* after);
  bool forget(const std::string& user) { return cache_.forget(user); }
  void swap(const std::string& path);

  stca_cache_stats stats() const { return cache_.stats(); }
  std::shared_ptr<const Model> model() const;

 private:
  using ModelPtr = std::shared_ptr<const Model>;
  Array score(const Model& model, const std::vector<RequestView>& requests);
  bool keep(const Model& model, StateKey key, const StateCache::State& state, const StateCache::State& instead_of = {});

  const Options options_;
  StateCache cache_;
  mutable std::mutex mutex_;
  ModelPtr model_;
};

}  // namespace stca::core
