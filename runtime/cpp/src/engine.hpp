// Things that execute a graph.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "tensor.hpp"

namespace stca::core {

/// Executes one graph. Safe to call from several threads at once.
class Engine {
 public:
  virtual ~Engine() = default;
  /// What runs the graph, with its version, for people to read.
  virtual std::string name() const = 0;
  /// Where the user encoder leaves its outputs and the target scorer finds them.
  virtual Memory& memory() { return Memory::host(); }
  /// Outputs in the manifest's order; `inputs` are exactly the graph's, in the manifest's order. States lie in
  /// `memory()`, everything else in the host's.
  virtual std::vector<Array> run(const std::vector<Array>& inputs) = 0;
};

struct Options {
  std::uint64_t cache_bytes = std::uint64_t{1} << 30;
  bool truncate = false;
  int threads = 0;     ///< 0 leaves it to the engine
  std::string engine;  ///< "tensorrt", "onnxruntime"; empty for the best one there is
  /// The caller's own engine for a graph, instead of the built-in ones.
  std::function<std::unique_ptr<Engine>(const std::shared_ptr<const Bundle>&, const std::string& graph)> make;
};

struct Engines {
  std::unique_ptr<Engine> encoder, scorer;
};

/// The engines of both halves. Throws BuildError when there is none, or it cannot load a graph.
Engines make_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options);

// Each of these is in the library only when it was built with the headers of that name.
std::unique_ptr<Engine> make_tensorrt_engine(const Bundle& bundle, const std::string& graph);
std::unique_ptr<Engine> make_onnxruntime_engine(const Bundle& bundle, const std::string& graph, int threads);

/// Engine entry of `flavour` for a graph, or null when the bundle has none.
const EngineEntry* find_engine(const Manifest& manifest, const std::string& flavour, const std::string& graph);

}  // namespace stca::core
