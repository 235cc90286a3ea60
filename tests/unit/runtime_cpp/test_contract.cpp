// What a bundle's parts must agree on: manifests that contradict themselves or their graphs, their digests made right
// again, are refused in one line before anything runs.
#include <cstdlib>
#include <functional>

#include "bundle.hpp"
#include "check.hpp"
#include "contract.hpp"
#include "error.hpp"
#include "json.hpp"
#include "log_request.hpp"
#include "resealed.hpp"
#include "spec_engine.hpp"

using stca::core::Json;
using resealed::Copy;
using resealed::Tree;

namespace {

using Change = std::function<void(Tree&)>;

struct Case {
  const char* says;
  Change change;
};

Tree& input(Tree& m, const char* graph, const char* name) { return m["graphs"][graph]["inputs"].named(name); }
Tree& output(Tree& m, const char* graph, const char* name) { return m["graphs"][graph]["outputs"].named(name); }

/// A state tensor, in all three places where it stands.
void all_places(Tree& m, const char* name, const std::function<void(Tree&)>& change) {
  change(m["state"].named(name));
  change(output(m, "user_encoder", name));
  change(input(m, "target_scorer", name));
}
/// An input, wherever it stands.
void everywhere(Tree& m, const char* name, const std::function<void(Tree&)>& change) {
  for (auto& [graph, spec] : m["graphs"].object()) {
    for (Tree& tensor : spec["inputs"].list()) {
      if (tensor["name"].text() == name) change(tensor);
    }
  }
}

void refused(const Case& one) {
  Copy copy(golden("log"));
  one.change(copy.manifest);
  const std::string path = copy.seal();
  CHECK_THROWS(stca::Session(path, with(spec::maker())), stca::BundleError, one.says);
  CHECK_THROWS(stca::Bundle{path}, stca::BundleError, one.says);
}

}  // namespace

TEST(contract_holds_in_the_golden_bundles) {
  for (const char* bundle : {"log", "plain", "log_other_scores", "log_other_dtype"}) {
    Copy copy(golden(bundle));
    stca::Session(copy.seal(), with(spec::maker()));
  }
}

TEST(contract_of_the_state) {
  const std::vector<Case> cases = {
      {"'token' is float32 [B, 2] in state, float32 [N_h, 2] in graphs.user_encoder",
       [](Tree& m) { m["state"].named("token")["shape"][0] = "B"; }},
      {"'token' is float32 [N_h, 2] in state, float32 [rows, 2] in graphs.user_encoder",
       [](Tree& m) { output(m, "user_encoder", "token")["shape"][0] = "rows"; }},
      {"'token' is float32 [N_h, 2] in state, float32 [] in graphs.user_encoder",
       [](Tree& m) { output(m, "user_encoder", "token")["shape"] = Tree::List{}; }},
      {"'token' is float32 [N_h, 2] in state, float16 [N_h, 2] in graphs.target_scorer",
       [](Tree& m) { input(m, "target_scorer", "token")["dtype"] = "float16"; }},
      {"does not give the state 'token'", [](Tree& m) { output(m, "user_encoder", "token")["name"] = "other"; }},
      {"gives 'token', which is no state",
       [](Tree& m) {
         m["state"].list().erase(m["state"].list().begin());
         auto& inputs = m["graphs"]["target_scorer"]["inputs"].list();
         inputs.erase(inputs.begin());
       }},
      {"'token' comes twice in state", [](Tree& m) { m["state"].list().push_back(m["state"][0]); }},
      {"offsets are int32 or int64 [B_plus_1]",
       [](Tree& m) { all_places(m, "state_history_offsets", [](Tree& t) { t["dtype"] = "float32"; }); }},
      {"state 'state_history_offsets' is int64 [B_plus_1], and copies 'history_offsets', int32 [B_plus_1]",
       [](Tree& m) { all_places(m, "state_history_offsets", [](Tree& t) { t["dtype"] = "int64"; }); }},
      {"state 'state_user_segment' is int64 [B], and copies 'history_offsets'",
       [](Tree& m) { m["state"].named("state_user_segment")["input"] = "history_offsets"; }},
      {"copies 'target_item', which is no input of the user encoder",
       [](Tree& m) { m["state"].named("state_user_segment")["input"] = "target_item"; }},
      {"is of offsets, and copies no input",
       [](Tree& m) { m["state"].named("state_history_offsets")["input"] = Tree(); }},
      {"counts targets", [](Tree& m) { all_places(m, "token", [](Tree& t) { t["shape"][0] = "N_t"; }); }},
      {"has its history tokens on another axis than the first",
       [](Tree& m) { all_places(m, "token", [](Tree& t) { t["shape"] = Tree::List{2, "N_h"}; }); }},
      {"is a sum over tokens, in a bundle whose states are not appended to as such",
       [](Tree& m) { m["state"].named("token")["append"] = "sum"; }},
      {"append must be sum", [](Tree& m) { m["state"].named("token")["append"] = "rows"; }},
      {"larger than any row",
       [](Tree& m) { all_places(m, "token", [](Tree& t) { t["shape"][1] = std::int64_t{1} << 62; }); }},
  };
  for (const Case& one : cases) refused(one);
}

