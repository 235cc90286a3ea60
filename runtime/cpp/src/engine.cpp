#include "engine.hpp"

#include <algorithm>

#include "error.hpp"

namespace stca::core {
namespace {

#ifdef STCA_WITH_TENSORRT
constexpr bool with_tensorrt = true;
#else
constexpr bool with_tensorrt = false;
#endif
#ifdef STCA_WITH_ONNXRUNTIME
constexpr bool with_onnxruntime = true;
#else
constexpr bool with_onnxruntime = false;
#endif

/// Looks for a GPU and for TensorRT only where the bundle has plans that could run.
Machine machine_for(const Manifest& manifest) {
  const bool plans = std::any_of(manifest.engines.begin(), manifest.engines.end(),
                                 [](const EngineEntry& entry) { return entry.flavour == "tensorrt"; });
  if constexpr (with_tensorrt) {
    if (plans) return tensorrt_machine();
  }
  return {with_tensorrt, 0, "", "", ""};
}

Choice choose(const Manifest& manifest, const std::string& wanted, const std::string& precision, bool native_code) {
  if (!precision.empty() && (wanted.empty() || wanted == "graphs")) {
    fail(STCA_USAGE_ERROR, "precision: ", in_quotes(precision), " is of a built engine; say which with engine=");
  }
  if (wanted == "onnxruntime" && !precision.empty() && precision != "fp32") {
    fail(STCA_BUILD_ERROR, "no onnxruntime ", shown(precision),
         " engines that run here: the C++ runtime runs the bundle's own graphs alone, which are fp32");
  }
  if (wanted == "onnxruntime" || wanted == "graphs") return own_graphs();
  if (!wanted.empty() && wanted != "tensorrt") {
    fail(STCA_BUILD_ERROR, "there is no engine '", shown(wanted), "'; choose tensorrt, onnxruntime or graphs");
  }
  if (!with_tensorrt && wanted == "tensorrt") {  // whatever the bundle lacks besides
    fail(STCA_BUILD_ERROR, "this library was built without TensorRT; rebuild it with -DSTCA_TENSORRT_INCLUDE_DIR=…");
  }
  return best_engine(manifest, machine_for(manifest), wanted, precision, native_code);
}

Engines open(const std::shared_ptr<const Bundle>& bundle, const Choice& choice, const Options& options) {
  if constexpr (with_tensorrt) {
    if (choice.encoder != nullptr) return make_tensorrt_engines(bundle, choice, options.cuda_graphs);
  }
  if constexpr (with_onnxruntime) {
    return make_onnxruntime_engines(bundle, options);
  } else {
    fail(STCA_BUILD_ERROR, "this library was built without ", with_tensorrt ? "" : "TensorRT and without ",
         "ONNX Runtime; rebuild it with -DSTCA_ONNXRUNTIME=ON, or give it engines (make_engine)");
  }
}

}  // namespace

Engines make_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options) {
  if (options.make) {
    Engines own{options.make(bundle, "user_encoder"), options.make(bundle, "target_scorer"), "the caller's own engines",
                ""};
    if (bundle->manifest.grows()) own.grower = options.make(bundle, user_grower);
    return own;
  }
  const Choice choice = choose(bundle->manifest, options.engine, options.precision, options.native_code);
  const std::string passed_over = joined(choice.passed_over);
  try {
    Engines engines = open(bundle, choice, options);
    engines.why = choice.why;
    engines.passed_over = passed_over;
    return engines;
  } catch (const Error& e) {
    // What was left to try failed too; whoever reads this may rather want to mend what was passed over.
    if (passed_over.empty()) throw;
    throw Error(e.code, std::string(e.what()) + "; passed over were " + passed_over);
  }
}

}  // namespace stca::core
