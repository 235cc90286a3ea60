#include "engine.hpp"

#include "error.hpp"

namespace stca::core {
namespace {

constexpr const char* encoder_graph = "user_encoder";
constexpr const char* scorer_graph = "target_scorer";

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

std::unique_ptr<Engine> built_in(const std::string& kind, const Bundle& bundle, const std::string& graph, int threads) {
#ifdef STCA_WITH_TENSORRT
  if (kind == "tensorrt") return make_tensorrt_engine(bundle, graph);
#endif
#ifdef STCA_WITH_ONNXRUNTIME
  if (kind == "onnxruntime") return make_onnxruntime_engine(bundle, graph, threads);
#endif
  static_cast<void>(threads);
  if (kind == "tensorrt" || kind == "onnxruntime") {
    fail(STCA_BUILD_ERROR, "this library was built without ", kind, "; rebuild it with -D",
         kind == "tensorrt" ? "TENSORRT" : "ONNXRUNTIME", "_INCLUDE_DIR=…, or choose another engine (",
         bundle.path.string(), ", ", graph, ")");
  }
  fail(STCA_BUILD_ERROR, "there is no engine '", kind, "'; choose tensorrt or onnxruntime");
}

std::string best_engine(const Manifest& manifest) {
  const bool built = find_engine(manifest, "tensorrt", encoder_graph) != nullptr &&
                     find_engine(manifest, "tensorrt", scorer_graph) != nullptr;
  if (with_tensorrt && built) return "tensorrt";
  if (with_onnxruntime) return "onnxruntime";
  if (with_tensorrt) {
    fail(STCA_BUILD_ERROR,
         "the bundle has no TensorRT engines of both halves; add them with "
         "`stca build --engine tensorrt`");
  }
  fail(STCA_BUILD_ERROR,
       "this library was built without TensorRT and without ONNX Runtime; rebuild it with "
       "-DTENSORRT_INCLUDE_DIR=… or -DONNXRUNTIME_INCLUDE_DIR=…, or give it engines (make_engine)");
}

}  // namespace

const EngineEntry* find_engine(const Manifest& manifest, const std::string& flavour, const std::string& graph) {
  for (const EngineEntry& entry : manifest.engines) {
    if (entry.flavour == flavour && entry.graph == graph) return &entry;
  }
  return nullptr;
}

Engines make_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options) {
  auto make = options.make;
  if (!make) {
    const std::string kind = options.engine.empty() ? best_engine(bundle->manifest) : options.engine;
    make = [kind, threads = options.threads](const std::shared_ptr<const Bundle>& b, const std::string& graph) {
      return built_in(kind, *b, graph, threads);
    };
  }
  return {make(bundle, encoder_graph), make(bundle, scorer_graph)};
}

}  // namespace stca::core