TEST(contract_of_the_inputs) {
  const std::vector<Case> cases = {
      {"input 'target_item' has no scope", [](Tree& m) { input(m, "request", "target_item")["scope"] = Tree(); }},
      {"'history_item' is not of scope user",
       [](Tree& m) { everywhere(m, "history_item", [](Tree& t) { t["scope"] = "request"; }); }},
      {"'target_item' is of scope user",
       [](Tree& m) { everywhere(m, "target_item", [](Tree& t) { t["scope"] = "user"; }); }},
      {"has another scope in graphs.user_encoder",
       [](Tree& m) { input(m, "user_encoder", "history_item")["scope"] = "request"; }},
      {"'history_item' is int32 [N_h] in graphs.user_encoder, int64 [N_h] in graphs.request",
       [](Tree& m) { input(m, "user_encoder", "history_item")["dtype"] = "int32"; }},
      {"offsets are int32 or int64 [B_plus_1]",
       [](Tree& m) { everywhere(m, "target_offsets", [](Tree& t) { t["dtype"] = "int8"; }); }},
      {"offsets are int32 or int64 [B_plus_1]",
       [](Tree& m) { everywhere(m, "target_price", [](Tree& t) { t["shape"][0] = "B_plus_1"; }); }},
      {"are of scope request",
       [](Tree& m) { everywhere(m, "target_offsets", [](Tree& t) { t["scope"] = "request"; }); }},
      {"is float32 and has a limit of ids",
       [](Tree& m) { everywhere(m, "target_price", [](Tree& t) { t["limit"] = 7; }); }},
      {"not a row of floating-point scores", [](Tree& m) { output(m, "target_scorer", "scores")["dtype"] = "int64"; }},
      {"not a row of floating-point scores",
       [](Tree& m) { output(m, "target_scorer", "scores")["shape"] = Tree::List{1, "N_t"}; }},
      {"not a row of floating-point scores",
       [](Tree& m) { output(m, "target_scorer", "scores")["shape"] = Tree::List{"N_t", "N_t"}; }},
      {"'other' is no input of the request graph and no state",
       [](Tree& m) { input(m, "target_scorer", "target_item")["name"] = "other"; }},
      {"has no name", [](Tree& m) { everywhere(m, "request_device", [](Tree& t) { t["name"] = ""; }); }},
      {"is bool and has a least value", [](Tree& m) {
         everywhere(m, "request_device", [](Tree& t) {
           t["dtype"] = "bool", t["limit"] = Tree();
           t["low"] = 0;
         });
       }},
      {"length_of must be the name of a size",
       [](Tree& m) { everywhere(m, "request_device", [](Tree& t) { t["length_of"] = ""; }); }},
  };
  for (const Case& one : cases) refused(one);
}

