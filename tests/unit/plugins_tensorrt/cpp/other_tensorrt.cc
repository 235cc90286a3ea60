// Stands in for a TensorRT of another major version than the plugin's headers: its finder must not be called.
#include <NvInferRuntime.h>

#include <cstdlib>

namespace
{

class Finder final : public nvinfer1::ILoggerFinder
{
public:
    nvinfer1::ILogger* findLogger() override
    {
        std::abort(); // what another layout of the class does is anybody's guess
    }
};

Finder gFinder;

} // namespace

extern "C" int32_t getInferLibVersion()
{
    return (NV_TENSORRT_MAJOR + 1) * 10000;
}

extern "C" nvinfer1::ILoggerFinder* finder()
{
    return &gFinder;
}
