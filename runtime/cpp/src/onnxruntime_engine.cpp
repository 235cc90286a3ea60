// A graph in ONNX Runtime on the CPU, through its C API. The library is loaded when the first engine is made.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>

#include "contract.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "library.hpp"
#include "onnxruntime_interface.hpp"
#include "process.hpp"
#include "tables.hpp"

namespace stca::core {
namespace {

using F = OnnxRuntimeFunctions;

/// Dtypes by ONNX Runtime's numbers.
constexpr std::pair<int, DType> element_types[] = {
    {F::element_bool, STCA_BOOL},       {F::element_int8, STCA_INT8},         {F::element_uint8, STCA_UINT8},
    {F::element_int16, STCA_INT16},     {F::element_int32, STCA_INT32},       {F::element_int64, STCA_INT64},
    {F::element_float16, STCA_FLOAT16}, {F::element_bfloat16, STCA_BFLOAT16}, {F::element_float, STCA_FLOAT32},
    {F::element_double, STCA_FLOAT64},  {F::element_float8, STCA_FLOAT8_E4M3},
};

void drop_log(void*, int, const char*, const char*, const char*, const char*) {}

/// From 1.29 on it would write a device id and a database of events below the user's cache folder, and look up a host
/// to send them to, unless this is set before it is loaded. Whoever wants that sets the variable to another value.
void keep_quiet() { ::setenv("ORT_DISABLE_TELEMETRY", "1", 0); }

struct Runtime {
  F api;
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;
  OrtAllocator* allocator = nullptr;
  std::string version;

  Runtime() {
    keep_quiet();
    const Library library("libonnxruntime.so.1", "STCA_ONNXRUNTIME_LIBRARY");
    const auto* base = library.get<const OnnxRuntimeBase* (*)()>("OrtGetApiBase")();
    version = base->get_version_string();
    check_version(version);  // first: asked for an API that it lacks, ONNX Runtime writes to stderr
    const void* const* table = base->get_api(F::api_version);
    if (table == nullptr) fail(STCA_BUILD_ERROR, "ONNX Runtime ", version, " lacks its API ", F::api_version);
    api = F::of(table);
    const std::string who = "ONNX Runtime " + version;
    check(api.create_env_with_custom_logger(&drop_log, nullptr, F::log_fatal, "stca", &env), STCA_BUILD_ERROR, who);
    check(api.create_cpu_memory_info(F::device_allocator, F::memory_default, &memory), STCA_BUILD_ERROR, who);
    check(api.get_allocator_with_default_options(&allocator), STCA_BUILD_ERROR, who);
  }

  /// Throws with ONNX Runtime's own reason when `status` is one.
  void check(OrtStatus* status, stca_code code, const std::string& what) const {
    if (status == nullptr) return;
    const std::string reason = said(api.get_error_message(status));
    api.release_status(status);
    fail(code, what, ": ", reason);
  }

