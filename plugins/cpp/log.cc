#include "log.h"

#include "plugin.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>

using namespace nvinfer1;

namespace stca
{
namespace
{

std::atomic<ILoggerFinder*> gLoggerFinder{nullptr};

//! Whether the finder is laid out as in our headers: with TensorRT 11 the functions of its class, and of the logger's,
//! changed places. The library that the finder comes from says its version; one that says none is taken to be ours.
bool speaksOurs(ILoggerFinder* finder)
{
    Dl_info from{};
    if (dladdr(*reinterpret_cast<void* const*>(finder), &from) == 0)
    {
        return true;
    }
    void* const library = dlopen(from.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr)
    {
        return true;
    }
    auto const version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    bool const ours = version == nullptr || version() / 10000 == NV_TENSORRT_MAJOR;
    dlclose(library);
    return ours;
}

} // namespace

void log(std::string const& message) noexcept
{
    ILoggerFinder* const finder = gLoggerFinder.load();
    ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    std::string const line = std::string(kNAMESPACE) + "::" + kNAME + ": " + message;
    if (logger != nullptr)
    {
        logger->log(ILogger::Severity::kERROR, line.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

} // namespace stca

extern "C" void setLoggerFinder(ILoggerFinder* finder)
{
    stca::gLoggerFinder.store(finder != nullptr && stca::speaksOurs(finder) ? finder : nullptr);
}
