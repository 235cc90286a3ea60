// How failures are told: TensorRT takes no exceptions, so they are logged and answered with -1.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

namespace stca
{

//! An error in TensorRT's own log, where it gave one that this library can speak to; else on stderr.
void log(std::string const& message) noexcept;

//! Run `body`, which answers 0; log what it throws and answer -1.
template <typename Body>
int32_t guarded(Body&& body) noexcept
{
    try
    {
        body();
        return 0;
    }
    catch (std::exception const& error)
    {
        log(error.what());
        return -1;
    }
}

} // namespace stca