  static const Runtime& get() {
    static const Runtime* runtime = new Runtime;  // never freed: engines may end after static objects do
    return *runtime;
  }
};

class OnnxRuntimeEngine final : public Engine {
 public:
  /// Of a file of the bundle that is what `graph` says and, where it has look-ups, takes their rows too; with a null
  /// `graph`, of one that is what it says of itself.
  OnnxRuntimeEngine(std::shared_ptr<const Bundle> bundle, const std::string& file, const GraphSpec* graph, int threads)
      : bundle_(std::move(bundle)), runtime_(Runtime::get()) {
    graph_.file = file;
    const auto check = [&](OrtStatus* status) { runtime_.check(status, STCA_BUILD_ERROR, shown(graph_.file)); };
    OrtSessionOptions* options = nullptr;
    check(api().create_session_options(&options));
    const std::unique_ptr<OrtSessionOptions, void (*)(OrtSessionOptions*)> owned(options,
                                                                                 api().release_session_options.call);
    check(api().set_intra_op_num_threads(options, threads > 0 ? threads : processors()));
    // Else the threads of each half go on spinning while the other half computes, and a miss costs twice its halves.
    check(api().add_session_config_entry(options, "session.force_spinning_stop", "1"));
    // Else products with dequantized weights are made in 8 bits on both sides, which no node of the graph says.
    check(api().add_session_config_entry(options, "session.qdq_matmulnbits_accuracy_level", "1"));
    // Else processors without VNNI add two products of int8 in 16 bits, and cut off what is more.
    check(api().add_session_config_entry(options, "session.x64quantprecision", "1"));
    OrtSession* session = nullptr;
    runtime_.check(open(options, &session), STCA_BUILD_ERROR,
                   shown(graph_.file) + ": ONNX Runtime cannot load it");
    session_ = {session, api().release_session.call};
    const Signature found{specs(true), specs(false)};
    graph_.inputs = graph == nullptr ? found.inputs : graph->inputs;
    graph_.outputs = graph == nullptr ? found.outputs : graph->outputs;
    for (const Lookup& lookup : graph == nullptr ? std::vector<Lookup>{} : graph->lookups) add_rows(lookup, found);
    const bool ids_alone = graph != nullptr && !graph->lookups.empty();
    check_signature(shown(graph_.file), graph_, found, ids_alone);
    for (std::size_t i = 0; i < graph_.inputs.size(); ++i) {
      if (!has(found.inputs, graph_.inputs[i].name)) continue;
      taken_.push_back(i);
      input_names_.push_back(graph_.inputs[i].name.c_str());
    }
    for (const TensorSpec& spec : graph_.outputs) output_names_.push_back(spec.name.c_str());
  }
  OnnxRuntimeEngine(const OnnxRuntimeEngine&) = delete;
  OnnxRuntimeEngine& operator=(const OnnxRuntimeEngine&) = delete;

