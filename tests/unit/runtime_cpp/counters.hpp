// A session's counters by their names, as golden files have them.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "stca/runtime.hpp"

namespace check {

inline std::map<std::string, std::uint64_t> counters(const stca::CacheStats& stats) {
  return {
      {"hits", stats.hits},
      {"misses", stats.misses},
      {"evictions", stats.evictions},
      {"refused", stats.refused},
      {"users", stats.users},
      {"bytes", stats.bytes},
      {"budget", stats.budget},
      {"expired", stats.expired},
      {"state_bytes", stats.state_bytes},
      {"warmed", stats.warmed},
      {"appends", stats.appends},
      {"appended_bytes", stats.appended_bytes},
      {"hits_memory", stats.hits_memory},
      {"hits_joined", stats.hits_joined},
      {"misses_new_user", stats.misses_new_user},
      {"misses_version", stats.misses_version},
      {"misses_expired", stats.misses_expired},
      {"misses_evicted", stats.misses_evicted},
      {"misses_weights", stats.misses_weights},
      {"misses_too_large", stats.misses_too_large},
      {"hits_file", stats.hits_file},
      {"misses_damaged", stats.misses_damaged},
      {"file_users", stats.file_users},
      {"file_discarded", stats.file_discarded}};
}

}  // namespace check