TEST(contract_of_the_scores) {
  const auto more = [](Tree& m, const char* graph) {
    auto& outputs = m["graphs"][graph]["outputs"].list();
    outputs.push_back(outputs[0]);
    outputs.back()["name"] = "more";
  };
  const std::vector<Case> cases = {
      {"output 0 is 'other' in graphs.target_scorer, 'scores' in graphs.request",
       [](Tree& m) { output(m, "target_scorer", "scores")["name"] = "other"; }},
      {"'scores' is float64 [N_t, 2] in graphs.target_scorer, float32 [N_t, 2] in graphs.request",
       [](Tree& m) { output(m, "target_scorer", "scores")["dtype"] = "float64"; }},
      {"'scores' is float32 [N_t, 3] in graphs.target_scorer, float32 [N_t, 2] in graphs.request",
       [](Tree& m) { output(m, "target_scorer", "scores")["shape"][1] = 3; }},
      {"output 1 is 'more' in graphs.target_scorer, missing in graphs.request",
       [&](Tree& m) { more(m, "target_scorer"); }},
      {"output 1 is missing in graphs.target_scorer, 'more' in graphs.request", [&](Tree& m) { more(m, "request"); }},
      {"output 0 is 'more' in graphs.target_scorer, 'scores' in graphs.request",
       [&](Tree& m) {
         more(m, "request"), more(m, "target_scorer");
         auto& outputs = m["graphs"]["target_scorer"]["outputs"].list();
         std::swap(outputs[0], outputs[1]);
       }},
  };
  for (const Case& one : cases) refused(one);
}

TEST(contract_of_many_tensors) {
  using stca::core::Manifest;
  // 2000 of each took seconds when each was looked for among the others, and twice that many are no model's.
  const auto many = [](std::size_t count) {
    Copy copy(golden("log"));
    const Tree state = copy.manifest["state"].named("token");
    const Tree given = output(copy.manifest, "user_encoder", "token");
    const Tree taken = input(copy.manifest, "target_scorer", "token");
    for (std::size_t i = copy.manifest["state"].list().size(); i < count; ++i) {
      for (auto [list, tensor] : {std::pair{&copy.manifest["state"], state},
                                  {&copy.manifest["graphs"]["user_encoder"]["outputs"], given},
                                  {&copy.manifest["graphs"]["target_scorer"]["inputs"], taken}}) {
        list->list().push_back(tensor);
        list->list().back()["name"] = "s" + std::to_string(i);
      }
    }
    return Manifest::parse(resealed::sealed(copy.manifest));
  };
  CHECK_EQUAL(many(1000).state.size(), 1000u);
  CHECK_THROWS(many(2001), stca::core::Error, "tensors, the limit is 2000");
}

TEST(contract_of_int8_matrices) {
  using stca::core::Manifest;
  Copy copy(golden("log"));
  Tree weights;
  weights.value = Tree::Object{{"kind", "int8"}, {"activations", "none"}};
  const auto parsed = [&] {
    copy.manifest["quantization"].value = Tree::Object{{"weights", weights}};
    return Manifest::parse(resealed::sealed(copy.manifest));
  };
  CHECK_THROWS(parsed(), stca::core::Error, "calibrate the float32 bundle again");
  weights["zero_points"] = false;
  CHECK_THROWS(parsed(), stca::core::Error, "calibrate the float32 bundle again");
  weights["zero_points"] = true;
  parsed();
  for (const Tree& other : {Tree(5), Tree(false), Tree("int8"), Tree(Tree::List{weights})}) {
    copy.manifest["quantization"] = other;
    CHECK_THROWS(Manifest::parse(resealed::sealed(copy.manifest)), stca::core::Error, "quantization must be an object");
  }
  copy.manifest["quantization"] = Tree();
  Manifest::parse(resealed::sealed(copy.manifest));
}

