// A stand-in for libcuda.so.1 that launches nothing: it checks the calls a launch consists of and prints each launch.
// It reads the number and types of a kernel's parameters from its PTX, as the real driver does.
#include <cuda.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace
{

struct Entry
{
    std::string name;
    std::vector<bool> isPointer;
};

std::map<CUfunction, Entry> gEntries;

//! Environment variable `name` as a number, or `otherwise`.
int setting(char const* name, int otherwise)
{
    char const* const value = std::getenv(name);
    return value != nullptr ? std::atoi(value) : otherwise;
}

} // namespace

#undef cuCtxGetDevice
#undef cuDevicePrimaryCtxRetain

extern "C"
{

CUresult cuInit(unsigned int)
{
    return CUDA_SUCCESS;
}

//! How NVIDIA's Python bindings find every function; what is not in this file they take for missing.
CUresult cuGetProcAddress_v2(
    char const* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status)
{
    static void* const self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(self, name);
    if (status != nullptr)
    {
        *status = *function != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    }
    return *function != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuDriverGetVersion(int* version)
{
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int)
{
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult, char const** name)
{
    *name = "CUDA_ERROR_INVALID_PTX";
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context)
{
    static int one;
    *context = reinterpret_cast<CUcontext>(&one);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext)
{
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice)
{
    return cuCtxGetCurrent(context);
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice)
{
    int const sm = setting("RECORDING_SM", 90);
    switch (attribute)
    {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = sm / 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = sm % 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = setting("RECORDING_MULTIPROCESSORS", 132); return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
    return std::strstr(static_cast<char const*>(image), ".entry") != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_PTX;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name)
{
    auto const* const ptx = reinterpret_cast<char const*>(module);
    char const* at = std::strstr(ptx, (std::string(".entry ") + name + "(").c_str());
    if (at == nullptr)
    {
        return CUDA_ERROR_NOT_FOUND;
    }
    Entry entry{name, {}};
    char const* const end = std::strchr(std::strchr(at, '('), ')');
    for (at = std::strstr(at, ".param "); at != nullptr && at < end; at = std::strstr(at + 1, ".param "))
    {
        entry.isPointer.push_back(std::strncmp(at, ".param .u64", 11) == 0);
    }
    *function = reinterpret_cast<CUfunction>(module);
    gEntries[*function] = entry;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int)
{
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t)
{
    *blocks = setting("RECORDING_RESIDENT", 2);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned int gridX, unsigned int gridY, unsigned int gridZ,
    unsigned int blockX, unsigned int blockY, unsigned int blockZ, unsigned int shared, CUstream, void** arguments, void**)
{
    Entry const& entry = gEntries.at(function);
    std::printf("launch %s grid=%u,%u,%u block=%u,%u,%u shared=%u arguments=", entry.name.c_str(), gridX, gridY, gridZ,
        blockX, blockY, blockZ, shared);
    for (size_t i = 0; i < entry.isPointer.size(); ++i)
    {
        long long const value = entry.isPointer[i] ? *static_cast<long long*>(arguments[i]) : *static_cast<int*>(arguments[i]);
        std::printf("%s%s%lld", i == 0 ? "" : ",", entry.isPointer[i] ? "p" : "", value);
    }
    std::printf("\n");
    std::fflush(stdout);
    return CUDA_SUCCESS;
}

} // extern "C"
