// Runs the golden requests and bundles through the public C++ interface: golden
// FOLDER [FILE] [--engine NAME]
#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <thread>

#include "check.hpp"
#include "counters.hpp"
#include "json.hpp"
#include "toy_engine.hpp"
#include "visit.hpp"

namespace fs = std::filesystem;
using stca::core::Json;

namespace {

std::string read(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

const std::string& text_of(const Json& json, const char* name) { return *json.find(name)->string(); }
std::int64_t integer_of(const Json& json, const char* name) { return *json.find(name)->integer(); }

/// A null or a string.
std::optional<std::string> name_of(const Json& json) {
  if (json.is_null()) return std::nullopt;
  return *json.string();
}

/// Tensors of a JSON object, and the memory they borrow.
class Tensors {
 public:
  explicit Tensors(const Json& inputs) {
    for (const Json::Member& m : *inputs.object()) add(m.name.c_str(), m.value);
  }
  const std::vector<stca::Tensor>& list() const { return tensors_; }

 private:
  void add(const char* name, const Json& json) {
    static const std::map<std::string, stca_dtype> dtypes = {
        {"bool", STCA_BOOL},     {"int8", STCA_INT8},       {"uint8", STCA_UINT8},     {"int16", STCA_INT16},
        {"uint16", STCA_UINT16}, {"int32", STCA_INT32},     {"uint32", STCA_UINT32},   {"int64", STCA_INT64},
        {"uint64", STCA_UINT64}, {"float16", STCA_FLOAT16}, {"float32", STCA_FLOAT32}, {"float64", STCA_FLOAT64}};
    const stca_dtype dtype = dtypes.at(text_of(json, "dtype"));
    std::vector<std::int64_t> shape;
    for (const Json& n : *json.find("shape")->list()) shape.push_back(*n.integer());
    const Json::List& values = *json.find("data")->list();
    auto& bytes = memory_.emplace_back(std::make_unique<std::vector<std::uint64_t>>(values.size() + 1));
    for (std::size_t i = 0; i < values.size(); ++i) put(dtype, values[i], bytes->data(), i);
    tensors_.emplace_back(name, dtype, bytes->data(), shape);
  }

  static void put(stca_dtype dtype, const Json& json, void* data, std::size_t i) {
    using namespace stca::core;
    double real = 0;
    if (json.string() != nullptr)
      real = std::stod(*json.string());
    else if (const bool* truth = json.boolean())
      real = *truth ? 1 : 0;
    else
      json.number(real);
    if (dtype == STCA_BOOL) {
      static_cast<bool*>(data)[i] = real != 0;
    } else if (dtype >= STCA_FLOAT16 && dtype <= STCA_FLOAT64) {
      visit_floating(dtype,
                     [&](auto type) { static_cast<decltype(type)*>(data)[i] = from_double<decltype(type)>(real); });
    } else {
      visit_integer(dtype, [&](auto type) {
        using T = decltype(type);
        if (json.integer() != nullptr)
          static_cast<T*>(data)[i] = static_cast<T>(*json.integer());
        else
          static_cast<T*>(data)[i] = static_cast<T>(std::stoull(*json.string()));
      });
    }
  }

  std::vector<stca::Tensor> tensors_;
  std::vector<std::unique_ptr<std::vector<std::uint64_t>>> memory_;
};

/// A source of rows whose every number is the id, of which it has as many as it is told.
class IdRows final : public stca::RowSource {
 public:
  IdRows(std::size_t width, std::int64_t most) : width_(width), most_(most) {}
  void rows(const std::int64_t* ids, std::size_t count, float* to) override {
    for (std::size_t i = 0; i < count; ++i) {
      if (ids[i] > most_) throw std::runtime_error("it has no row " + std::to_string(ids[i]));
      std::fill_n(to + i * width_, width_, static_cast<float>(ids[i]));
    }
  }

 private:
  std::size_t width_;
  std::int64_t most_;
};

class Runner {
 public:
  Runner(fs::path folder, std::string engine) : folder_(std::move(folder)), engine_(std::move(engine)) {}

  void run(const Json& file) {
    for (const Json& test : *file.find("cases")->list()) {
      if (engine_ != "toy" || toy::has(text_of(test, "bundle"))) guarded(test, [&] { requests(test); });
    }
    const Json* damages = file.find("damages");
    if (damages == nullptr) return;
    for (const Json& test : *damages->list()) guarded(test, [&] { bundles(test); });
  }

  int cases = 0, steps = 0;

 private:
  template <class F>
  void guarded(const Json& test, F&& f) {
    ++cases;
    where_ = text_of(test, "name");
    try {
      f();
    } catch (const std::exception& e) {
      wrong("threw: ", e.what());
    }
  }

  template <class... Parts>
  void wrong(const Parts&... parts) const {
    check::fail(where_.c_str(), step_, parts...);
  }

  void requests(const Json& test) {
    const check::TemporaryFolder states;
    stca::Options options = options_of(test);
    const bool files = test.find("files") != nullptr;
    if (files) options.state_folder = states.path().string();
    const auto load = [&] { return stca::Session::load((folder_ / text_of(test, "bundle")).string(), options); };
    std::optional<stca::Session> session = load();
    step_ = 0;
    for (const Json& step : *test.find("steps")->list()) {
      if (text_of(step, "call") == "restart") {
        session.reset();  // it lets go of the folder
        session = load();
      } else if (text_of(step, "call") == "damage") {
        damage_all(states.path());
      } else {
        expect(step, [&] { perform(*session, step); });
      }
      while (files && session->stats().file_waiting > 0) std::this_thread::yield();
      ++step_, ++steps;
    }
  }

  /// Another last byte of each state in the folder.
  static void damage_all(const fs::path& folder) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (entry.path().extension() != ".state") continue;
      std::string data = read(entry.path());
      data.back() = static_cast<char>(data.back() ^ 1);
      write(entry.path(), data);
    }
  }