TEST(contract_of_built_engines) {
  using namespace stca::core;
  Copy copy(golden("log"));
  const Manifest manifest = Manifest::parse(resealed::sealed(copy.manifest));
  EngineEntry entry;
  entry.graph = "user_encoder", entry.precision = "fp16", entry.requests = 1;
  const GraphSpec one = as_built(manifest, entry);
  for (const TensorSpec& spec : one.outputs) {
    if (spec.name == "token") CHECK_EQUAL(spec.dtype, STCA_FLOAT16);
    CHECK(!spec.counts(users_symbol) && !spec.counts(offsets_symbol));
  }
  Signature found{one.inputs, one.outputs};
  check_signature("plan", one, found, true);
  found.inputs.erase(found.inputs.begin());
  check_signature("plan", one, found, true);  // an input that nothing in it reads
  CHECK_THROWS(check_signature("plan", one, found), Error, "plan: has no input");
  found.outputs.push_back(found.outputs[0]);
  CHECK_THROWS(check_signature("plan", one, found, true), Error, "plan: has an output twice");
  found.outputs.erase(found.outputs.begin());
  found.outputs.pop_back();
  CHECK_THROWS(check_signature("plan", one, found, true), Error, "plan: has no output");
  GraphSpec two{"g", {{"x", STCA_FLOAT32, {{-1, "N_h"}}}, {"y", STCA_FLOAT32, {{2, ""}}}}, {}};
  const Signature same{{{"x", STCA_FLOAT32, {{-1, "N_h"}}}, {"y", STCA_FLOAT32, {{-1, "N_h"}}}}, {}};
  CHECK_THROWS(check_signature("plan", two, same), Error,
               "plan: N_h of its input 'y' is one size, the manifest says 2 and N_h");
}

TEST(contract_of_the_manifest) {
  const std::vector<Case> cases = {
      {"engine file 'gone.plan' is not among the manifest's files",
       [](Tree& m) {
         Tree entry;
         entry.value = Tree::Object{};
         entry["graph"] = "user_encoder", entry["flavour"] = "onnxruntime", entry["file"] = "gone.plan";
         entry["precision"] = "fp32";
         m["engines"].list().push_back(entry);
       }},
      {"table 'x': has the shape [17179869185, 268435456], which is no table's",  // of so many bytes, 64 bits tell a few
       [](Tree& m) {
         Tree table;
         table.value = Tree::Object{};
         table["name"] = "x", table["file"] = "x.rows", table["digests"] = "x.digests", table["dtype"] = "float32";
         table["rows"] = (std::int64_t{1} << 34) + 1, table["width"] = 1 << 28, table["block_rows"] = 1 << 20;
         m["tables"] = Tree::List{table};
       }},
      {"manifest.json is not JSON (a number is too large",
       [](Tree& m) { m["split"].value = std::numeric_limits<double>::infinity(); }},
      // A name of others in a message is neither a second line nor a megabyte.
      {"input 'evil\\nname' has no scope",
       [](Tree& m) {
         input(m, "request", "target_item")["scope"] = Tree();
         input(m, "request", "target_item")["name"] = "evil\nname";
       }},
  };
  for (const Case& one : cases) {
    Copy copy(golden("log"));
    one.change(copy.manifest);
    std::string text = resealed::sealed(copy.manifest);
    if (const std::size_t at = text.find("inf"); at != std::string::npos) text.replace(at, 3, "1e999");
    std::ofstream(std::filesystem::path(copy.seal()) / "manifest.json") << text;
    CHECK_THROWS(stca::Bundle{copy.path()}, stca::BundleError, one.says);
  }
  Copy copy(golden("log"));
  Tree first = copy.manifest["model"];
  first["digest"] = std::string(64, '0');  // a text like the digest, before the digest
  copy.manifest.object().insert(copy.manifest.object().begin(), {"model", first});
  copy.manifest.object().erase(copy.manifest.object().begin() + 4);
  CHECK_THROWS(stca::Bundle{copy.seal()}, stca::BundleError, "was changed");
}

