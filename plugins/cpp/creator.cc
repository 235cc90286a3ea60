#include "log.h"
#include "plugin.h"

#include <cmath>
#include <stdexcept>

using namespace nvinfer1;

namespace stca
{

TargetHistoryAttentionCreator::TargetHistoryAttentionCreator()
    : mFields{PluginField("scale", nullptr, PluginFieldType::kFLOAT32, 1)}
    , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
{
}

IPluginV3* TargetHistoryAttentionCreator::createPlugin(
    char const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept
{
    TargetHistoryAttention* plugin = nullptr;
    guarded([&] {
        float scale = NAN;
        int32_t workspaceRows = 0;
        for (int32_t i = 0; i < fields->nbFields; ++i)
        {
            PluginField const& field = fields->fields[i];
            std::string const name = field.name;
            if (name == "scale" && field.type == PluginFieldType::kFLOAT32 && field.length == 1)
            {
                scale = *static_cast<float const*>(field.data);
            }
            else if (name == "workspace_rows" && field.type == PluginFieldType::kINT32 && field.length == 1)
            {
                workspaceRows = *static_cast<int32_t const*>(field.data);
            }
            else
            {
                throw std::runtime_error("field " + name + " is unknown or of the wrong type; expected float scale");
            }
        }
        if (!std::isfinite(scale) || workspaceRows < 0)
        {
            throw std::runtime_error("the node needs a finite attribute scale");
        }
        plugin = new TargetHistoryAttention(scale, workspaceRows);
    });
    return plugin;
}

PluginFieldCollection const* TargetHistoryAttentionCreator::getFieldNames() noexcept
{
    return &mCollection;
}

char const* TargetHistoryAttentionCreator::getPluginName() const noexcept
{
    return kNAME;
}

char const* TargetHistoryAttentionCreator::getPluginVersion() const noexcept
{
    return kVERSION;
}

char const* TargetHistoryAttentionCreator::getPluginNamespace() const noexcept
{
    return kNAMESPACE;
}

} // namespace stca

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static stca::TargetHistoryAttentionCreator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    nbCreators = 1;
    return creators;
}
