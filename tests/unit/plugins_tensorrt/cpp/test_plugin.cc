// Drives the plugin library the way TensorRT does, without TensorRT: types, shapes, formats, fields, enqueue.
// Expressions and descriptors are made here. With the recording driver on the library path, enqueue prints its launches
// and the caller compares them; with a GPU, `--gpu` runs real ones and compares with a double-precision loop.
//
//   test_plugin LIBRARY            checks that need no driver
//   test_plugin LIBRARY --enqueue N_t N_h B TIED
//   test_plugin LIBRARY --enqueue-lists N_t N_h B N_s
//   test_plugin LIBRARY --gpu
// The library must hold bfloat16 kernels for H=2, H_k=1, D=D_v=64, scale 0.125 (as parts, and tied), and on SM 90 for
// lists of segments.
#include <NvInferRuntime.h>
#include <cuda.h>

#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

int gFailures = 0;

#define CHECK(condition)                                                                                                \
    do                                                                                                                  \
    {                                                                                                                   \
        if (!(condition))                                                                                               \
        {                                                                                                               \
            std::printf("FAILED line %d: %s\n", __LINE__, #condition);                                                  \
            ++gFailures;                                                                                                \
        }                                                                                                               \
    } while (false)

constexpr int32_t kHEADS = 2;
constexpr int32_t kDEPTH = 64;
constexpr float kSCALE = 0.125F;

class Expression : public IDimensionExpr, private apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }
    ~Expression() noexcept override = default;

private:
    bool isConstant() const override
    {
        return mValue >= 0;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }
    int64_t mValue;
};

class Builder : public IExprBuilder, private apiv::VExprBuilder
{
public:
    Builder()
    {
        mImpl = this;
    }
    ~Builder() noexcept override = default;

private:
    IDimensionExpr const* constant(int64_t value) override
    {
        return &mMade.emplace_back(value);
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
    std::deque<Expression> mMade;
};

class LastMessage : public ILogger, public ILoggerFinder
{
public:
    void log(Severity, char const* message) noexcept override
    {
        text = message;
    }
    ILogger* findLogger() override
    {
        return this;
    }
#if NV_TENSORRT_MAJOR >= 11
    InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"ILogger", 1, 0};
    }
    APILanguage getAPILanguage() const noexcept override
    {
        return APILanguage::kCPP;
    }
#endif
    bool says(char const* word) const
    {
        return text.find(word) != std::string::npos;
    }
    std::string text;
};

LastMessage gLog;

struct Plugin
{
    std::unique_ptr<IPluginV3> object;
    IPluginV3OneCore* core;
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* runtime;

    explicit Plugin(IPluginV3* made)
        : object(made)
        , core(static_cast<IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE)))
        , build(static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD)))
        , runtime(static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME)))
    {
    }
};

PluginTensorDesc describe(std::vector<int64_t> const& dims, DataType type)
{
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), desc.dims.d);
    desc.type = type;
    desc.format = TensorFormat::kLINEAR;
    return desc;
}

//! The node's six inputs and its output.
std::vector<PluginTensorDesc> node(int64_t targets, int64_t tokens, int64_t requests, int64_t depth = kDEPTH,
    DataType type = DataType::kBF16)
{
    return {describe({targets, kHEADS, depth}, type), describe({tokens, 1, depth}, type),
        describe({tokens, 1, depth}, type), describe({requests + 1}, DataType::kINT32),
        describe({requests + 1}, DataType::kINT32), describe({requests}, DataType::kINT32),
        describe({targets, kHEADS, depth}, type)};
}

//! The same with dynamic counts, between 1 and these.
std::vector<DynamicPluginTensorDesc> dynamic(std::vector<PluginTensorDesc> const& most)
{
    std::vector<DynamicPluginTensorDesc> all;
    for (PluginTensorDesc const& desc : most)
    {
        DynamicPluginTensorDesc one{desc, desc.dims, desc.dims, desc.dims};
        one.desc.dims.d[0] = -1;
        all.push_back(one);
    }
    return all;
}