TEST(contract_with_what_an_engine_gives) {
  // Each keeps the manifest's contract with itself; the engine then gives another number of rows than was promised.
  Copy copy(golden("log"));
  all_places(copy.manifest, "token", [](Tree& t) { t["shape"][0] = "rows"; });
  output(copy.manifest, "target_scorer", "scores")["shape"][0] = "scored";
  output(copy.manifest, "request", "scores")["shape"][0] = "scored";
  copy.manifest["appendable"] = false;
  stca::Session session(copy.seal(), with(spec::maker()));
  const Log log;
  CHECK_THROWS(session.score(stca::Request{log.all(), "ann", "v1"}), stca::EngineError,
               "gave scores of shape [1, 2] for 2 targets; a model gives one row of scores for each");
}

#ifdef STCA_WITH_ONNXRUNTIME
TEST(contract_with_onnxruntime) {
  if (std::getenv("STCA_ONNXRUNTIME_LIBRARY") == nullptr) return;  // there is no library to ask
  const std::vector<Case> cases = {
      // Consistent in all three places, and not what the graphs say.
      {"user_encoder.onnx: its output 'token' is float32 [N_h, 2], the manifest says float32 [B, 2]",
       [](Tree& m) { all_places(m, "token", [](Tree& t) { t["shape"][0] = "B"; }); }},
      {"user_encoder.onnx: its output 'token' is float32 [N_h, 2], the manifest says float32 [N_h, 3]",
       [](Tree& m) { all_places(m, "token", [](Tree& t) { t["shape"][1] = 3; }); }},
      {"user_encoder.onnx: its output 'token' is float32 [N_h, 2], the manifest says float64 [N_h, 2]",
       [](Tree& m) { all_places(m, "token", [](Tree& t) { t["dtype"] = "float64"; }); }},
      {"target_scorer.onnx: its input 'target_price' is float32 [N_t, 2], the manifest says float32 [N_t]",
       [](Tree& m) { everywhere(m, "target_price", [](Tree& t) { t["shape"] = Tree::List{"N_t"}; }); }},
      {"user_encoder.onnx: has no input 'clock'",
       [](Tree& m) { everywhere(m, "history_item", [](Tree& t) { t["name"] = "clock"; }); }},
      {"user_encoder.onnx: takes 'history_action', of which the manifest says nothing",
       [](Tree& m) {
         for (const char* graph : {"request", "user_encoder"}) {
           auto& inputs = m["graphs"][graph]["inputs"].list();
           for (std::size_t i = inputs.size(); i-- > 0;) {
             if (inputs[i]["name"].text() == "history_action") inputs.erase(inputs.begin() + static_cast<long>(i));
           }
         }
       }},
      {"target_scorer.onnx: has no output 'more'",
       [](Tree& m) {
         for (const char* graph : {"request", "target_scorer"}) output(m, graph, "scores")["name"] = "more";
       }},
  };
  for (const Case& one : cases) {
    Copy copy(golden("log"));
    one.change(copy.manifest);
    stca::Options options;
    options.engine = "graphs";
    CHECK_THROWS(stca::Session(copy.seal(), options), stca::BundleError, one.says);
  }
}
#endif

TEST(contract_is_pythons) {
  // Manifests that test_cpp_fuzz.py changed, and what Python said of them.
  const char* file = std::getenv("STCA_CONTRACT_CASES");
  if (file == nullptr) return;
  const Json cases = Json::parse(resealed::read(file));
  for (const Json& test : *cases.list()) {
    const std::string& pythons = *test.find("said")->string();
    std::string said;
    try {
      stca::core::Manifest::parse(*test.find("manifest")->string());
    } catch (const stca::core::Error& e) {
      CHECK_EQUAL(e.code, STCA_BUNDLE_ERROR);
      said = e.what();
    }
    if (said.empty() != pythons.empty()) check::fail(__FILE__, __LINE__, "Python: ", pythons, "\n  C++: ", said);
  }
  std::cout << cases.list()->size() << " cases\n";
}
