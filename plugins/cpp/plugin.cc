#include "plugin.h"

#include "cuda_driver.h"
#include "log.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <utility>

using namespace nvinfer1;

namespace stca
{
namespace
{

constexpr int32_t kINPUTS = 8;
constexpr int32_t kPLAIN = 6; //!< inputs of a node whose requests have one segment each
constexpr char const* kINPUT_NAMES[kINPUTS] = {"query", "key", "value", "target_offsets", "history_offsets",
    "history_lengths", "segment_offsets", "segment_bias"};
constexpr int32_t kRANKS[kINPUTS] = {3, 3, 3, 1, 1, 1, 1, 1};

//! Type of an input beyond query, key and value.
DataType typeOf(int32_t input)
{
    return input == kINPUTS - 1 ? DataType::kFLOAT : DataType::kINT32;
}

void checkCounts(int32_t nbInputs, int32_t nbOutputs)
{
    if ((nbInputs != kPLAIN && nbInputs != kINPUTS) || nbOutputs != 1)
    {
        throw std::runtime_error("expected 6 inputs, or 8 with segments, and 1 output");
    }
}

// More parts than this make the combine step longer than what they save; the cost model for Python stops there too.
constexpr int64_t kMAX_PARTS = 128;
// A part of fewer token blocks spends its time on starting and on writing its result.
constexpr int64_t kLEAST_BLOCKS_A_PART = 4;
// Parts are only cut to fill the GPU once, which bounds the rows of partial results: blocks at a time × rows a block.
constexpr int64_t kMOST_BLOCKS_AT_ONCE = 1024;
// What the artifacts' wide loads rely on.
constexpr uintptr_t kALIGNMENT = 16;

bool toElement(DataType type, Element& element)
{
    switch (type)
    {
    case DataType::kBF16: element = Element::kBFLOAT16; return true;
    case DataType::kHALF: element = Element::kFLOAT16; return true;
    case DataType::kFLOAT: element = Element::kFLOAT32; return true;
    default: return false;
    }
}

//! What is compiled in, from the first three inputs.
Shape shapeOf(Dims const& query, Dims const& key, Dims const& value, DataType type, bool segments)
{
    Element element{};
    if (!toElement(type, element))
    {
        throw std::runtime_error("unsupported element type; " + supported());
    }
    if (query.nbDims != 3 || key.nbDims != 3 || value.nbDims != 3)
    {
        throw std::runtime_error("query, key and value must have 3 dimensions");
    }
    if (key.d[2] != query.d[2] || value.d[1] != key.d[1])
    {
        throw std::runtime_error("query and key must agree in head size, key and value in head count");
    }
    auto const size = [](int64_t n) {
        if (n < 1)
        {
            throw std::runtime_error("head counts and head sizes must be static");
        }
        return static_cast<int32_t>(n);
    };
    return {element, size(query.d[1]), size(key.d[1]), size(query.d[2]), size(value.d[2]), segments};
}

bool sameScale(float a, float b)
{
    return std::fabs(a - b) <= 1e-6F * std::fabs(b);
}

//! What changes from launch to launch.
struct Sizes
{
    int64_t targets;
    int64_t tokens;
    int64_t requests;
};

//! The sizes in these dimensions, which must be ones that the kernels, counting in int32, can count; the limits are those
//! of `check_sizes` in plugins/tiling.py, which says where they come from.
Sizes sizesOf(Shape const& shape, Dims const& query, Dims const& key, Dims const& targetOffsets)
{
    Sizes const sizes{query.d[0], key.d[0], targetOffsets.d[0] - 1};
    auto const check = [](char const* name, int64_t size, int64_t limit) {
        if (size >= limit)
        {
            throw std::runtime_error(std::string(name) + " is " + std::to_string(size) + ", expected less than "
                + std::to_string(limit) + "; send smaller batches");
        }
    };
    constexpr int64_t kWHOLE_BLOCKS = (int64_t{1} << 31) - 2 * kMAX_PARTS * 128;
    check("N_t * H", sizes.targets * shape.heads, kWHOLE_BLOCKS);
    check("N_h", sizes.tokens, kWHOLE_BLOCKS);
    check("B", sizes.requests, int64_t{1} << 30);
    return sizes;
}

Combine const& findCombine(Shape const& shape, int32_t sm)
{
    for (Combine const& candidate : combines())
    {
        if (candidate.sm == sm && candidate.element == shape.element && candidate.valueDepth == shape.valueDepth)
        {
            return candidate;
        }
    }
    throw std::runtime_error("no combine kernel for D_v=" + std::to_string(shape.valueDepth) + "; " + supported());
}

Kernel loadAttend(Attend const& artifact)
{
    return load(artifact.ptx, "attend_kernel", 32U * artifact.warps, artifact.shared);
}

Kernel loadCombine(Combine const& artifact)
{
    return load(artifact.ptx, "combine_kernel", 32U * artifact.warps, artifact.shared);
}

} // namespace

TargetHistoryAttention::TargetHistoryAttention(float scale, int32_t workspaceRows)
    : mScale(scale)
    , mWorkspaceRows(workspaceRows)
{
}

IPluginCapability* TargetHistoryAttention::getCapabilityInterface(PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* TargetHistoryAttention::clone() noexcept
{
    auto* const made = new TargetHistoryAttention(mScale, mWorkspaceRows);
    made->mSegments = mSegments;
    return made;
}

int32_t TargetHistoryAttention::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded([&] {
        checkCounts(nbInputs, nbOutputs);
        Element element{};
        if (!toElement(inputTypes[0], element) || inputTypes[1] != inputTypes[0] || inputTypes[2] != inputTypes[0])
        {
            throw std::runtime_error("query, key and value must have one type; supported are BF16, HALF, FLOAT");
        }
        for (int32_t i = 3; i < nbInputs; ++i)
        {
            if (inputTypes[i] != typeOf(i))
            {
                throw std::runtime_error(std::string(kINPUT_NAMES[i]) + " must be "
                    + (typeOf(i) == DataType::kINT32 ? "INT32" : "FLOAT") + ": cast it in the network");
            }
        }
        outputTypes[0] = inputTypes[0];
    });
}

int32_t TargetHistoryAttention::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    return guarded([&] {
        checkCounts(nbInputs, nbOutputs);
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            if (inputs[i].nbDims != kRANKS[i])
            {
                throw std::runtime_error(std::string(kINPUT_NAMES[i]) + " has " + std::to_string(inputs[i].nbDims)
                    + " dimensions, expected " + std::to_string(kRANKS[i]));
            }
        }
        outputs[0].nbDims = 3;
        outputs[0].d[0] = inputs[0].d[0];
        outputs[0].d[1] = inputs[0].d[1];
        outputs[0].d[2] = inputs[2].d[2];
    });
}

