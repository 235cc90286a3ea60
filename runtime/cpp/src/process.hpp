// Which process this is. A session's threads do not live on in a child that was forked.
#pragma once

#include <cstdint>

namespace stca::core {

/// How often this process was forked from another, counted from the first that asked: another number, another process.
std::uint64_t process_number();

}  // namespace stca::core
