// `stca::TargetHistoryAttention` as an IPluginV3 library, for those who want the kernels in a library instead of in the
// engine. One node does the whole operator: with a workspace at hand it cuts the history into parts by itself.
#pragma once

#include "artifacts.h"

#include <NvInferRuntime.h>

#include <optional>
#include <vector>

namespace stca
{

constexpr char const* kNAME = "TargetHistoryAttention";
constexpr char const* kVERSION = "1";
constexpr char const* kNAMESPACE = "stca";

//! Inputs: query (N_t, H, D), key (N_h, H_k, D), value (N_h, H_k, D_v) of one type; target_offsets (B + 1),
//! history_offsets (N_s + 1), history_lengths (N_s) of int32; or these and segment_offsets (B + 1) of int32 and
//! segment_bias (N_s) of float, without which N_s is B. Output: (N_t, H, D_v) of the query's type. Every format is linear.
//! Failures are logged and answered with -1; nothing throws.
class TargetHistoryAttention final : public nvinfer1::IPluginV3,
                                     public nvinfer1::IPluginV3OneCore,
                                     public nvinfer1::IPluginV3OneBuild,
                                     public nvinfer1::IPluginV3OneRuntime
{
public:
    //! \param scale factor on the logits.
    //! \param workspaceRows rows of partial results that the workspace holds; known only once an engine is built.
    TargetHistoryAttention(float scale, int32_t workspaceRows);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override
    {
        return kNAME;
    }

    char const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;

    // IPluginV3OneRuntime
    int32_t setTactic(int32_t) noexcept override
    {
        return 0; // none is offered: TensorRT would time them on offsets that no history has
    }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    //! Which artifacts serve this shape on any SM, or on this one.
    bool serves(Attend const& candidate, Shape const& shape, std::optional<int32_t> sm) const;

    //! The artifact for a launch with so many rows per request and key head; a tied one where there is one as good.
    Attend const* find(Shape const& shape, int32_t sm, int64_t rows, bool tied, bool parts) const;

    float mScale;
    int32_t mWorkspaceRows;
    bool mSegments{false}; //!< as TensorRT last told in onShapeChange; enqueue is not told the number of inputs
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

//! Makes the plugin from an ONNX node's attribute `scale`, or from the fields of a serialized engine.
class TargetHistoryAttentionCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    TargetHistoryAttentionCreator();
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace stca

//! What TensorRT looks up in a plugin library.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators);
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
