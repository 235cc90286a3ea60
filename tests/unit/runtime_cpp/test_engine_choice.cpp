// Which engines are chosen, and the words for it. The cases that must end as in Python come from a file that
// test_cpp_runtime.py writes: see `choice_is_pythons`.
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "check.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "json.hpp"
#include "digest.hpp"

using namespace stca::core;

namespace {

Manifest manifest() {
  std::ostringstream text;
  text << std::ifstream(STCA_GOLDEN "/log/manifest.json").rdbuf();
  return Manifest::parse(text.str());
}

EngineEntry plan(const char* graph, const char* precision = "bf16", std::int64_t sm = 90) {
  EngineEntry entry;
  entry.graph = graph, entry.flavour = "tensorrt", entry.precision = precision, entry.sm = sm;
  entry.file = std::string(graph) + "." + precision + ".plan", entry.version = "11.4.0.106";
  return entry;
}

const Machine h100{true, 90, "", "11.4.0.106", ""};

/// The reason for which the only pair, in bf16 for SM 90, is passed over on a machine; empty when it is taken.
std::string reason(const Machine& machine) {
  Manifest m = manifest();
  m.engines = {plan("user_encoder"), plan("target_scorer")};
  const Choice choice = best_engine(m, machine, "");
  if (choice.passed_over.empty()) return "";
  CHECK(choice.encoder == nullptr && choice.scorer == nullptr);
  CHECK_EQUAL(choice.why,
              "ONNX Runtime on the CPU runs the bundle's own graphs; it has no faster engine that runs here");
  CHECK_EQUAL(choice.passed_over.size(), 1u);
  CHECK_THROWS(best_engine(m, machine, "tensorrt"), Error,
               "no tensorrt engines that run here: " + choice.passed_over[0]);
  const std::string begin = "tensorrt bf16 for SM 90: ";
  CHECK(choice.passed_over[0].rfind(begin, 0) == 0);
  return choice.passed_over[0].substr(begin.size());
}

}  // namespace

TEST(choice_reads_which_rows_may_be_added) {
  std::ostringstream text;
  text << std::ifstream(STCA_GOLDEN "/log/manifest.json").rdbuf();
  const auto padded = [&](const std::string& json) {
    std::string with = text.str();
    const std::string none = "\"engines\": []";
    CHECK(check::contains(with, none));
    with.replace(with.find(none), none.size(),
                 R"("engines": [{"graph": "user_encoder", "file": "x", "flavour": "tensorrt", "version": "11.4.0.106", "sm": 90,
      "precision": "bf16", "requests": 1, "inputs": [{"name": "x", "dtype": "int64", "shape": ["N_h", "N_t"]}],
      "outputs": [], "profiles": [{"N_h": [1, 2, 3], "N_t": [1, 2, 3]}, {"N_h": [1, 2, 3], "N_t": [1, 2, 3], "B": [1, 1, 1]}])" +
                     json + "}]");
    return Manifest::parse(with).engines[0].padded;
  };
  CHECK(padded("").empty());
  CHECK(padded(R"(, "padded": [])").empty());
  CHECK(padded(R"(, "padded": ["N_h"])") == std::vector<std::string>{"N_h"});
  // No dimension, one that a profile does not have, one that counts columns, and what is no list of names.
  for (const char* wrong : {R"(["N_x"])", R"(["N_h", "B"])", R"(["N_t"])", "[1]", "\"N_h\"", "null"}) {
    CHECK_THROWS(padded(std::string(R"(, "padded": )") + wrong), Error, "engines[0].padded must be a list");
  }
}

TEST(choice_says_what_is_in_the_way) {
  CHECK_EQUAL(reason(h100), "");
  Machine machine = h100;
  machine.tensorrt = "11.5.0.1";
  CHECK_EQUAL(reason(machine), "built with 11.4.0.106, here is 11.5.0.1");
  machine.tensorrt = "", machine.no_tensorrt = "libnvinfer.so.11 cannot be loaded";
  CHECK_EQUAL(reason(machine), "tensorrt is not installed: libnvinfer.so.11 cannot be loaded");
  machine.sm = 80;
  CHECK_EQUAL(reason(machine), "this GPU is SM 80");
  machine.sm = 0;
  CHECK_EQUAL(reason(machine), "there is no GPU here");
  machine.no_gpu = "libcudart.so.13 cannot be loaded";
  CHECK_EQUAL(reason(machine), "there is no GPU here (libcudart.so.13 cannot be loaded)");
  machine.with_tensorrt = false;
  CHECK_EQUAL(reason(machine), "this library was built without it; rebuild it with -DSTCA_TENSORRT_INCLUDE_DIR=…");
}