  stca::Options options_of(const Json& test) const {
    stca::Options options;
    options.truncate = *test.find("truncate")->boolean();
    options.threads = 1;
    if (engine_ == "toy")
      options.make_engine = toy::maker();
    else
      options.engine = engine_;
    if (const Json* users = test.find("max_users")) options.max_users = static_cast<std::uint64_t>(*users->integer());
    if (const Json* most = test.find("max_targets")) options.max_targets = static_cast<std::uint64_t>(*most->integer());
    if (const Json* check = test.find("check_versions")) options.check_versions = *check->boolean();
    if (const Json* seconds = test.find("ttl_seconds")) seconds->number(options.ttl_seconds);
    if (const Json* tables = test.find("tables")) {
      for (const Json::Member& m : *tables->object()) {
        const auto width = static_cast<std::size_t>(integer_of(m.value, "width"));
        options.tables[m.name] = std::make_shared<IdRows>(width, integer_of(m.value, "most"));
      }
    }
    const Json* states = test.find("cache_states");
    options.cache_bytes = states != nullptr ? static_cast<std::uint64_t>(*states->integer()) * bytes_of_state(test)
                                            : static_cast<std::uint64_t>(integer_of(test, "cache_bytes"));
    return options;
  }

  /// What the state of the test's `measured` request takes here: states differ in size between the languages.
  std::uint64_t bytes_of_state(const Json& test) const {
    stca::Options options;
    options.engine = engine_;
    stca::Session session = stca::Session::load((folder_ / text_of(test, "bundle")).string(), options);
    const Json& json = *test.find("measured");
    const Tensors inputs(*json.find("inputs"));
    session.score({inputs.list(), text_of(json, "user"), std::nullopt});
    return session.stats().bytes;
  }