  std::string name() const override { return "onnxruntime " + runtime_.version + " (CPU)"; }
  const GraphSpec& spec() const override { return graph_; }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    std::vector<Value> values;
    std::vector<const OrtValue*> raw_inputs;
    for (const std::size_t i : taken_) {
      values.push_back(borrowed(inputs[i]));
      raw_inputs.push_back(values.back().get());
    }
    // Outputs whose sizes follow from the inputs' are computed into memory of our own, no larger than they are: a state
    // that is kept would hold on to a piece of ONNX Runtime's arena.
    std::vector<Array> arrays = foreseen(inputs);
    std::vector<Value> ours;
    std::vector<OrtValue*> raw_outputs(arrays.size());
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      if (arrays[i].owner == nullptr) continue;
      ours.push_back(borrowed(arrays[i]));
      raw_outputs[i] = ours.back().get();
    }
    OrtStatus* status = api().run(session_.get(), nullptr, input_names_.data(), raw_inputs.data(), raw_inputs.size(),
                                  output_names_.data(), output_names_.size(), raw_outputs.data());
    std::vector<Value> theirs;
    theirs.reserve(raw_outputs.size());
    for (std::size_t i = 0; i < raw_outputs.size(); ++i) {  // so that whatever comes has an owner at once
      theirs.emplace_back(arrays[i].owner == nullptr ? raw_outputs[i] : nullptr, [this](OrtValue* value) {
        if (value != nullptr) api().release_value(value);
      });
    }
    runtime_.check(status, STCA_ENGINE_ERROR, "ONNX Runtime failed on " + shown(graph_.file));
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      if (arrays[i].owner == nullptr) arrays[i] = copied(theirs[i].get());
    }
    return arrays;
  }

 private:
  using Value = std::shared_ptr<OrtValue>;

  const F& api() const { return runtime_.api; }

  /// By its path, so that weights are mapped from their file; or out of the memory that holds the bundle.
  OrtStatus* open(OrtSessionOptions* options, OrtSession** session) const {
    const auto model = bundle_->folder->held(graph_.file);
    if (model == nullptr) {
      return api().create_session(runtime_.env, bundle_->folder->path_of(graph_.file).c_str(), options, session);
    }
    std::vector<std::shared_ptr<const std::string>> files;
    std::vector<const char*> names;
    std::vector<char*> bytes;
    std::vector<std::size_t> sizes;
    for (const auto& [name, entry] : bundle_->manifest.files) {
      if (files.emplace_back(bundle_->folder->held(name)) == nullptr) continue;
      names.push_back(name.c_str());
      bytes.push_back(const_cast<char*>(files.back()->data()));
      sizes.push_back(files.back()->size());
    }
    OrtStatus* status = api().add_external_initializers_from_files_in_memory(options, names.data(), bytes.data(),
                                                                             sizes.data(), names.size());
    if (status != nullptr) return status;
    return api().create_session_from_array(runtime_.env, model->data(), model->size(), options, session);
  }

  static bool has(const std::vector<TensorSpec>& specs, const std::string& name) {
    return std::any_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) { return spec.name == name; });
  }

  /// Takes rows of a table as an input, of the number of axes that the file says.
  void add_rows(const Lookup& lookup, const Signature& found) {
    for (const TableSpec& table : bundle_->manifest.tables) {
      if (table.name != lookup.table) continue;
      TensorSpec rows;
      for (const TensorSpec& spec : found.inputs) rows = spec.name == lookup.rows ? spec : rows;
      if (rows.name.empty() || rows.shape.empty() || rows.dtype != STCA_FLOAT32 || rows.shape.back().size != table.width) {
        bundle_error(shown(graph_.file), ": takes no float32 rows ", in_quotes(lookup.rows), " of width ", table.width,
                     "; export the bundle again");
      }
      graph_.inputs.push_back(rows);
    }
  }

  /// What the session itself says it takes or gives.
  std::vector<TensorSpec> specs(bool inputs) const {
    const auto check = [&](OrtStatus* status) { runtime_.check(status, STCA_BUILD_ERROR, shown(graph_.file)); };
    const OrtSession* session = session_.get();
    std::size_t count = 0;
    check(inputs ? api().session_get_input_count(session, &count) : api().session_get_output_count(session, &count));
    std::vector<TensorSpec> found(count);
    for (std::size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      check(inputs ? api().session_get_input_name(session, i, runtime_.allocator, &name)
                   : api().session_get_output_name(session, i, runtime_.allocator, &name));
      found[i].name = name;
      check(api().allocator_free(runtime_.allocator, name));
      OrtTypeInfo* raw = nullptr;
      check(inputs ? api().session_get_input_type_info(session, i, &raw)
                   : api().session_get_output_type_info(session, i, &raw));
      const std::unique_ptr<OrtTypeInfo, void (*)(OrtTypeInfo*)> owned(raw, api().release_type_info.call);
      const OrtTensorTypeAndShapeInfo* info = nullptr;
      check(api().cast_type_info_to_tensor_info(raw, &info));
      int type = 0;
      std::size_t rank = 0;
      if (info != nullptr) check(api().get_tensor_element_type(info, &type));
      if (info != nullptr) check(api().get_dimensions_count(info, &rank));
      if (!known(type, found[i].dtype) || rank > STCA_MAX_RANK) {
        bundle_error(shown(graph_.file), ": '", shown(found[i].name), "' is of a kind that no bundle's tensors are");
      }
      std::vector<std::int64_t> sizes(rank);
      std::vector<const char*> symbols(rank);
      check(api().get_dimensions(info, sizes.data(), rank));
      check(api().get_symbolic_dimensions(info, symbols.data(), rank));
      for (std::size_t axis = 0; axis < rank; ++axis) {
        found[i].shape.push_back({sizes[axis], symbols[axis] == nullptr ? "" : symbols[axis]});
      }
    }
    return found;
  }

  static bool known(int type, DType& dtype) {
    for (const auto& [theirs, ours] : element_types) {
      if (theirs != type) continue;
      dtype = ours;
      return true;
    }
    return false;
  }

  /// Memory for each output whose sizes the inputs decide; an array without an owner for any other.
  std::vector<Array> foreseen(const std::vector<Array>& inputs) const {
    std::map<std::string_view, std::int64_t> sizes;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      for (std::size_t axis = 0; axis < graph_.inputs[i].shape.size(); ++axis) {
        sizes[graph_.inputs[i].shape[axis].symbol] = inputs[i].shape[static_cast<int>(axis)];
      }
    }
    std::vector<Array> arrays(graph_.outputs.size());
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      const TensorSpec& spec = graph_.outputs[i];
      Shape shape;
      bool decided = true;
      for (const Axis& axis : spec.shape) {
        const auto found = axis.symbol.empty() ? sizes.end() : sizes.find(axis.symbol);
        decided = decided && (axis.symbol.empty() || found != sizes.end());
        shape[shape.rank++] = axis.symbol.empty() ? axis.size : decided ? found->second : 0;
      }
      if (decided && shape.addressable(item_bytes(spec.dtype)) && shape.elements() > 0) {
        arrays[i] = make_array(Memory::host(), spec.dtype, shape).array;
      }
    }
    return arrays;
  }

  /// The array's memory as ONNX Runtime sees it.
  Value borrowed(const Array& array) const {
    static char nothing[8];  // an array without elements may have no address
    void* data = array.data == nullptr ? nothing : const_cast<void*>(array.data);
    int type = 0;
    for (const auto& [theirs, ours] : element_types) type = ours == array.dtype ? theirs : type;
    OrtValue* value = nullptr;
    runtime_.check(
        api().create_tensor_with_data_as_ort_value(runtime_.memory, data, array.bytes(), array.shape.sizes.data(),
                                                   static_cast<std::size_t>(array.shape.rank), type, &value),
        STCA_ENGINE_ERROR, "ONNX Runtime");
    return {value, api().release_value.call};
  }

  /// What ONNX Runtime computed, as a copy.
  Array copied(const OrtValue* value) const {
    const auto check = [&](OrtStatus* status) { runtime_.check(status, STCA_ENGINE_ERROR, shown(graph_.file)); };
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api().get_tensor_type_and_shape(value, &raw));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
        raw, api().release_tensor_type_and_shape_info.call);
    int type = 0;
    std::size_t rank = 0;
    check(api().get_tensor_element_type(raw, &type));
    check(api().get_dimensions_count(raw, &rank));
    DType dtype = STCA_INT64;
    if (!known(type, dtype) || rank > STCA_MAX_RANK) {
      engine_error(shown(graph_.file), ": an output has a type or rank that no bundle's tensors have");
    }
    Shape shape;
    shape.rank = static_cast<int>(rank);
    check(api().get_dimensions(raw, shape.sizes.data(), rank));
    void* data = nullptr;
    check(api().get_tensor_mutable_data(const_cast<OrtValue*>(value), &data));
    auto [array, to] = make_array(Memory::host(), dtype, shape);
    Memory::host().copy(to, data, array.bytes());
    return array;
  }

  std::shared_ptr<const Bundle> bundle_;  // keeps the files alive
  GraphSpec graph_;                       // of the file
  const Runtime& runtime_;
  std::vector<std::size_t> taken_;  // inputs that the file has: not those that were ids alone
  std::vector<const char*> input_names_, output_names_;
  std::shared_ptr<OrtSession> session_;
};

}  // namespace

Engines make_onnxruntime_engines(const std::shared_ptr<const Bundle>& bundle, const Options& options) {
  const auto sources = row_sources(*bundle, options.tables);
  const auto engine = [&](const char* name) -> std::unique_ptr<Engine> {
    const GraphSpec& graph = bundle->manifest.graph(name);
    auto own = std::make_unique<OnnxRuntimeEngine>(bundle, graph.file, &graph, options.threads);
    if (graph.lookups.empty()) return own;
    std::unique_ptr<Engine> ids;
    if (!graph.ids.empty()) ids = std::make_unique<OnnxRuntimeEngine>(bundle, graph.ids, nullptr, 1);
    return with_tables(bundle, name, std::move(own), std::move(ids), sources);
  };
  Engines engines{engine("user_encoder"), engine("target_scorer"), "", ""};
  if (bundle->manifest.grows()) engines.grower = engine(user_grower);
  return engines;
}

}  // namespace stca::core