IPluginCreatorV3One* creator(void* library)
{
    auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*) (int32_t&)>(dlsym(library, "getCreators"));
    auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    CHECK(get != nullptr && setFinder != nullptr);
    setFinder(&gLog);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = get(count);
    CHECK(count == 1);
    CHECK(std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    return static_cast<IPluginCreatorV3One*>(creators[0]);
}

IPluginV3* make(IPluginCreatorV3One* factory, std::vector<PluginField> const& fields)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return factory->createPlugin("node", &collection, TensorRTPhase::kBUILD);
}

PluginField scaleField(float const& scale)
{
    return {"scale", &scale, PluginFieldType::kFLOAT32, 1};
}

void checkNames(IPluginCreatorV3One* factory)
{
    CHECK(std::strcmp(factory->getPluginName(), "TargetHistoryAttention") == 0);
    CHECK(std::strcmp(factory->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(factory->getPluginNamespace(), "stca") == 0);
    PluginFieldCollection const* const names = factory->getFieldNames();
    CHECK(names->nbFields == 1 && std::strcmp(names->fields[0].name, "scale") == 0);

    Plugin const plugin(make(factory, {scaleField(kSCALE)}));
    CHECK(std::strcmp(plugin.core->getPluginName(), "TargetHistoryAttention") == 0);
    CHECK(std::strcmp(plugin.core->getPluginNamespace(), "stca") == 0);
    CHECK(plugin.build->getNbOutputs() == 1);
}

void checkFields(IPluginCreatorV3One* factory)
{
    CHECK(make(factory, {}) == nullptr && gLog.says("scale"));
    double const wide = 0.125;
    CHECK(make(factory, {{"scale", &wide, PluginFieldType::kFLOAT64, 1}}) == nullptr && gLog.says("scale"));
    float const infinite = INFINITY;
    CHECK(make(factory, {scaleField(infinite)}) == nullptr && gLog.says("finite"));
    CHECK(make(factory, {scaleField(kSCALE), {"other", &kSCALE, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    CHECK(gLog.says("other"));
}

void checkTypes(Plugin const& plugin)
{
    DataType const b = DataType::kBF16;
    DataType const i = DataType::kINT32;
    DataType out{};
    for (DataType const type : {DataType::kBF16, DataType::kHALF, DataType::kFLOAT})
    {
        std::vector<DataType> const types{type, type, type, i, i, i};
        CHECK(plugin.build->getOutputDataTypes(&out, 1, types.data(), 6) == 0 && out == type);
    }
    std::vector<DataType> const mixed{b, DataType::kHALF, b, i, i, i};
    CHECK(plugin.build->getOutputDataTypes(&out, 1, mixed.data(), 6) == -1 && gLog.says("BF16, HALF, FLOAT"));
    std::vector<DataType> const wide{b, b, b, i, DataType::kINT64, i};
    CHECK(plugin.build->getOutputDataTypes(&out, 1, wide.data(), 6) == -1);
    CHECK(gLog.says("history_offsets") && gLog.says("INT32"));
    std::vector<DataType> const integers{i, i, i, i, i, i};
    CHECK(plugin.build->getOutputDataTypes(&out, 1, integers.data(), 6) == -1);
}

void checkShapes(Plugin const& plugin)
{
    Expression const targets(-1), tokens(-1), requests(-1), heads(kHEADS), keyHeads(1), depth(64), valueDepth(32);
    auto const dims = [](std::vector<IDimensionExpr const*> const& list) {
        DimsExprs result{};
        result.nbDims = static_cast<int32_t>(list.size());
        std::copy(list.begin(), list.end(), result.d);
        return result;
    };
    std::vector<DimsExprs> inputs{dims({&targets, &heads, &depth}), dims({&tokens, &keyHeads, &depth}),
        dims({&tokens, &keyHeads, &valueDepth}), dims({&requests}), dims({&requests}), dims({&requests})};
    Builder builder;
    DimsExprs out{};
    CHECK(plugin.build->getOutputShapes(inputs.data(), 6, nullptr, 0, &out, 1, builder) == 0);
    CHECK(out.nbDims == 3 && out.d[0] == &targets && out.d[1] == &heads && out.d[2] == &valueDepth);
    inputs[4].nbDims = 2;
    CHECK(plugin.build->getOutputShapes(inputs.data(), 6, nullptr, 0, &out, 1, builder) == -1);
    CHECK(gLog.says("history_offsets") && gLog.says("expected 1"));
}

void checkFormats(Plugin const& plugin)
{
    auto all = dynamic(node(8, 100, 1));
    for (int32_t i = 0; i < 7; ++i)
    {
        CHECK(plugin.build->supportsFormatCombination(i, all.data(), 6, 1));
        all[i].desc.format = TensorFormat::kCHW32;
        CHECK(!plugin.build->supportsFormatCombination(i, all.data(), 6, 1));
        all[i].desc.format = TensorFormat::kLINEAR;
        DataType const right = all[i].desc.type;
        all[i].desc.type = DataType::kINT8;
        CHECK(!plugin.build->supportsFormatCombination(i, all.data(), 6, 1));
        all[i].desc.type = right;
    }
    all[0].desc.type = DataType::kFLOAT; // the library holds no float32 kernel
    CHECK(!plugin.build->supportsFormatCombination(0, all.data(), 6, 1));
}

void checkConfigure(Plugin const& plugin)
{
    auto const wrong = dynamic(node(8, 100, 1, 48));
    CHECK(plugin.build->configurePlugin(wrong.data(), 6, &wrong[6], 1) == -1);
    CHECK(gLog.says("D=48") && gLog.says("supported are") && gLog.says("H_k=1 D=64") && gLog.says("SM"));

    auto const tooMany = dynamic(node(int64_t{1} << 30, 10000, 4));
    CHECK(plugin.build->configurePlugin(tooMany.data(), 6, &tooMany[6], 1) == -1);
    CHECK(gLog.says("N_t * H is 2147483648, expected less than 2147450880"));

    auto const right = dynamic(node(300, 10000, 4));
    CHECK(plugin.build->configurePlugin(right.data(), 6, &right[6], 1) == 0);
    CHECK(plugin.build->getNbTactics() == 0); // what runs is chosen at each launch
    size_t const bytes = plugin.build->getWorkspaceSize(right.data(), 6, &right[6], 1);
    CHECK(bytes > 0 && bytes % ((kDEPTH + 2) * sizeof(float)) == 0);
}

//! What is written into an engine makes the same plugin when it is read again, also through clone and attach.
void checkSerialization(IPluginCreatorV3One* factory, Plugin const& plugin)
{
    PluginFieldCollection const* const fields = plugin.runtime->getFieldsToSerialize();
    CHECK(fields->nbFields == 2);
    std::vector<PluginField> const kept(fields->fields, fields->fields + fields->nbFields);
    Plugin const read(factory->createPlugin("node", fields, TensorRTPhase::kRUNTIME));
    Plugin const cloned(read.object->clone());
    Plugin const attached(cloned.runtime->attachToContext(nullptr));
    PluginFieldCollection const* const again = attached.runtime->getFieldsToSerialize();
    CHECK(again->nbFields == 2);
    for (int32_t i = 0; i < 2; ++i)
    {
        CHECK(std::strcmp(again->fields[i].name, kept[i].name) == 0 && again->fields[i].type == kept[i].type);
        CHECK(std::memcmp(again->fields[i].data, kept[i].data, 4) == 0);
    }
    CHECK(*static_cast<int32_t const*>(kept[1].data) > 0);
}

//! Enqueue with made-up addresses 4096, 8192, …; a tied node has its key where its value is.
void enqueue(IPluginCreatorV3One* factory, int64_t targets, int64_t tokens, int64_t requests, bool tied)
{
    Plugin const plugin(make(factory, {scaleField(kSCALE)}));
    auto const most = dynamic(node(300, 10000, 4));
    CHECK(plugin.build->configurePlugin(most.data(), 6, &most[6], 1) == 0);
    auto const sizes = node(targets, tokens, requests);
    CHECK(plugin.runtime->onShapeChange(sizes.data(), 6, &sizes[6], 1) == 0);
    std::vector<void const*> inputs;
    for (uintptr_t i = 1; i <= 6; ++i)
    {
        inputs.push_back(reinterpret_cast<void const*>(4096 * (tied && i == 3 ? 2 : i)));
    }
    void* out = reinterpret_cast<void*>(uintptr_t{4096 * 7});
    void* const workspace = reinterpret_cast<void*>(uintptr_t{4096 * 8});
    CHECK(plugin.runtime->enqueue(sizes.data(), &sizes[6], inputs.data(), &out, workspace, nullptr) == 0);
    std::printf("log %s\n", gLog.text.c_str());

    // Cut to int32, these would be ordinary sizes.
    for (auto const& large : {node(targets + (int64_t{1} << 32), tokens, requests),
             node(targets, tokens + (int64_t{1} << 32), requests), node(targets, tokens, requests + (int64_t{1} << 32))})
    {
        CHECK(plugin.runtime->onShapeChange(large.data(), 6, &large[6], 1) == -1 && gLog.says("expected less than"));
        CHECK(plugin.runtime->enqueue(large.data(), &large[6], inputs.data(), &out, workspace, nullptr) == -1);
    }

    inputs[0] = reinterpret_cast<void const*>(uintptr_t{4098});
    bool const nothing = targets == 0;
    CHECK((plugin.runtime->enqueue(sizes.data(), &sizes[6], inputs.data(), &out, workspace, nullptr) == 0) == nothing);
    CHECK(nothing || gLog.says("aligned to 16"));
}

//! A node over lists of segments: eight inputs and the output.
std::vector<PluginTensorDesc> lists(int64_t targets, int64_t tokens, int64_t requests, int64_t segments)
{
    std::vector<PluginTensorDesc> all = node(targets, tokens, requests);
    all[4].dims.d[0] = segments + 1;
    all[5].dims.d[0] = segments;
    all.insert(all.begin() + 6,
        {describe({requests + 1}, DataType::kINT32), describe({segments}, DataType::kFLOAT)});
    return all;
}

void checkLists(Plugin const& plugin)
{
    DataType const b = DataType::kBF16, i = DataType::kINT32, f = DataType::kFLOAT;
    DataType out{};
    std::vector<DataType> types{b, b, b, i, i, i, i, f};
    CHECK(plugin.build->getOutputDataTypes(&out, 1, types.data(), 8) == 0 && out == b);
    CHECK(plugin.build->getOutputDataTypes(&out, 1, types.data(), 7) == -1 && gLog.says("6 inputs, or 8"));
    types[7] = b;
    CHECK(plugin.build->getOutputDataTypes(&out, 1, types.data(), 8) == -1);
    CHECK(gLog.says("segment_bias must be FLOAT"));
    auto all = dynamic(lists(8, 100, 1, 3));
    for (int32_t pos = 0; pos < 9; ++pos)
    {
        CHECK(plugin.build->supportsFormatCombination(pos, all.data(), 8, 1));
    }
    all[7].desc.type = i;
    CHECK(!plugin.build->supportsFormatCombination(7, all.data(), 8, 1));
}

//! As `enqueue`, with eight inputs at 4096 to 4096 · 8.
void enqueueLists(IPluginCreatorV3One* factory, int64_t targets, int64_t tokens, int64_t requests, int64_t segments)
{
    Plugin const plugin(make(factory, {scaleField(kSCALE)}));
    auto const most = dynamic(lists(300, 10000, 4, 64));
    CHECK(plugin.build->configurePlugin(most.data(), 8, &most[8], 1) == 0);
    auto const at = lists(targets, tokens, requests, segments);
    CHECK(plugin.runtime->onShapeChange(at.data(), 8, &at[8], 1) == 0);
    std::vector<void const*> inputs;
    for (uintptr_t i = 1; i <= 8; ++i)
    {
        inputs.push_back(reinterpret_cast<void const*>(4096 * i));
    }
    void* out = reinterpret_cast<void*>(uintptr_t{4096 * 9});
    void* const workspace = reinterpret_cast<void*>(uintptr_t{4096 * 10});
    CHECK(plugin.runtime->enqueue(at.data(), &at[8], inputs.data(), &out, workspace, nullptr) == 0);
}

} // namespace

int gpu(IPluginCreatorV3One* factory);

int main(int argc, char** argv)
{
    void* const library = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr)
    {
        std::printf("cannot load the library: %s\n", dlerror());
        return 2;
    }
    IPluginCreatorV3One* const factory = creator(library);
    if (argc == 7 && std::strcmp(argv[2], "--enqueue") == 0)
    {
        enqueue(factory, std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]), std::atoi(argv[6]) != 0);
    }
    else if (argc == 7 && std::strcmp(argv[2], "--enqueue-lists") == 0)
    {
        enqueueLists(factory, std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]), std::atoll(argv[6]));
    }
    else if (argc == 4 && std::strcmp(argv[2], "--finder-of") == 0)
    {
        void* const other = dlopen(argv[3], RTLD_NOW | RTLD_LOCAL);
        auto const finder = reinterpret_cast<ILoggerFinder* (*)()>(dlsym(other, "finder"));
        auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
        setFinder(finder());
        CHECK(make(factory, {}) == nullptr);
    }
    else if (argc == 3 && std::strcmp(argv[2], "--gpu") == 0)
    {
        return gpu(factory);
    }
    else
    {
        Plugin const plugin(make(factory, {scaleField(kSCALE)}));
        checkNames(factory);
        checkFields(factory);
        checkTypes(plugin);
        checkShapes(plugin);
        checkFormats(plugin);
        checkConfigure(plugin);
        checkLists(plugin);
        checkSerialization(factory, plugin);
    }
    std::printf("%d failures\n", gFailures);
    return gFailures == 0 ? 0 : 1;
}