TEST(choice_goes_on_to_the_next_pair) {
  Manifest m = manifest();
  m.engines = {plan("target_scorer", "fp32"), plan("user_encoder", "fp32"), plan("user_encoder", "bf16"),
               plan("user_encoder", "fp16", 80), plan("target_scorer", "fp16", 80)};
  const Choice choice = best_engine(m, h100, "");
  CHECK_EQUAL(choice.why, "tensorrt fp32 for SM 90 is the fastest pair in the bundle that runs here");
  CHECK_EQUAL(joined(choice.passed_over),
              "tensorrt bf16 for SM 90: there is no engine of target_scorer; run `stca build`; "
              "tensorrt fp16 for SM 80: this GPU is SM 90");
  CHECK(choice.encoder == &m.engines[1] && choice.scorer == &m.engines[0]);
  m.engines[0].version = "11.3.0.1";  // of the two halves' versions, the one that is not there
  CHECK_THROWS(best_engine(m, h100, "tensorrt"), Error, "tensorrt fp32 for SM 90: built with 11.3.0.1, here is 11.4");
  m.engines.clear();
  CHECK_THROWS(best_engine(m, h100, "tensorrt"), Error,
               "no tensorrt engines that run here: the bundle has none; run `stca build --engine tensorrt`");
}

TEST(choice_takes_native_code_only_from_those_the_caller_trusts) {
  Manifest m = manifest();
  m.engines = {plan("user_encoder"), plan("target_scorer"), plan("user_encoder", "fp16"), plan("target_scorer", "fp16")};
  m.engines[1].lowering = "plugin";
  Choice choice = best_engine(m, h100, "");
  CHECK(choice.encoder == &m.engines[2]);
  CHECK_EQUAL(joined(choice.passed_over),
              "tensorrt bf16 for SM 90: it carries native code, which opening it runs; say native_code if you trust its "
              "maker");
  CHECK(best_engine(m, h100, "", "", true).encoder == &m.engines[0]);
  m.engines.resize(2);
  CHECK_THROWS(best_engine(m, h100, "tensorrt"), Error, "it carries native code");
}

TEST(choice_runs_no_engine_but_tensorrts) {
  Manifest m = manifest();
  const auto add = [&](const char* flavour, const char* precision, const char* provider, const char* suffix) {
    for (const char* graph : {"user_encoder", "target_scorer"}) {
      EngineEntry entry = plan(graph, precision, std::string(flavour) == "tensorrt-rtx" ? 89 : 0);
      entry.flavour = flavour, entry.provider = provider, entry.file = std::string(graph) + suffix;
      m.engines.push_back(entry);
    }
  };
  add("tensorrt-rtx", "bf16", "", ".plan");
  add("onnxruntime", "fp16", "CUDAExecutionProvider", ".fp16.onnx");
  add("onnxruntime", "fp16", "CPUExecutionProvider", ".fp16.onnx");
  Choice choice = best_engine(m, h100, "");
  CHECK_EQUAL(choice.why,
              "ONNX Runtime on the CPU runs the bundle's own graphs; it has no faster engine that runs here");
  CHECK_EQUAL(joined(choice.passed_over),
              "tensorrt-rtx bf16 for SM 89: the C++ runtime has no engine for it; serve it from Python; "
              "onnxruntime fp16: ONNX Runtime has no CUDAExecutionProvider here; "
              "onnxruntime fp16: on a CPU the bundle's own float32 graphs are faster");
  add("onnxruntime", "fp32", "CPUExecutionProvider", ".onnx");  // those are the bundle's own graphs
  choice = best_engine(m, h100, "");
  CHECK_EQUAL(choice.why, "onnxruntime fp32 is the fastest pair in the bundle that runs here");
  CHECK_EQUAL(choice.passed_over.size(), 2u);
  CHECK(choice.encoder == nullptr);
  m.engines.back().file = "target_scorer.other.onnx";
  CHECK(check::contains(joined(best_engine(m, h100, "").passed_over), "runs the bundle's own graphs alone"));
}