  /// Calls `f`; if the step expects an error, it must throw that.
  template <class F>
  void expect(const Json& step, F&& f) {
    const Json* error = step.find("error");
    try {
      f();
      if (error != nullptr) wrong("expected an error");
    } catch (const stca::StcaError& e) {
      if (error == nullptr) return wrong("threw ", e.code(), ": ", e.what());
      if (const Json* text = error->find("text")) return same_error(e, *error, *text->string());
      // A history that is needed is a request that was refused.
      const bool refused = e.code() == STCA_HISTORY_NEEDED && integer_of(*error, "code") == STCA_REQUEST_ERROR;
      if (e.code() != integer_of(*error, "code") && !refused) wrong("code ", e.code(), ": ", e.what());
      for (const Json& part : *error->find("says")->list()) {
        if (!check::contains(e.what(), *part.string())) wrong("\"", e.what(), "\" does not say ", *part.string());
      }
      if (check::contains(e.what(), "\n")) wrong("not one line: ", e.what());
    }
  }

  void same_error(const stca::StcaError& e, const Json& error, const std::string& text) const {
    if (stca_code_name(e.code()) != text_of(error, "class") || e.kind() != text_of(error, "kind"))
      wrong("threw ", stca_code_name(e.code()), " (", e.kind(), "), not ", text_of(error, "class"), ": ", e.what());
    else if (e.what() != text)
      wrong("says: ", e.what(), "\n    expected: ", text);
  }

  void perform(stca::Session& session, const Json& step) {
    const std::string& call = text_of(step, "call");
    if (call == "score") {
      const Json& json = *step.find("request");
      const Tensors inputs(*json.find("inputs"));
      compare(session.score({inputs.list(), name_of(*json.find("user")), name_of(*json.find("version"))},
                            deadline_of(step)),
              step);
    } else if (call == "score_batch") {
      const Json& json = *step.find("request");
      const Tensors inputs(*json.find("inputs"));
      stca::RequestBatch batch{inputs.list(), {}, {}};
      for (const Json& user : *json.find("users")->list()) batch.users.push_back(name_of(user));
      for (const Json& version : *json.find("versions")->list()) batch.versions.push_back(name_of(version));
      compare(session.score(batch, deadline_of(step)), step);
    } else if (call == "append") {
      const Tensors events(*step.find("events"));
      const Json* after = step.find("after");
      compare(session.append(text_of(step, "user"), events.list(), text_of(step, "version"),
                             after == nullptr ? std::nullopt : name_of(*after)),
              step);
    } else if (call == "amend") {
      const Tensors events(*step.find("events"));
      compare(session.amend(text_of(step, "user"), events.list(), text_of(step, "version"), integer_of(step, "at"),
                            name_of(*step.find("after"))),
              step);
    } else if (call == "warm") {
      const Tensors history(*step.find("history"));
      compare(session.warm(text_of(step, "user"), history.list(), name_of(*step.find("version")), deadline_of(step)),
              step);
    } else if (call == "forget") {
      compare(session.forget(text_of(step, "user")), step);
    } else if (call == "residence") {
      compare(session.residence(text_of(step, "user"), name_of(*step.find("version"))), step);
    } else if (call == "swap") {
      session.swap((folder_ / text_of(step, "bundle")).string());
    } else if (call == "stats") {
      compare(session.stats(), step);
    } else {
      wrong("no such call: ", call);
    }
  }

  /// In so many seconds, and perhaps cancelled before the call.
  static stca::Deadline deadline_of(const Json& step) {
    const Json* json = step.find("deadline");
    if (json == nullptr) return stca::Deadline::never();
    double seconds = 0;
    json->find("seconds")->number(seconds);
    stca::Deadline deadline(seconds);
    if (*json->find("cancelled")->boolean()) deadline.cancel();
    return deadline;
  }