// --- with a GPU -------------------------------------------------------------------------------------------------------

namespace
{

//! The driver's calls for memory, looked up so that this file links nothing.
struct Memory
{
    CUresult (*init)(unsigned int);
    CUresult (*retain)(CUcontext*, CUdevice);
    CUresult (*current)(CUcontext);
    CUresult (*allocate)(CUdeviceptr*, size_t);
    CUresult (*toDevice)(CUdeviceptr, void const*, size_t);
    CUresult (*toHost)(void*, CUdeviceptr, size_t);
    CUresult (*fill)(CUdeviceptr, unsigned char, size_t);
    CUresult (*synchronize)();
    bool ready{false};

    Memory()
    {
        void* const cuda = dlopen("libcuda.so.1", RTLD_NOW);
        if (cuda == nullptr)
        {
            return;
        }
        auto const find = [cuda](auto& function, char const* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(cuda, name));
            return function != nullptr;
        };
        CUcontext context = nullptr;
        ready = find(init, "cuInit") && find(retain, "cuDevicePrimaryCtxRetain") && find(current, "cuCtxSetCurrent")
            && find(allocate, "cuMemAlloc_v2") && find(toDevice, "cuMemcpyHtoD_v2") && find(toHost, "cuMemcpyDtoH_v2")
            && find(fill, "cuMemsetD8_v2") && find(synchronize, "cuCtxSynchronize") && init(0) == CUDA_SUCCESS
            && retain(&context, 0) == CUDA_SUCCESS && current(context) == CUDA_SUCCESS;
    }