bool TargetHistoryAttention::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if ((nbInputs != kPLAIN && nbInputs != kINPUTS) || nbOutputs != 1 || inOut[pos].desc.format != TensorFormat::kLINEAR)
    {
        return false;
    }
    if (pos >= 3 && pos < nbInputs)
    {
        return inOut[pos].desc.type == typeOf(pos);
    }
    Element element{};
    if (pos == 0)
    {
        return toElement(inOut[0].desc.type, element)
            && std::any_of(attends().begin(), attends().end(), [&](Attend const& a) { return a.shape.element == element; });
    }
    return inOut[pos].desc.type == inOut[0].desc.type;
}

int32_t TargetHistoryAttention::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) noexcept
{
    return guarded([&] {
        Shape const shape
            = shapeOf(in[0].desc.dims, in[1].desc.dims, in[2].desc.dims, in[0].desc.type, nbInputs > kPLAIN);
        // `desc.dims` has -1 where a dimension is dynamic; `max` then bounds it.
        auto const most = [in](int32_t i) { return in[i].desc.dims.d[0] >= 0 ? in[i].desc.dims : in[i].max; };
        Sizes const sizes = sizesOf(shape, most(0), most(1), most(3));
        // Not of this machine's GPU: an engine may be built for another one, and where there is none.
        int64_t mostRows = 0;
        for (Attend const& candidate : attends())
        {
            if (serves(candidate, shape, std::nullopt))
            {
                mostRows = std::max<int64_t>(mostRows, kMOST_BLOCKS_AT_ONCE * candidate.blockM);
            }
        }
        if (mostRows == 0)
        {
            throw std::runtime_error("no kernel for H=" + std::to_string(shape.heads)
                + " H_k=" + std::to_string(shape.keyHeads) + " D=" + std::to_string(shape.depth)
                + " D_v=" + std::to_string(shape.valueDepth) + " scale=" + std::to_string(mScale)
                + (shape.segments ? " segments; " : "; ") + supported());
        }
        mWorkspaceRows = static_cast<int32_t>(std::min(mostRows, kMAX_PARTS * sizes.targets * shape.heads));
    });
}

size_t TargetHistoryAttention::getWorkspaceSize(
    DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    auto const valueDepth = static_cast<size_t>(inputs[2].desc.dims.d[2]);
    return static_cast<size_t>(mWorkspaceRows) * (valueDepth + 2) * sizeof(float);
}

bool TargetHistoryAttention::serves(Attend const& candidate, Shape const& shape, std::optional<int32_t> sm) const
{
    return candidate.shape == shape && sameScale(candidate.scale, mScale) && candidate.sm == sm.value_or(candidate.sm);
}

Attend const* TargetHistoryAttention::find(Shape const& shape, int32_t sm, int64_t rows, bool tied, bool parts) const
{
    Attend const* best = nullptr;
    for (Attend const& candidate : attends())
    {
        bool const fits = serves(candidate, shape, sm) && candidate.parts == parts && candidate.leastRows <= rows
            && (tied || !candidate.tied);
        auto const order = [](Attend const& a) { return std::make_pair(a.leastRows, a.tied); };
        if (fits && (best == nullptr || order(candidate) > order(*best)))
        {
            best = &candidate;
        }
    }
    return best;
}

