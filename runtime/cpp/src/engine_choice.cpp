#include "engine_choice.hpp"

#include <algorithm>
#include <array>
#include <map>

#include "error.hpp"

namespace stca::core {
namespace {

constexpr std::array halves{"user_encoder", "target_scorer"};

struct Rank {
  const char *flavour, *provider;
  std::vector<const char*> precisions;
};
/// Fastest first. On a CPU float16 is computed in float32 with casts around every operator.
const std::vector<Rank>& order() {
  static const std::vector<Rank> ranks{
      {"tensorrt", "", {"bf16", "fp16", "fp32"}},
      {"tensorrt-rtx", "", {"bf16", "fp16", "fp32"}},
      {"onnxruntime", "CUDAExecutionProvider", {"fp16", "bf16", "fp32"}},
      {"onnxruntime", "CPUExecutionProvider", {"fp32", "fp16"}},
  };
  return ranks;
}

/// One pair: each half's entry, by the half's name.
using Pair = std::map<std::string, const EngineEntry*>;

/// Why a pair of TensorRT plans cannot run; empty when it can.
std::string tensorrt_obstacle(const Pair& pair, std::int64_t sm, const Machine& machine) {
  const auto because = [](const std::string& detail) { return detail.empty() ? "" : " (" + detail + ")"; };
  if (!machine.with_tensorrt) return "this library was built without it; rebuild it with -DSTCA_TENSORRT_INCLUDE_DIR=…";
  if (machine.sm == 0) return "there is no GPU here" + because(machine.no_gpu);
  if (machine.sm != sm) return "this GPU is SM " + std::to_string(machine.sm);
  if (machine.tensorrt.empty()) return "tensorrt is not installed: " + machine.no_tensorrt;
  std::vector<std::string> wrong;
  for (const auto& [half, entry] : pair) {
    if (entry->version != machine.tensorrt) wrong.push_back(entry->version);
  }
  if (wrong.empty()) return "";
  return "built with " + *std::min_element(wrong.begin(), wrong.end()) + ", here is " + machine.tensorrt;
}

/// Why a pair cannot run; empty when it can.
std::string obstacle(const Pair& pair, const Rank& rank, std::int64_t sm, const Manifest& manifest,
                     const Machine& machine) {
  for (const char* half : halves) {
    if (pair.count(half) == 0) return "there is no engine of " + std::string(half) + "; run `stca build`";
  }
  const std::string flavour = rank.flavour, provider = rank.provider;
  if (flavour != "onnxruntime" && !manifest.tables.empty()) {
    return "the C++ runtime looks rows of tables up for ONNX Runtime alone";
  }
  if (flavour == "tensorrt") return tensorrt_obstacle(pair, sm, machine);
  if (flavour == "tensorrt-rtx") return "the C++ runtime has no engine for it; serve it from Python";
  if (provider != "CPUExecutionProvider") return "ONNX Runtime has no " + provider + " here";
  for (const auto& [half, entry] : pair) {
    if (entry->precision != "fp32") return "on a CPU the bundle's own float32 graphs are faster";
    if (entry->file != manifest.graph(half).file) return "the C++ runtime runs the bundle's own graphs alone";
  }
  return "";
}

}  // namespace

Choice own_graphs(std::string why) { return {nullptr, nullptr, std::move(why), {}}; }

std::string joined(const std::vector<std::string>& reasons) {
  std::string text;
  for (const std::string& reason : reasons) text += (text.empty() ? "" : "; ") + reason;
  return text;
}

Choice best_engine(const Manifest& manifest, const Machine& machine, const std::string& only,
                   const std::string& wanted, bool native_code) {
  std::vector<std::string> passed_over;
  for (const Rank& rank : order()) {
    if (!only.empty() && only != rank.flavour) continue;
    for (const char* precision : rank.precisions) {
      if (!wanted.empty() && wanted != precision) continue;
      std::vector<std::pair<std::int64_t, Pair>> pairs;  // by SM
      for (const EngineEntry& entry : manifest.engines) {
        if (entry.flavour != rank.flavour || entry.precision != precision || entry.provider != rank.provider) continue;
        const auto same = [&](const auto& pair) { return pair.first == entry.sm; };
        auto found = std::find_if(pairs.begin(), pairs.end(), same);
        if (found == pairs.end()) found = pairs.insert(pairs.end(), {entry.sm, {}});
        found->second[entry.graph] = &entry;
      }
      std::stable_partition(pairs.begin(), pairs.end(), [&](const auto& pair) { return pair.first == machine.sm; });
      for (const auto& [sm, pair] : pairs) {
        const std::string name =
            std::string(rank.flavour) + " " + precision + (sm != 0 ? " for SM " + std::to_string(sm) : "");
        std::string reason = obstacle(pair, rank, sm, manifest, machine);
        const auto carries = [](const auto& half) { return half.second->lowering == "plugin"; };
        if (reason.empty() && !native_code && std::any_of(pair.begin(), pair.end(), carries)) {
          reason = "it carries native code, which opening it runs; say native_code if you trust its maker";
        }
        if (!reason.empty()) {
          passed_over.push_back(name + ": " + reason);
          continue;
        }
        Choice choice{nullptr, nullptr, name + " is the fastest pair in the bundle that runs here", passed_over};
        if (rank.flavour == std::string("tensorrt")) {
          choice.encoder = pair.at("user_encoder");
          choice.scorer = pair.at("target_scorer");
        }
        return choice;
      }
    }
  }
  if (!only.empty()) {
    const std::string command = "stca build --engine " + only + (wanted.empty() ? "" : " --precision " + shown(wanted));
    fail(STCA_BUILD_ERROR, "no ", only, wanted.empty() ? "" : " " + shown(wanted), " engines that run here: ",
         passed_over.empty() ? "the bundle has none; run `" + command + "`" : joined(passed_over));
  }
  Choice choice =
      own_graphs("ONNX Runtime on the CPU runs the bundle's own graphs; it has no faster engine that runs here");
  choice.passed_over = std::move(passed_over);
  return choice;
}

}  // namespace stca::core