    template <typename T>
    CUdeviceptr put(std::vector<T> const& host) const
    {
        CUdeviceptr address = 0;
        CHECK(allocate(&address, std::max<size_t>(host.size() * sizeof(T), 16)) == CUDA_SUCCESS);
        CHECK(host.empty() || toDevice(address, host.data(), host.size() * sizeof(T)) == CUDA_SUCCESS);
        return address;
    }
};

uint16_t toBfloat16(float value)
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float fromBfloat16(uint16_t value)
{
    uint32_t const bits = uint32_t{value} << 16;
    float result = 0;
    std::memcpy(&result, &bits, 4);
    return result;
}

void* pointer(CUdeviceptr address)
{
    return reinterpret_cast<void*>(address);
}

//! One batch of requests with histories of these lengths, `targets` targets each.
void runOnGpu(IPluginCreatorV3One* factory, Memory const& memory, int32_t targets, std::vector<int32_t> const& lengths)
{
    auto const requests = static_cast<int32_t>(lengths.size());
    std::vector<int32_t> targetOffsets{0}, historyOffsets{0};
    for (int32_t length : lengths)
    {
        targetOffsets.push_back(targetOffsets.back() + targets);
        historyOffsets.push_back(historyOffsets.back() + length);
    }
    int32_t const allTargets = targetOffsets.back(), tokens = historyOffsets.back();
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    auto const draw = [&](size_t count) {
        std::vector<uint16_t> values(count);
        for (uint16_t& value : values)
        {
            value = toBfloat16(normal(random));
        }
        return values;
    };
    auto const query = draw(size_t(allTargets) * kHEADS * kDEPTH);
    auto const key = draw(size_t(tokens) * kDEPTH), value = draw(size_t(tokens) * kDEPTH);

    Plugin const plugin(make(factory, {scaleField(kSCALE)}));
    auto const sizes = node(allTargets, tokens, requests);
    auto const most = dynamic(sizes);
    CHECK(plugin.build->configurePlugin(most.data(), 6, &most[6], 1) == 0);
    CHECK(plugin.runtime->onShapeChange(sizes.data(), 6, &sizes[6], 1) == 0);
    std::vector<void const*> const inputs{pointer(memory.put(query)), pointer(memory.put(key)),
        pointer(memory.put(value)), pointer(memory.put(targetOffsets)), pointer(memory.put(historyOffsets)),
        pointer(memory.put(lengths))};
    size_t const workspaceBytes = plugin.build->getWorkspaceSize(most.data(), 6, &most[6], 1);
    CUdeviceptr const workspace = memory.put(std::vector<uint8_t>(workspaceBytes, 0xFF)); // NaN everywhere
    CUdeviceptr const out = memory.put(std::vector<uint16_t>(query.size(), 0xFFFF));
    void* outputs[] = {pointer(out)};
    CHECK(plugin.runtime->enqueue(sizes.data(), &sizes[6], inputs.data(), outputs, pointer(workspace), nullptr) == 0);
    CHECK(memory.synchronize() == CUDA_SUCCESS);
    std::vector<uint16_t> got(query.size());
    CHECK(memory.toHost(got.data(), out, got.size() * 2) == CUDA_SUCCESS);

    double worst = 0;
    for (int32_t t = 0; t < allTargets; ++t)
    {
        int32_t const b = t / targets;
        for (int32_t h = 0; h < kHEADS; ++h)
        {
            uint16_t const* const q = &query[size_t(t * kHEADS + h) * kDEPTH];
            std::vector<double> weights(static_cast<size_t>(lengths[b]));
            double top = -INFINITY, sum = 0;
            for (int32_t l = 0; l < lengths[b]; ++l)
            {
                double dot = 0;
                for (int32_t i = 0; i < kDEPTH; ++i)
                {
                    dot += double(fromBfloat16(q[i])) * fromBfloat16(key[size_t(historyOffsets[b] + l) * kDEPTH + i]);
                }
                weights[l] = kSCALE * dot;
                top = std::max(top, weights[l]);
            }
            for (double& weight : weights)
            {
                weight = std::exp(weight - top);
                sum += weight;
            }
            for (int32_t i = 0; i < kDEPTH; ++i)
            {
                double expected = 0;
                for (int32_t l = 0; l < lengths[b]; ++l)
                {
                    expected += weights[l] / sum * fromBfloat16(value[size_t(historyOffsets[b] + l) * kDEPTH + i]);
                }
                double const error = std::fabs(fromBfloat16(got[size_t(t * kHEADS + h) * kDEPTH + i]) - expected);
                worst = std::isnan(error) ? INFINITY : std::max(worst, error);
            }
        }
    }
    std::printf("targets %d tokens %d: worst error %g\n", allTargets, tokens, worst);
    CHECK(worst < 0.03);
}

} // namespace

int gpu(IPluginCreatorV3One* factory)
{
    Memory const memory;
    if (!memory.ready)
    {
        std::printf("SKIPPED: no NVIDIA GPU\n");
        return 77;
    }
    runOnGpu(factory, memory, 3, {37, 0, 1, 129});
    runOnGpu(factory, memory, 5, {6000}); // cut into parts
    std::printf("%d failures; log %s\n", gFailures, gLog.text.c_str());
    return gFailures == 0 ? 0 : 1;
}