  void compare(const stca::Scores& scores, const Json& step) const {
    const Json* rows = step.find("scores");
    if (rows == nullptr) return;  // an error was expected, and is missed by the caller
    if (scores.targets() != rows->list()->size())
      return wrong(scores.targets(), " targets, not ", rows->list()->size());
    for (std::size_t t = 0; t < scores.targets(); ++t) {
      const Json& scored = (*rows->list())[t];  // a row of tasks, or the score of the only one
      const Json::List row = scored.list() != nullptr ? *scored.list() : Json::List{scored};
      if (scores.tasks() != row.size()) return wrong(scores.tasks(), " tasks, not ", row.size());
      for (std::size_t k = 0; k < row.size(); ++k) {
        double expected = 0;
        row[k].number(expected);
        if (scores.exact(t, k) != expected)
          wrong("score [", t, ", ", k, "] is ", scores.exact(t, k), ", not ", expected);
      }
    }
  }

  void compare(bool kept, const Json& step) const {
    const Json* expected = step.find("kept");
    if (expected != nullptr && kept != *expected->boolean()) wrong(kept ? "kept" : "not kept");
  }

  void compare(const std::optional<stca::Residence>& found, const Json& step) const {
    const std::optional<std::string> tier = name_of(*step.find("tier"));
    if ((found ? std::optional(found->tier) : std::nullopt) != tier) {
      wrong("is elsewhere than in ", tier.value_or("nothing"));
    } else if (found && found->version != name_of(*step.find("kept_version"))) {
      wrong("is of version ", found->version.value_or("?"));
    }
  }

  void compare(const stca::CacheStats& stats, const Json& step) const {
    const auto values = check::counters(stats);
    for (const Json::Member& m : *step.find("stats")->object()) {
      const auto expected = static_cast<std::uint64_t>(*m.value.integer());
      if (values.at(m.name) != expected) wrong(m.name, " is ", values.at(m.name), ", not ", expected);
    }
  }

  void bundles(const Json& test) {
    const check::TemporaryFolder folder;
    const fs::path bundle = folder.path() / "bundle";
    fs::copy(folder_ / text_of(test, "bundle"), bundle);
    for (const Json& op : *test.find("ops")->list()) damage(op, bundle, folder.path());
    expect(test, [&] { CHECK(!stca::Bundle(bundle.string()).weights().empty()); });
  }

  static void damage(const Json& op, const fs::path& bundle, const fs::path& folder) {
    const std::string& kind = text_of(op, "op");
    const fs::path file = bundle / (op.find("file") == nullptr ? "manifest.json" : text_of(op, "file"));
    std::string data = fs::exists(file) ? read(file) : "";
    if (kind == "remove") {
      fs::remove(file);
    } else if (kind == "add") {
      write(file, data + "more");
    } else if (kind == "cut") {
      write(file, data.substr(0, static_cast<std::size_t>(integer_of(op, "at"))));
    } else if (kind == "flip") {
      data[static_cast<std::size_t>(integer_of(op, "at"))] ^= '\x80';
      write(file, data);
    } else if (kind == "link") {
      fs::rename(file, folder / "elsewhere");
      fs::create_symlink(folder / "elsewhere", file);
    } else if (kind == "edit") {
      std::string put;
      for (std::int64_t i = 0; i < integer_of(op, "times"); ++i) put += text_of(op, "put");
      const std::size_t at = data.find(text_of(op, "find"));
      CHECK(at != std::string::npos);
      write(file, data.replace(at, text_of(op, "find").size(), put));
    } else {
      CHECK(kind == "none of these");
    }
  }

  fs::path folder_;
  std::string engine_, where_;
  int step_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  std::string engine = "toy";
  if (arguments.size() >= 2 && arguments[arguments.size() - 2] == "--engine") {
    engine = arguments.back();
    arguments.resize(arguments.size() - 2);
  }
  if (arguments.empty()) {
    std::cerr << "usage: golden FOLDER [FILE] [--engine NAME]\n";
    return 2;
  }
  const fs::path folder = arguments[0];
  Runner runner(folder, engine);
  runner.run(Json::parse(read(arguments.size() > 1 ? fs::path(arguments[1]) : folder / "cases.json")));
  std::cout << runner.cases << " cases, " << runner.steps << " steps, engine " << engine << ": "
            << (check::failures == 0 ? "as expected" : "WRONG") << "\n";
  return check::failures == 0 && runner.cases > 0 ? 0 : 1;
}
