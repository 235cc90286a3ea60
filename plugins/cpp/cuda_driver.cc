#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace stca
{
namespace
{

// More than this is granted only after the function's limit is raised.
constexpr uint32_t kDEFAULT_SHARED_LIMIT = 48 * 1024;

// cuda.h renames some functions to newer versions; the names below are what the library exports.
#define STCA_DRIVER_CALLS(CALL)                                                                                         \
    CALL(cuInit, "cuInit", (unsigned int))                                                                              \
    CALL(cuGetErrorName, "cuGetErrorName", (CUresult, char const**))                                                    \
    CALL(cuCtxGetCurrent_, "cuCtxGetCurrent", (CUcontext*))                                                             \
    CALL(cuCtxSetCurrent_, "cuCtxSetCurrent", (CUcontext))                                                              \
    CALL(cuCtxGetDevice_, "cuCtxGetDevice", (CUdevice*))                                                                \
    CALL(cuDevicePrimaryCtxRetain_, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))                                 \
    CALL(cuDeviceGetAttribute_, "cuDeviceGetAttribute", (int*, CUdevice_attribute, CUdevice))                           \
    CALL(cuModuleLoadData_, "cuModuleLoadData", (CUmodule*, void const*))                                               \
    CALL(cuModuleGetFunction_, "cuModuleGetFunction", (CUfunction*, CUmodule, char const*))                             \
    CALL(cuFuncSetAttribute_, "cuFuncSetAttribute", (CUfunction, CUfunction_attribute, int))                            \
    CALL(cuOccupancy_, "cuOccupancyMaxActiveBlocksPerMultiprocessor", (int*, CUfunction, int, size_t))                  \
    CALL(cuLaunchKernel_, "cuLaunchKernel",                                                                             \
        (CUfunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int,  \
            CUstream, void**, void**))

struct Driver
{
#define STCA_MEMBER(member, name, types) CUresult(*member) types{};
    STCA_DRIVER_CALLS(STCA_MEMBER)
#undef STCA_MEMBER

    Driver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            throw std::runtime_error("no NVIDIA driver on this machine (libcuda.so.1 not found)");
        }
#define STCA_LOOK_UP(member, name, types)                                                                               \
    member = reinterpret_cast<CUresult(*) types>(dlsym(library, name));                                                 \
    if (member == nullptr)                                                                                              \
    {                                                                                                                   \
        throw std::runtime_error("the NVIDIA driver has no " name);                                                     \
    }
        STCA_DRIVER_CALLS(STCA_LOOK_UP)
#undef STCA_LOOK_UP
        check(cuInit(0), "cuInit");
    }

    void check(CUresult result, char const* call) const
    {
        if (result != CUDA_SUCCESS)
        {
            char const* name = nullptr;
            cuGetErrorName(result, &name);
            throw std::runtime_error(std::string(call) + " failed: " + (name != nullptr ? name : "unknown error"));
        }
    }
};

Driver const& driver()
{
    static Driver const instance;
    return instance;
}

//! The context TensorRT works in; the device's primary one when none is current.
CUcontext currentContext()
{
    Driver const& cuda = driver();
    CUcontext context = nullptr;
    cuda.check(cuda.cuCtxGetCurrent_(&context), "cuCtxGetCurrent");
    if (context == nullptr)
    {
        cuda.check(cuda.cuDevicePrimaryCtxRetain_(&context, 0), "cuDevicePrimaryCtxRetain");
        cuda.check(cuda.cuCtxSetCurrent_(context), "cuCtxSetCurrent");
    }
    return context;
}

} // namespace

DeviceInfo currentDevice()
{
    Driver const& cuda = driver();
    currentContext();
    CUdevice device = 0;
    cuda.check(cuda.cuCtxGetDevice_(&device), "cuCtxGetDevice");
    auto const attribute = [&](CUdevice_attribute which) {
        int value = 0;
        cuda.check(cuda.cuDeviceGetAttribute_(&value, which, device), "cuDeviceGetAttribute");
        return value;
    };
    return {attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) * 10
            + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)};
}

Kernel load(char const* ptx, char const* name, uint32_t threads, uint32_t shared)
{
    static std::mutex mutex;
    static std::map<std::tuple<CUcontext, char const*>, Kernel> loaded;

    CUcontext const context = currentContext();
    std::lock_guard<std::mutex> const lock(mutex);
    auto const key = std::make_tuple(context, ptx);
    if (auto const found = loaded.find(key); found != loaded.end())
    {
        return found->second;
    }
    Driver const& cuda = driver();
    CUmodule module = nullptr;
    Kernel kernel{nullptr, threads, shared, 0};
    cuda.check(cuda.cuModuleLoadData_(&module, ptx), "cuModuleLoadData");
    cuda.check(cuda.cuModuleGetFunction_(&kernel.function, module, name), "cuModuleGetFunction");
    if (shared > kDEFAULT_SHARED_LIMIT)
    {
        auto const limit = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        cuda.check(cuda.cuFuncSetAttribute_(kernel.function, limit, static_cast<int>(shared)), "cuFuncSetAttribute");
    }
    cuda.check(cuda.cuOccupancy_(&kernel.resident, kernel.function, static_cast<int>(threads), shared), "cuOccupancy");
    loaded.emplace(key, kernel);
    return kernel;
}

void launch(Kernel const& kernel, std::array<uint32_t, 3> const& grid, void** arguments, CUstream stream)
{
    Driver const& cuda = driver();
    cuda.check(cuda.cuLaunchKernel_(kernel.function, grid[0], grid[1], grid[2], kernel.threads, 1, 1, kernel.shared,
                   stream, arguments, nullptr),
        "cuLaunchKernel");
}

} // namespace stca
