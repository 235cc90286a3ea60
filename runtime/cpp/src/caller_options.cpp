// What a caller of the C ABI loads a session with: options, and perhaps engines of its own.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "c_api.hpp"

namespace stca::core {
namespace {

/// A callback returned `code`; it left its message through stca_fail, or there is none. A number that is no code of
/// ours counts as `kind`.
[[noreturn]] void callback_failed(int32_t code, stca_code kind, const std::string& otherwise) {
  const bool known = std::strcmp(stca_code_name(code), "unknown") != 0;
  throw Error(known ? static_cast<stca_code>(code) : kind, last_error().empty() ? otherwise : last_error());
}

/// A caller's engine behind the library's own interface.
class CallerEngine final : public Engine {
 public:
  CallerEngine(std::unique_ptr<stca_bundle> handle, const std::string& graph, const stca_engine& engine)
      : handle_(std::move(handle)),
        graph_(handle_->bundle->manifest.graph(graph)),
        engine_(engine),
        name_(engine.name == nullptr ? "caller's engine" : engine.name) {}
  CallerEngine(const CallerEngine&) = delete;
  CallerEngine& operator=(const CallerEngine&) = delete;
  ~CallerEngine() override {
    if (engine_.release != nullptr) engine_.release(engine_.self);
  }

  std::string name() const override { return name_; }
  const GraphSpec& spec() const override { return graph_; }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    std::vector<stca_tensor> tensors;
    tensors.reserve(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const Array& array = inputs[i];
      stca_tensor tensor{graph_.inputs[i].name.c_str(), array.data, array.dtype, array.shape.rank, {}};
      std::copy(array.shape.sizes.begin(), array.shape.sizes.end(), tensor.shape);
      tensors.push_back(tensor);
    }
    const std::size_t count = graph_.outputs.size();
    stca_outputs outputs{graph_, std::vector<Array>(count), std::vector<bool>(count), STCA_OK, {}};
    last_error().clear();
    const int32_t code = engine_.run(engine_.self, tensors.data(), tensors.size(), &outputs);
    if (outputs.code != STCA_OK) throw Error(outputs.code, outputs.message);
    if (code != STCA_OK) callback_failed(code, STCA_ENGINE_ERROR, name_ + " failed without a message");
    for (std::size_t i = 0; i < count; ++i) {
      if (!outputs.allocated[i]) fail(STCA_ENGINE_ERROR, name_, " did not give the output ", graph_.outputs[i].name);
    }
    return std::move(outputs.arrays);
  }

 private:
  std::unique_ptr<stca_bundle> handle_;  // what the engine was made from, and where graph_ lives
  const GraphSpec& graph_;
  stca_engine engine_;
  std::string name_;
};

/// A caller's source of rows behind the library's own interface.
class CallerRows final : public RowSource {
 public:
  explicit CallerRows(const stca_table_source& source) : source_(source) {}

  Array rows(const TableSpec& table, const std::vector<std::int64_t>& ids) override {
    auto [found, to] = make_array(Memory::host(), STCA_FLOAT32, {static_cast<std::int64_t>(ids.size()), table.width});
    if (ids.empty()) return found;
    last_error().clear();
    if (source_.rows(source_.context, ids.data(), ids.size(), reinterpret_cast<float*>(to)) != STCA_OK) {
      const std::string said = last_error();
      engine_error("table ", in_quotes(table.name), ": its source failed for ", ids.size(), " ids: ",
                   said.empty() ? "it left no message" : said);
    }
    return found;
  }

 private:
  stca_table_source source_;
};

/// Of a caller's `size`, what is whole fields.
std::size_t whole_fields(std::size_t size) {
  std::size_t whole = first_options_size;
  for (const std::size_t end :
       {offsetof(stca_options, unchecked_scores), offsetof(stca_options, max_users),
        offsetof(stca_options, ttl_seconds), offsetof(stca_options, precision), offsetof(stca_options, max_targets),
        offsetof(stca_options, check_versions), offsetof(stca_options, tables), offsetof(stca_options, state_folder),
        offsetof(stca_options, native_code), sizeof(stca_options)}) {
    if (end <= size) whole = end;
  }
  return whole;
}

/// An option that is a number, between its bounds.
template <class Number>
Number whole(const char* name, Number value, Number least, Number most) {
  if (least <= value && value <= most) return value;
  const std::string upto = most < std::numeric_limits<std::int64_t>::max() ? " to " + std::to_string(most) : "";
  fail(STCA_USAGE_ERROR, name, ": is ", value, ", expected a whole number from ", least, upto);
}

constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
// More threads than any machine's cores are a mistake, and each takes memory.
constexpr std::int32_t most_threads = 1024;

}  // namespace

Options options_of(const stca_options* given_options) {
  stca_options o;
  stca_options_init_sized(&o, sizeof o);  // by name: where files are compiled together, c_api.cpp has undone the macro
  if (given_options != nullptr) {
    if (given_options->size < first_options_size) {
      fail(STCA_USAGE_ERROR, "options have size ", given_options->size, "; call stca_options_init first");
    }
    // A caller compiled against an older, shorter struct leaves the later fields at their defaults.
    std::memcpy(&o, given_options, whole_fields(given_options->size));
  }
  Options options;
  options.keep = {whole("cache_bytes", o.cache_bytes, {}, largest), whole("max_users", o.max_users, {}, largest),
                  o.ttl_seconds};
  if (!(o.ttl_seconds >= 0) || std::isinf(o.ttl_seconds)) {
    fail(STCA_USAGE_ERROR, "ttl_seconds: is ", number_text(o.ttl_seconds),
         ", expected seconds above 0, or 0 for no limit");
  }
  options.state_folder = o.state_folder == nullptr ? "" : o.state_folder;
  options.state_folder_bytes = whole("state_folder_bytes", o.state_folder_bytes, {}, largest);
  options.threads = whole("threads", o.threads, 0, most_threads);
  options.max_targets = static_cast<std::int64_t>(whole("max_targets", o.max_targets, std::uint64_t{1}, largest));
  options.check_versions = o.check_versions != 0;
  options.native_code = o.native_code != 0;
  options.check_finite = o.unchecked_scores == 0;
  options.precision = o.precision == nullptr ? "" : o.precision;
  options.truncate = o.truncate != 0;
  options.engine = o.engine == nullptr ? "" : o.engine;
  options.cuda_graphs = o.cuda_graphs;
  if (o.table_count > 0) given(o.tables, "tables");
  for (std::size_t i = 0; i < o.table_count; ++i) {
    if (o.tables[i].rows == nullptr) fail(STCA_USAGE_ERROR, "tables: ", i, " has no rows function");
    options.tables[&given(o.tables[i].table, "the name of a table")] = std::make_shared<CallerRows>(o.tables[i]);
  }
  if (o.make_engine == nullptr) return options;
  options.make = [make = o.make_engine, context = o.make_engine_context](const std::shared_ptr<const Bundle>& bundle,
                                                                         const std::string& graph) {
    auto handle = std::make_unique<stca_bundle>(stca_bundle{bundle, bundle->folder->pinned()});
    stca_engine engine{};
    last_error().clear();
    const int32_t code = make(context, handle.get(), graph.c_str(), &engine);
    if (code != STCA_OK) callback_failed(code, STCA_BUILD_ERROR, graph + ": the caller's engine could not be made");
    auto made = std::make_unique<CallerEngine>(std::move(handle), graph, engine);  // which releases it from now on
    if (engine.run == nullptr) fail(STCA_USAGE_ERROR, graph, ": the caller's engine has no run function");
    return made;
  };
  return options;
}

}  // namespace stca::core
