// Bundles whose manifests say something else, their digests made right: each is refused in one line, or serves requests
// that are answered or refused so. The sanitizers watch what is read and written on the way.
#include <filesystem>

#include "../../unit/runtime_cpp/resealed.hpp"
#include "../../unit/runtime_cpp/spec_engine.hpp"
#include "requests.hpp"

namespace fs = std::filesystem;
using resealed::Tree;

namespace fuzz {
namespace {

const char* const words[] = {"",        "N_h",     "N_t",     "B",    "B_plus_1", "rows",   "int64",    "int32",
                             "float32", "float64", "float16", "int8", "uint8",    "bool",   "user",     "request",
                             "target",  "x\ny",    "\x01",    "../a", "token",    "scores", "bfloat16", "no.onnx"};
const std::int64_t numbers[] = {
    0, 1, -1, 2, 3, 5, 64, 255, std::int64_t{1} << 31, std::int64_t{1} << 40, std::int64_t{1} << 62};

void collect(Tree& tree, std::vector<Tree*>& all) {
  all.push_back(&tree);
  if (auto* items = std::get_if<Tree::List>(&tree.value)) {
    for (Tree& item : *items) collect(item, all);
  }
  if (auto* members = std::get_if<Tree::Object>(&tree.value)) {
    for (auto& [name, member] : *members) collect(member, all);
  }
}

Tree any_value(Random& random) {
  switch (random.below(6)) {
    case 0: return {};
    case 1: return random.one_in(2);
    case 2: return random.among(numbers);
    case 3: return Tree::List{};
    case 4: return random.one_in(20) ? std::string(100000, 'y') : std::string(random.among(words));
    default: return random.among(words);
  }
}

/// One change anywhere.
void change_anywhere(Tree& manifest, Random& random) {
  std::vector<Tree*> all;
  for (const char* part : {"graphs", "state", "engines", "max_history", "appendable", "split", "precision"}) {
    collect(manifest[part], all);
  }
  Tree& tree = *random.among(all);
  auto* items = std::get_if<Tree::List>(&tree.value);
  auto* members = std::get_if<Tree::Object>(&tree.value);
  if (items != nullptr && !items->empty() && !random.one_in(4)) {
    const auto at =
        items->begin() + static_cast<std::ptrdiff_t>(random.below(static_cast<std::int64_t>(items->size())));
    switch (random.below(4)) {
      case 0: items->erase(at); break;
      case 1: items->push_back(Tree(*at)); break;
      case 2: std::swap(*at, items->front()); break;
      default: *at = any_value(random);
    }
  } else if (members != nullptr && !members->empty() && !random.one_in(4)) {
    auto& member = random.among(*members);
    if (random.one_in(3)) {
      member.first = random.among(words);
    } else {
      member.second = any_value(random);
    }
  } else {
    tree = any_value(random);
  }
}

/// One tensor changed wherever it stands, so that the manifest goes on agreeing with itself.
void change_everywhere(Tree& manifest, Random& random) {
  std::vector<Tree*> places;
  std::vector<Tree*> tensors;
  for (auto& [graph, spec] : manifest["graphs"].object()) {
    for (const char* side : {"inputs", "outputs"}) {
      for (Tree& tensor : spec[side].list()) tensors.push_back(&tensor);
    }
  }
  for (Tree& tensor : manifest["state"].list()) tensors.push_back(&tensor);
  const std::string name = (*random.among(tensors))["name"].text();
  // What copies it, and what it copies, changes along.
  std::vector<std::string> names{name};
  for (Tree& state : manifest["state"].list()) {
    const auto* input = std::get_if<std::string>(&state["input"].value);
    if (input == nullptr) continue;
    if (*input == name) names.push_back(state["name"].text());
    if (state["name"].text() == name) names.push_back(*input);
  }
  const std::string dtype = words[6 + random.below(8)], fresh = random.among(words);
  const std::int64_t what = random.below(5), axis = random.below(3), number = random.among(numbers);
  for (Tree* tensor : tensors) {
    if (std::find(names.begin(), names.end(), (*tensor)["name"].text()) == names.end()) continue;
    auto& shape = (*tensor)["shape"].list();
    const auto at = static_cast<std::size_t>(axis);
    switch (what) {
      case 0: (*tensor)["dtype"] = dtype; break;
      case 1: at < shape.size() ? void(shape[at] = fresh) : shape.push_back(fresh); break;
      case 2: at < shape.size() ? void(shape[at] = number) : shape.push_back(number); break;
      case 3:
        shape.erase(shape.begin(), shape.begin() + static_cast<std::ptrdiff_t>(std::min(at, shape.size())));
        break;
      default: (*tensor)["limit"] = number; break;
    }
    if (what == 4 && manifest["state"].list().size() > 0) {
      for (Tree& state : manifest["state"].list()) state.erase("limit");
    }
  }
}

/// An engine whose outputs are, in some runs, of other sizes than the inputs say.
stca::MakeEngine liar(std::uint64_t seed) {
  auto random = std::make_shared<Random>(seed, 77);
  class Liar : public stca::Engine {
   public:
    Liar(const stca::Bundle& bundle, const std::string& graph, std::shared_ptr<Random> random)
        : honest_(bundle, graph, {}, {}), gives_(bundle.outputs(graph)), random_(std::move(random)) {}
    std::string name() const override { return "liar"; }
    void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
      honest_.run(inputs, count, outputs);
      for (std::size_t i = 0; i < gives_.size(); ++i) {
        if (!random_->one_in(3)) continue;
        std::vector<std::int64_t> shape;
        for (int axis = 0; axis < gives_[i].rank; ++axis) {
          shape.push_back(gives_[i].symbol[axis] == nullptr ? gives_[i].shape[axis] : random_->below(5));
        }
        std::size_t bytes = stca_dtype_bytes(gives_[i].dtype);
        for (const std::int64_t n : shape) bytes *= static_cast<std::size_t>(n);
        std::memset(outputs.allocate(i, shape), 0, bytes);
      }
    }

   private:
    spec::Engine honest_;
    std::vector<stca_tensor_spec> gives_;
    std::shared_ptr<Random> random_;
  };
  return [random](const stca::Bundle& bundle, const std::string& graph) {
    return std::make_unique<Liar>(bundle, graph, random);
  };
}

/// Runs `call`, and counts how it ended.
template <class Call>
bool tried(const char* name, Call&& call) {
  try {
    call();
    return ended(name, STCA_OK);
  } catch (const stca::StcaError& e) {
    stca_fail(e.code(), e.what());
    return ended(name, e.code());
  }
}

void serve(stca::Session& session, Random& random) {
  const stca::Bundle bundle = session.bundle();
  const std::vector<stca_tensor_spec> specs = bundle.inputs("request");
  const char* const users[] = {"ann", "bob", "cat"};
  for (int call = 0; call < 6; ++call) {
    Tensors tensors;
    const std::string user = random.among(users), version = random.one_in(3) ? "v2" : "v1";
    switch (random.below(7)) {
      case 0:
        fill(specs, STCA_USER, random, tensors, true);
        tried("append", [&] { session.append(user, tensors.list, random.one_in(2) ? "v2" : "v3"); });
        break;
      case 1: {
        const std::int64_t count = random.below(4);
        fill_batch(specs, count, random, tensors);
        tried("batch", [&] { session.score(stca::RequestBatch{tensors.list, {}, {}}); });
        break;
      }
      case 2: {
        Tensors second;
        fill(specs, 7, random, tensors), fill(specs, 7, random, second);
        tried("score two", [&] { session.score({{tensors.list, user, version}, {second.list, {}, {}}}); });
        break;
      }
      case 3: tried("forget", [&] { session.forget(user); }); break;
      case 4:
        fill(specs, STCA_USER, random, tensors);
        tried("warm", [&] { session.warm(user, tensors.list, version); });
        break;
      default:
        fill(specs, random.one_in(3) ? STCA_REQUEST | STCA_TARGET : 7, random, tensors);
        tried("score", [&] {
          const stca::Scores scores = session.score(stca::Request{tensors.list, user, version});
          for (const float score : scores) {
            if (!(score - score == 0)) fail("a score that is not finite");
          }
        });
    }
  }
  if (session.stats().bytes > session.stats().budget) fail("more kept than the budget");
}

void round(const std::string& golden, std::uint64_t seed, std::uint64_t number) {
  Random random(seed, number);
  const char* const names[] = {"log", "plain", "padded_left", "padded_right", "log_other_dtype", "rows"};
  resealed::Copy copy(fs::path(golden) / random.among(names));
  for (std::int64_t changes = random.one_in(8) ? 0 : 1 + random.below(2); changes > 0; --changes) {
    try {
      random.one_in(2) ? change_anywhere(copy.manifest, random) : change_everywhere(copy.manifest, random);
    } catch (const std::exception&) {  // an earlier change left nothing of the kind
    }
  }
  stca::Options options;
  const bool onnxruntime = std::getenv("STCA_ONNXRUNTIME_LIBRARY") != nullptr && random.one_in(2);
  if (onnxruntime) {
    options.engine = "graphs";
    options.threads = 1;
  } else {
    options.make_engine = random.one_in(3) ? liar(number) : spec::maker();
  }
  options.cache_bytes = random.one_in(4) ? 2000 : 1 << 20;
  options.truncate = random.one_in(2);
  const std::string path = copy.seal(), load = onnxruntime ? "load (onnxruntime)" : "load (stand-in)";
  tried(load.c_str(), [&] {
    stca::Session session(path, options);
    serve(session, random);
    if (random.one_in(4)) tried("swap", [&] { session.swap((fs::path(golden) / "log").string()); });
  });
}

}  // namespace

int bundles(const std::string& golden, std::uint64_t seed, std::uint64_t first, std::uint64_t rounds) {
  for (std::uint64_t number = first; number < first + rounds; ++number) {
    std::cout << "round " << number << std::endl;
    round(golden, seed, number);
    ++counts()["bundles"];
  }
  return wrong;
}

}  // namespace fuzz
