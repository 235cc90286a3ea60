// The few driver calls a launch needs, looked up at run time, so that the library loads on a machine without a driver.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace stca
{

//! Current device, as far as launches depend on it.
struct DeviceInfo
{
    int32_t sm;              //!< 90 for compute capability 9.0
    int32_t multiprocessors;
};

//! A kernel loaded into the current context.
struct Kernel
{
    CUfunction function;
    uint32_t threads;
    uint32_t shared;
    int32_t resident; //!< blocks that fit on one multiprocessor
};

//! The device of the current context.
//! \throws std::runtime_error without a driver or a GPU.
DeviceInfo currentDevice();

//! The entry point `name` of `ptx`, loaded once per context and kept: `ptx` must live as long as the process.
//! \throws std::runtime_error with the driver's error.
Kernel load(char const* ptx, char const* name, uint32_t threads, uint32_t shared);

//! Enqueue one launch. `arguments` are addresses of the argument values, in the kernel's order.
//! \throws std::runtime_error with the driver's error.
void launch(Kernel const& kernel, std::array<uint32_t, 3> const& grid, void** arguments, CUstream stream);

} // namespace stca
