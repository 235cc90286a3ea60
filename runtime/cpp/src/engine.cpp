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

/// TensorRT where the bundle has plans for it, else ONNX Runtime; of those the library was built with.
std::string best_engine(const Manifest& manifest) {
  const bool plans = std::any_of(manifest.engines.begin(), manifest.engines.end(),
                                 [](const EngineEntry& entry) { return entry.flavour == "tensorrt"; });
  if (with_tensorrt && plans) return "tensorrt";
  if (with_onnxruntime) return "onnxruntime";
  if (with_tensorrt) {
    fail(STCA_BUILD_ERROR, "the bundle has no TensorRT engines; run `stca build --engine tensorrt`");
  }
  fail(STCA_BUILD_ERROR,
       "this library was built without TensorRT and without ONNX Runtime; rebuild it with -DTENSORRT_INCLUDE_DIR=… or "
       "-DONNXRUNTIME_INCLUDE_DIR=…, or give it engines (make_engine)");
}

}  // namespace

Engines make_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options) {
  if (options.make) return {options.make(bundle, "user_encoder"), options.make(bundle, "target_scorer")};
  const std::string kind = options.engine.empty() ? best_engine(bundle->manifest) : options.engine;
#ifdef STCA_WITH_TENSORRT
  if (kind == "tensorrt") return make_tensorrt_engines(bundle);
#endif
#ifdef STCA_WITH_ONNXRUNTIME
  if (kind == "onnxruntime") return make_onnxruntime_engines(bundle, options.threads);
#endif
  if (kind != "tensorrt" && kind != "onnxruntime") {
    fail(STCA_BUILD_ERROR, "there is no engine '", kind, "'; choose tensorrt or onnxruntime");
  }
  fail(STCA_BUILD_ERROR, "this library was built without ", kind, "; rebuild it with -D",
       kind == "tensorrt" ? "TENSORRT" : "ONNXRUNTIME", "_INCLUDE_DIR=…, or choose another engine");
}

}  // namespace stca::core
