#include "process.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <locale>
#include <thread>

namespace stca::core {
namespace {

std::atomic<std::uint64_t> forks{0};

int bound_processors() {
#ifdef __linux__
  cpu_set_t bound;
  if (::sched_getaffinity(0, sizeof bound, &bound) == 0) return CPU_COUNT(&bound);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

std::uint64_t process_number() {
  // Asking the system each time would cost a request a tenth of its time.
  static const int watching = ::pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  return watching == 0 ? forks.load(std::memory_order_relaxed) : 0;
}

int processors(const std::string& quota) {
  const int bound = std::max(1, bound_processors());
  std::ifstream file(quota);
  file.imbue(std::locale::classic());
  std::int64_t most = 0, period = 0;
  if (!(file >> most >> period) || most < 1 || period < 1) return bound;  // no such file, or "max"
  return static_cast<int>(std::clamp<std::int64_t>((most - 1) / period + 1, 1, bound));
}

}  // namespace stca::core