int32_t TargetHistoryAttention::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t) noexcept
{
    // Modules are loaded here, not in enqueue, which may be recorded into a CUDA graph.
    return guarded([&] {
        mSegments = nbInputs > kPLAIN;
        Shape const shape = shapeOf(in[0].dims, in[1].dims, in[2].dims, in[0].type, mSegments);
        sizesOf(shape, in[0].dims, in[1].dims, in[3].dims);
        int32_t const sm = artifactSm(currentDevice().sm);
        if (find(shape, sm, 0, false, false) == nullptr)
        {
            throw std::runtime_error("no kernel for this engine on this GPU; " + supported());
        }
        for (Attend const& artifact : attends())
        {
            if (serves(artifact, shape, sm))
            {
                loadAttend(artifact);
            }
        }
        loadCombine(findCombine(shape, sm));
    });
}

int32_t TargetHistoryAttention::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded([&] {
        Shape const shape
            = shapeOf(inputDesc[0].dims, inputDesc[1].dims, inputDesc[2].dims, inputDesc[0].type, mSegments);
        Sizes const sizes = sizesOf(shape, inputDesc[0].dims, inputDesc[1].dims, inputDesc[3].dims);
        auto targets = static_cast<int32_t>(sizes.targets);
        auto tokens = static_cast<int32_t>(sizes.tokens);
        auto requests = static_cast<int32_t>(sizes.requests);
        auto segments = static_cast<int32_t>(inputDesc[5].dims.d[0]);
        int64_t const rows = sizes.targets * shape.heads;
        if (rows == 0 || requests == 0)
        {
            return;
        }
        void const* const pointers[] = {inputs[0], inputs[1], inputs[2], outputs[0]};
        for (void const* pointer : pointers)
        {
            if (reinterpret_cast<uintptr_t>(pointer) % kALIGNMENT != 0)
            {
                throw std::runtime_error("a tensor is not aligned to 16 bytes");
            }
        }

        DeviceInfo const device = currentDevice();
        int32_t const sm = artifactSm(device.sm);
        bool const tied = inputs[1] == inputs[2];
        int64_t const rowsEach = sizes.targets * (shape.heads / shape.keyHeads) / requests;
        Attend const* const whole = find(shape, sm, rowsEach, tied, false);
        Attend const* const inParts = find(shape, sm, rowsEach, tied, true);
        if (whole == nullptr)
        {
            throw std::runtime_error("no kernel for this engine on this GPU; " + supported());
        }

        // Cut each history so that the blocks fill the GPU once: more blocks than run at a time gain nothing.
        int64_t parts = 1;
        if (inParts != nullptr && workspace != nullptr)
        {
            int64_t const blocks = inParts->busyX(targets, requests) * inParts->gridY();
            int64_t const atOnce = int64_t{device.multiprocessors} * loadAttend(*inParts).resident;
            int64_t const tokenBlocks = sizes.tokens / requests / inParts->blockN;
            parts = std::min({atOnce / blocks, tokenBlocks / kLEAST_BLOCKS_A_PART, kMAX_PARTS,
                int64_t{mWorkspaceRows} / rows});
        }

        // Tensor inputs, int32 values, tensor outputs, as the kernel takes them.
        std::array<void const*, kINPUTS> in{};
        int32_t const nbInputs = mSegments ? kINPUTS : kPLAIN;
        std::copy_n(inputs, nbInputs, in.begin());
        std::vector<void*> arguments;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            arguments.push_back(&in[i]);
        }
        arguments.insert(arguments.end(), {&targets, &tokens, &requests});
        if (mSegments)
        {
            arguments.push_back(&segments);
        }
        void* out = outputs[0];
        if (parts < 2)
        {
            arguments.push_back(&out);
            launch(loadAttend(*whole),
                {static_cast<uint32_t>(whole->gridX(targets, requests)), static_cast<uint32_t>(whole->gridY()), 1},
                arguments.data(), stream);
            return;
        }
        auto* partialOut = static_cast<float*>(workspace);
        float* partialStats = partialOut + parts * rows * shape.valueDepth;
        arguments.insert(arguments.end(), {&partialOut, &partialStats});
        launch(loadAttend(*inParts),
            {static_cast<uint32_t>(inParts->gridX(targets, requests)), static_cast<uint32_t>(inParts->gridY()),
                static_cast<uint32_t>(parts)},
            arguments.data(), stream);
        auto nRows = static_cast<int32_t>(rows);
        auto nParts = static_cast<int32_t>(parts);
        void* combineArguments[] = {&partialOut, &partialStats, &nRows, &nParts, &out};
        launch(loadCombine(findCombine(shape, sm)), {static_cast<uint32_t>(rows), 1, 1}, combineArguments, stream);
    });
}

PluginFieldCollection const* TargetHistoryAttention::getFieldsToSerialize() noexcept
{
    mFields = {PluginField("scale", &mScale, PluginFieldType::kFLOAT32, 1),
        PluginField("workspace_rows", &mWorkspaceRows, PluginFieldType::kINT32, 1)};
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    return &mCollection;
}

} // namespace stca
