// Things that execute a graph.
#pragma once

#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "engine_choice.hpp"
#include "state.hpp"
#include "tensor.hpp"

namespace stca::core {

inline constexpr std::int64_t no_limit = std::numeric_limits<std::int64_t>::max();

/// How much goes through an engine in one run: requests, history tokens, targets.
struct RunSize {
  std::int64_t requests = 0, tokens = 0, targets = 0;
};

/// Executes one graph. Safe to call from several threads at once.
class Engine {
 public:
  virtual ~Engine() = default;
  /// What runs the graph, with its version, for people to read.
  virtual std::string name() const = 0;
  /// What goes in and out, in the order of `run`.
  virtual const GraphSpec& spec() const = 0;
  /// The most that one run takes. What alone is more than that is given to `run` all the same, which says so.
  virtual RunSize largest_run() const { return {no_limit, no_limit, no_limit}; }
  /// Where the user encoder leaves its outputs and the target scorer finds them.
  virtual Memory& memory() { return Memory::host(); }
  /// Outputs for inputs. States lie in `memory()`, everything else in the host's; small ones, such as offsets that were
  /// joined, may lie in the host's though they are of a state.
  virtual std::vector<Array> run(const std::vector<Array>& inputs) = 0;
};

/// Where a table's rows come from. Safe to call from several threads at once.
class RowSource {
 public:
  virtual ~RowSource() = default;
  /// Rows `(n, width)`, float32, of `n` row numbers in the table that it is the source of.
  virtual Array rows(const TableSpec& table, const std::vector<std::int64_t>& ids) = 0;
};

/// Most targets scored together unless a session says otherwise: so many need gigabytes.
inline constexpr std::int64_t most_targets = 1 << 20;

struct Options {
  KeepLimits keep;
  std::string state_folder;  ///< of files in which states outlive memory and the process; empty for none
  std::uint64_t state_folder_bytes = std::uint64_t{1} << 33;  ///< most bytes of files in it
  bool truncate = false;
  int threads = 0;           ///< of one request; 0 takes every processor that this process may use
  std::int64_t max_targets = most_targets;  ///< of a request, or of a batch together
  bool check_versions = false;  ///< whether a history sent with the version of another one that is kept is an error
  std::string engine;        ///< "tensorrt", "onnxruntime" or "graphs"; empty for the best one that runs here
  std::string precision;     ///< of built engines, "fp32", "bf16" or "fp16"; empty for the fastest
  bool native_code = false;  ///< whether to open plans that carry native code: the caller trusts their maker
  bool check_finite = true;  ///< whether scores that are not finite are an error
  int cuda_graphs = 64;      ///< most CUDA graphs that a TensorRT engine keeps; none from 0 down
  /// The caller's own source of rows, by the name of a table that left the graphs; files of the bundle for the others.
  std::map<std::string, std::shared_ptr<RowSource>> tables;
  /// The caller's own engine for a graph, instead of the built-in ones. It is given ids where a table left the graphs.
  /// Asked for the user grower too, where states hold sums.
  std::function<std::unique_ptr<Engine>(const std::shared_ptr<const Bundle>&, const std::string& graph)> make;
};

struct Engines {
  std::unique_ptr<Engine> encoder, scorer;
  std::string why;          ///< why these, one line
  std::string passed_over;  ///< why not a faster pair, one reason for each
  std::unique_ptr<Engine> grower = nullptr;  ///< of the bundle's own graph on the CPU, where states hold sums
};

/// The engines of both halves. Throws BuildError when there is none, or it cannot load a graph.
Engines make_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options);

// Each of these is in the library only when it was built with the headers of that name.
/// What there is of a GPU and of TensorRT; nothing that is missing is an error.
Machine tensorrt_machine();
Engines make_tensorrt_engines(const std::shared_ptr<const Bundle>& bundle, const Choice& choice, int cuda_graphs);
/// The bundle's own graphs on the CPU, whatever engines it has.
Engines make_onnxruntime_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options);

}  // namespace stca::core