#if defined(STCA_WITH_TENSORRT) && defined(STCA_WITH_ONNXRUNTIME)
TEST(choice_falls_back_to_onnxruntime) {
  auto bundle = std::make_shared<Bundle>(*Bundle::load(STCA_GOLDEN "/log"));
  bundle->manifest.engines = {plan("user_encoder", "bf16", 1),
                              plan("target_scorer", "bf16", 1)};  // a GPU like no other
  const std::string pair = "tensorrt bf16 for SM 1: ";
  try {
    const Engines engines = make_engines(bundle, {});
    CHECK_EQUAL(engines.why,
                "ONNX Runtime on the CPU runs the bundle's own graphs; it has no faster engine that runs here");
    CHECK(engines.passed_over.rfind(pair, 0) == 0);
    std::cout << engines.scorer->name() << ", passed over: " << engines.passed_over << "\n";
  } catch (const Error& e) {  // no ONNX Runtime either
    CHECK(check::contains(e.what(), "; passed over were " + pair));
  }
}
#endif

#ifdef STCA_WITH_TENSORRT
TEST(choice_hands_plans_to_the_real_library) {
  if (std::getenv("STCA_TENSORRT_LIBRARY") == nullptr || std::getenv("STCA_CUDART_LIBRARY") == nullptr) return;
  const Machine machine = tensorrt_machine();
  std::cout << "SM " << machine.sm << ", TensorRT " << machine.tensorrt << machine.no_tensorrt << "\n";
  const check::TemporaryFolder folder;
  auto bundle = std::make_shared<Bundle>(*Bundle::load(STCA_GOLDEN "/log"));
  bundle->path = folder.path();
  bundle->folder = std::make_shared<const Folder>(folder.path());
  for (const char* half : {"user_encoder", "target_scorer"}) {
    EngineEntry entry = plan(half, "fp32", machine.sm);
    entry.version = machine.tensorrt, entry.spec = bundle->manifest.graph(half);
    entry.profiles = {{{"N_h", {1, 6}}, {"N_t", {1, 8}}, {"B", {1, 3}}, {"B_plus_1", {2, 4}}}};
    const std::string bytes = "no plan at all";
    std::ofstream(folder.path() / entry.file) << bytes;
    Sha256 digest;
    digest.update(bytes);
    bundle->manifest.files[entry.file] = {static_cast<std::int64_t>(bytes.size()), digest.hex()};
    bundle->manifest.engines.push_back(entry);
  }
  try {
    make_engines(bundle, {});
    CHECK(!"loaded what is no plan");
  } catch (const Error& e) {
    CHECK_EQUAL(e.code, STCA_BUILD_ERROR);
    std::cout << e.what() << "\n";
  }
}
#endif

TEST(choice_is_pythons) {
  const char* file = std::getenv("STCA_CHOICE_CASES");
  if (file == nullptr) return;
  std::ostringstream text;
  text << std::ifstream(file).rdbuf();
  const Json cases = Json::parse(text.str());
  for (const Json& test : *cases.list()) {
    const auto string = [&](const char* name) { return *test.find(name)->string(); };
    const Manifest m = Manifest::parse(string("manifest"));
    const Machine machine{true, *test.find("sm")->integer(), "", string("tensorrt"), string("install")};
    std::string why, passed_over;
    try {
      const Choice choice = best_engine(m, machine, string("only"));
      why = choice.why, passed_over = joined(choice.passed_over);
      const std::string encoder = choice.encoder == nullptr ? "" : choice.encoder->file;
      CHECK_EQUAL(encoder, string("encoder"));
    } catch (const Error& e) {
      CHECK_EQUAL(e.code, STCA_BUILD_ERROR);
      why = e.what();
    }
    CHECK_EQUAL(why, string("why"));
    CHECK_EQUAL(passed_over, string("passed_over"));
  }
  std::cout << cases.list()->size() << " cases\n";
}
