// Which shapes an engine keeps CUDA graphs of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "gpu_device.hpp"

namespace stca::core {

/// How much is recorded of what comes again.
struct ReplayLimits {
  int graphs = 64;                     ///< most to keep; none from 0 down
  std::size_t most_copied = 64 << 20;  ///< most bytes of a run's states that are worth copying for a replay
  /// A recording takes many times a run. So one takes another's place only when that was not used in so many runs, or
  /// traffic of a few more shapes than graphs would record all the time.
  std::uint64_t patience = 1000;
};

/// Graphs by shape. Both lists are searched from one end to the other, which is nothing to a run while there are some
/// dozens of graphs.
template <class Context>
class Replays {
 public:
  /// The profile, then the size of every symbol, filled up.
  using Key = std::vector<std::int64_t>;
  /// A CUDA graph and the context it was recorded from. The graph goes first.
  struct Replay {
    Key key;
    std::uint64_t used;  // in which run, last
    std::unique_ptr<Context> context;
    Device::Recording graph;
  };

  explicit Replays(const ReplayLimits& limits)
      : graphs_(static_cast<std::size_t>(std::max(limits.graphs, 0))), patience_(limits.patience) {}

  std::size_t size() const { return kept_.size(); }

  /// What a run of this shape can replay, or null.
  const Replay* find(const Key& key) {
    ++runs_;
    const auto found =
        std::find_if(kept_.begin(), kept_.end(), [&](const Replay& replay) { return replay.key == key; });
    if (found == kept_.end()) return nullptr;
    kept_.splice(kept_.begin(), kept_, found);
    kept_.front().used = runs_;
    return &kept_.front();
  }

  /// Whether the run just done is to be recorded: there is room, if need be that of the graph that was not used for
  /// longest, and the shape came before, not long ago. Shapes that come once push out no graph.
  bool wants(const Key& key) {
    const bool room = kept_.size() < graphs_ || (graphs_ > 0 && runs_ - kept_.back().used > patience_);
    if (!room) return false;
    const auto found = std::find(once_.begin(), once_.end(), key);
    if (found != once_.end()) {
      once_.erase(found);
      return true;
    }
    once_.push_front(key);
    if (once_.size() > 4 * graphs_) once_.pop_back();
    return false;
  }

  void make_room() {
    if (kept_.size() >= graphs_) kept_.pop_back();
  }
  void keep(Key key, std::unique_ptr<Context> context, Device::Recording graph) {
    kept_.push_front({std::move(key), runs_, std::move(context), std::move(graph)});
  }
  /// Drops all graphs: an address in them is no longer right.
  void clear() { kept_.clear(); }
  /// Drops all graphs, and wants none ever again.
  void stop() {
    graphs_ = 0;
    kept_.clear();
    once_.clear();
  }

 private:
  std::size_t graphs_;
  const std::uint64_t patience_;
  std::uint64_t runs_ = 0;
  std::list<Replay> kept_;  // the most recently used first
  std::list<Key> once_;     // shapes that came once, the latest first
};

}  // namespace stca::core
