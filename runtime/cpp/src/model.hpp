// One bundle with its engines: what is computed, and in which runs.
#pragma once

#include <functional>
#include <memory>
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
  /// The bundle at `path`, whatever may be put in its place meanwhile. `served`, unless it is null, is of the bundle
  /// whose place it shall take. Throws BundleError, BuildError.
  static std::shared_ptr<const Model> load(const std::string& path, const Options& options, const Manifest* served);
  Model(std::shared_ptr<const Bundle> bundle, const Options& options);

  const std::shared_ptr<const Bundle>& bundle() const { return bundle_; }
  const Manifest& manifest() const { return bundle_->manifest; }
  const Door& door() const { return door_; }

  const Engine& engine(bool encoder) const { return encoder ? *engines_.encoder : *engines_.scorer; }
  const Engines& engines() const { return engines_; }
  std::optional<std::int64_t> window() const { return window_; }
  const std::shared_ptr<const StateKind>& state_kind() const { return state_kind_; }
  StateKey key(std::string user, std::string version) const {
    return {std::move(user), std::move(version), state_kind_};
  }

  /// Runs the user encoder on one user's admitted inputs.
  StateCache::State encode(const Row& row) const { return encode(std::vector<Row>{row})[0]; }
  /// Takes the state that was made of the row of this number.
  using Made = std::function<void(std::size_t row, std::shared_ptr<UserState> state)>;
  /// The same for several users, those with short histories together. The states of a run are given before the next
  /// begins. The deadline is looked at before each run, and throws.
  void encode(const std::vector<Row>& rows, const Deadline& deadline, const Made& made) const;
  std::vector<StateCache::State> encode(const std::vector<Row>& rows) const;
  /// Runs the target scorer for several users, all at once where it can; `rows` hold their request and target inputs.
  Array score(const std::vector<StateCache::State>& states, const std::vector<Row>& rows,
              const Deadline& deadline = Deadline::never()) const;
  /// Scores of no target.
  Array no_scores() const;
  /// Whether the scores of a state are finite, by those of one made-up target.
  bool gives_finite(const StateCache::State& state) const;
  /// The old state, behind whose sums these events wait for the next request.
  StateCache::State put_off(const UserState& old, const Row& row) const;
  /// The state with the events that waited: what the user grower makes of them, and of what there is once per user now,
  /// on top of the state's sums.
  StateCache::State finished(const UserState& state) const;
  /// The state of both histories one after the other, its oldest tokens dropped beyond the window. Where states hold
  /// sums, `fresh` was grown from `old`, and all but rows of tokens is its.
  StateCache::State extend(const UserState& old, const UserState& fresh) const;
  /// The state with the events of `fresh` in the place of those from `first` on, all of which it has.
  StateCache::State replace(const UserState& old, const UserState& fresh, std::int64_t first) const;

 private:
  /// Where a graph's input comes from: a state tensor, or an input of the request.
  struct Source {
    bool state;
    std::size_t index;
  };
  /// A size that a state shares with an input of another scope.
  struct Shared {
    std::size_t state;
    int state_axis;
    std::size_t input;
    int input_axis;
  };
  void find_sources();
  void find_shared();
  void check_shared(const UserState& state, const Row& row) const;
  bool is_offsets(std::size_t state) const;
  std::vector<std::shared_ptr<UserState>> encode_together(const std::vector<Row>& rows) const;
  std::vector<Array> run_scorer(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const;
  Array score_together(const std::vector<StateCache::State>& states, const std::vector<Row>& rows) const;
  Array join(std::size_t index, const std::vector<StateCache::State>& states) const;
  /// What a graph takes, in its order.
  std::vector<Array> feeds(const std::vector<Source>& sources, const std::vector<StateCache::State>& states,
                           const std::vector<Row>& rows) const;
  void check_output(const Engine& engine, std::size_t index, const Array& output, const std::vector<Row>& rows) const;

  std::shared_ptr<const Bundle> bundle_;
  Engines engines_;
  std::optional<std::int64_t> window_;  // the longest history that the bundle and both engines serve
  Door door_;
  std::shared_ptr<const StateKind> state_kind_;
  std::vector<Source> encoder_inputs_, scorer_inputs_, grower_inputs_;
  std::vector<std::size_t> state_outputs_;  // of each state tensor, which output of the user encoder it is
  std::vector<TensorSpec> state_;           // in the encoder's own types
  std::vector<Shared> shared_;
  bool check_finite_;
  /// The most of one run of each half.
  RunSize encoded_together_, scored_together_;
};

}  // namespace stca::core
