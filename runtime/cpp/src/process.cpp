#include "process.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <locale>
#include <sstream>
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

/// Processors that a quota and its period allow, whole ones, at the beginning of a text; 0 for any number.
std::int64_t quota_in(std::istream& text) {
  std::int64_t most = 0, period = 0;
  if (!(text >> most >> period) || most < 1 || period < 1) return 0;  // no such file, or "max"
  return (most - 1) / period + 1;
}

std::string contents(const std::string& path) {
  const std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

/// The quota of the group at `path`, which begins with a slash or is empty.
std::int64_t quota_of(const std::string& mount, bool second_version, const std::string& path) {
  const std::string group = mount + path + "/";
  std::istringstream text(second_version ? contents(group + "cpu.max")
                                         : contents(group + "cpu.cfs_quota_us") + " " + contents(group + "cpu.cfs_period_us"));
  text.imbue(std::locale::classic());
  return quota_in(text);
}

}  // namespace

std::uint64_t process_number() {
  // Asking the system each time would cost a request a tenth of its time.
  static const int watching = ::pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  return watching == 0 ? forks.load(std::memory_order_relaxed) : 0;
}

int processors(const std::string& root) {
  std::int64_t least = std::max(1, bound_processors());
  const std::string mount = root + "/sys/fs/cgroup";
  // In a container the paths may be the host's; its own group is then at the root of what is mounted, as without paths.
  std::istringstream groups("0::/\n" + contents(root + "/proc/self/cgroup"));
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first == std::string::npos ? first : first + 1);
    if (second == std::string::npos) continue;
    const bool second_version = line.substr(0, first) == "0";
    const std::string kinds = "," + line.substr(first + 1, second - first - 1) + ",";
    if (!second_version && kinds.find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    for (bool outermost = false; !outermost;) {  // a group, and those around it
      while (!path.empty() && path.back() == '/') path.pop_back();
      outermost = path.empty();
      const std::int64_t quota = quota_of(second_version ? mount : mount + "/cpu", second_version, path);
      if (quota > 0) least = std::min(least, quota);
      path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
    }
  }
  return static_cast<int>(least);
}

}  // namespace stca::core
