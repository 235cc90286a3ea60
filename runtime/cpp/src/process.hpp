// Which process this is, and what it may use. A session's threads do not live on in a child that was forked.
#pragma once

#include <cstdint>
#include <string>

namespace stca::core {

/// How often this process was forked from another, counted from the first that asked: another number, another process.
std::uint64_t process_number();

/// How many processors this process may run on: those it is bound to, and no more than a container's quota, of which
/// files below `root` tell, of control groups of both versions.
int processors(const std::string& root = "");

}  // namespace stca::core
