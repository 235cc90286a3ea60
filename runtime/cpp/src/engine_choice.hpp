// Which of a bundle's engines to serve with on this machine, and why not the others: the rules and the words of
// `stca.runtime.engine_choice`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace stca::core {

/// What can run here, besides the bundle's own graphs on ONNX Runtime's CPU provider.
struct Machine {
  bool with_tensorrt = false;  ///< whether this library was built with it
  std::int64_t sm = 0;         ///< compute capability of the thread's current GPU, 90 for 9.0; 0 without one
  std::string no_gpu;          ///< why there is none
  std::string tensorrt;        ///< version, "11.4.0.106"; empty when it cannot be loaded
  std::string no_tensorrt;     ///< why not, and how to get it
};

/// Engines of both halves.
struct Choice {
  const EngineEntry *encoder = nullptr, *scorer = nullptr;  ///< plans; null for the bundle's own graphs on the CPU
  std::string why;                                          ///< one line
  std::vector<std::string> passed_over;                     ///< one line for each faster pair that cannot run here
};

/// The fastest pair of engines that can run here; the bundle's own graphs always can. The pointers are into `manifest`.
/// `only` is "tensorrt", whose plans must then run here, or empty; `precision` is that of the plans, or empty for the
/// fastest. `native_code` takes plans that carry native code: opening one runs it. Throws BuildError when there are none.
Choice best_engine(const Manifest& manifest, const Machine& machine, const std::string& only,
                   const std::string& precision = "", bool native_code = false);

/// The bundle's own graphs, whatever engines it has.
Choice own_graphs(std::string why = "the bundle's own graphs were asked for");

/// All reasons on one line.
std::string joined(const std::vector<std::string>& reasons);

}  // namespace stca::core
