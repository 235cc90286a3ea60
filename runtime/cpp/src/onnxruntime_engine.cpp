// A graph in ONNX Runtime on the CPU, through its C API. Compiled where onnxruntime_c_api.h is given; the library
// itself is loaded when the first engine is made.
#include <onnxruntime_c_api.h>

#include <utility>

#include "engine.hpp"
#include "error.hpp"
#include "library.hpp"

namespace stca::core {
namespace {

/// Dtypes by ONNX Runtime's numbers.
constexpr std::pair<ONNXTensorElementDataType, DType> types[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, STCA_BOOL},       {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, STCA_INT8},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, STCA_UINT8},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, STCA_INT16},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, STCA_INT32},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, STCA_INT64},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, STCA_FLOAT16}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, STCA_BFLOAT16},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, STCA_FLOAT32},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, STCA_FLOAT64},
};

struct Runtime {
  const OrtApi* api;
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;
  std::string version;

  Runtime() {
    const Library library("libonnxruntime.so.1", "STCA_ONNXRUNTIME_LIBRARY");
    const OrtApiBase* base = library.get<const OrtApiBase* (*)()>("OrtGetApiBase")();
    version = base->GetVersionString();
    api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
      fail(STCA_BUILD_ERROR, "ONNX Runtime ", version, " is older than the headers this library was built with (API ",
           ORT_API_VERSION, "); install a newer one");
    }
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "stca", &env), STCA_BUILD_ERROR, "ONNX Runtime");
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), STCA_BUILD_ERROR, "ONNX Runtime");
  }

  /// Throws with ONNX Runtime's own reason when `status` is one.
  void check(OrtStatus* status, stca_code code, const std::string& what) const {
    if (status == nullptr) return;
    const std::string reason = one_line(api->GetErrorMessage(status));
    api->ReleaseStatus(status);
    fail(code, what, ": ", reason);
  }

  static const Runtime& get() {
    static const Runtime* runtime = new Runtime;  // never freed: engines may end after static objects do
    return *runtime;
  }
};

class OnnxRuntimeEngine final : public Engine {
 public:
  OnnxRuntimeEngine(std::shared_ptr<const Bundle> bundle, const std::string& graph, int threads)
      : bundle_(std::move(bundle)), graph_(bundle_->manifest.graph(graph)), runtime_(Runtime::get()) {
    for (const TensorSpec& spec : graph_.inputs) input_names_.push_back(spec.name.c_str());
    for (const TensorSpec& spec : graph_.outputs) output_names_.push_back(spec.name.c_str());
    const OrtApi& api = *runtime_.api;
    OrtSessionOptions* options = nullptr;
    runtime_.check(api.CreateSessionOptions(&options), STCA_BUILD_ERROR, graph_.file);
    const std::unique_ptr<OrtSessionOptions, decltype(api.ReleaseSessionOptions)> owned(options,
                                                                                        api.ReleaseSessionOptions);
    if (threads > 0) runtime_.check(api.SetIntraOpNumThreads(options, threads), STCA_BUILD_ERROR, graph_.file);
    runtime_.check(api.CreateSession(runtime_.env, bundle_->graph_files.at(graph).c_str(), options, &session_),
                   STCA_BUILD_ERROR, graph_.file + ": ONNX Runtime cannot load it");
  }
  OnnxRuntimeEngine(const OnnxRuntimeEngine&) = delete;
  OnnxRuntimeEngine& operator=(const OnnxRuntimeEngine&) = delete;
  ~OnnxRuntimeEngine() override { runtime_.api->ReleaseSession(session_); }

  std::string name() const override { return "onnxruntime " + runtime_.version + " (CPU)"; }
  const GraphSpec& spec() const override { return graph_; }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    std::vector<Value> values;
    std::vector<const OrtValue*> raw_inputs;
    for (const Array& array : inputs) {
      values.push_back(borrowed(array));
      raw_inputs.push_back(values.back().get());
    }
    std::vector<OrtValue*> raw_outputs(output_names_.size());
    std::vector<Value> outputs;
    outputs.reserve(raw_outputs.size());  // so that whatever comes has an owner at once
    OrtStatus* status = runtime_.api->Run(session_, nullptr, input_names_.data(), raw_inputs.data(), raw_inputs.size(),
                                          output_names_.data(), output_names_.size(), raw_outputs.data());
    for (OrtValue* value : raw_outputs) outputs.emplace_back(value, runtime_.api->ReleaseValue);
    runtime_.check(status, STCA_ENGINE_ERROR, "ONNX Runtime failed on " + graph_.file);
    std::vector<Array> arrays;
    for (Value& value : outputs) arrays.push_back(taken(std::move(value)));
    return arrays;
  }

 private:
  using Value = std::shared_ptr<OrtValue>;

  /// The array's memory as ONNX Runtime sees it; it only reads inputs.
  Value borrowed(const Array& array) const {
    static char nothing[8];  // an array without elements may have no address
    void* data = array.data == nullptr ? nothing : const_cast<void*>(array.data);
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    for (const auto& [theirs, ours] : types) type = ours == array.dtype ? theirs : type;
    OrtValue* value = nullptr;
    runtime_.check(
        runtime_.api->CreateTensorWithDataAsOrtValue(runtime_.memory, data, array.bytes(), array.shape.sizes.data(),
                                                     static_cast<std::size_t>(array.shape.rank), type, &value),
        STCA_ENGINE_ERROR, "ONNX Runtime");
    return {value, runtime_.api->ReleaseValue};
  }

  /// What ONNX Runtime computed, kept alive by the array.
  Array taken(Value value) const {
    const OrtApi& api = *runtime_.api;
    const auto check = [&](OrtStatus* status) { runtime_.check(status, STCA_ENGINE_ERROR, graph_.file); };
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api.GetTensorTypeAndShape(value.get(), &raw));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> info(
        raw, api.ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type;
    std::size_t rank = 0;
    check(api.GetTensorElementType(raw, &type));
    check(api.GetDimensionsCount(raw, &rank));
    Array array;
    bool known = rank <= STCA_MAX_RANK;
    if (known) check(api.GetDimensions(raw, array.shape.sizes.data(), rank));
    array.shape.rank = static_cast<int>(rank);
    bool found = false;
    for (const auto& [theirs, ours] : types) {
      if (theirs != type) continue;
      array.dtype = ours;
      found = true;
    }
    if (!known || !found) fail(STCA_ENGINE_ERROR, graph_.file, ": an output has a type or rank that no state can have");
    void* data = nullptr;
    check(api.GetTensorMutableData(value.get(), &data));
    array.data = data;
    array.owner = std::move(value);
    return array;
  }

  std::shared_ptr<const Bundle> bundle_;  // keeps graph_ and the names alive
  const GraphSpec& graph_;
  const Runtime& runtime_;
  std::vector<const char*> input_names_, output_names_;
  OrtSession* session_ = nullptr;
};

}  // namespace

Engines make_onnxruntime_engines(const std::shared_ptr<const Bundle>& bundle, int threads) {
  return {std::make_unique<OnnxRuntimeEngine>(bundle, "user_encoder", threads),
          std::make_unique<OnnxRuntimeEngine>(bundle, "target_scorer", threads), "", ""};
}

}  // namespace stca::core
