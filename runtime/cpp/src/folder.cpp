#include "folder.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>
#include <utility>

#include "error.hpp"

namespace stca::core {
namespace {

/// A file descriptor that is closed with its scope.
struct Descriptor {
  explicit Descriptor(int opened) : number(opened) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }
  int number;
};

/// Whether a file may be a table's rows, by its name.
bool holds_rows(const std::string& name) {
  constexpr std::string_view end = ".rows";
  return name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

bool Folder::Stamp::operator==(const Stamp& other) const {
  return device == other.device && file == other.file && size == other.size && seconds == other.seconds &&
         nanoseconds == other.nanoseconds;
}

template <class Stat>
Folder::Stamp Folder::stamp_of(const Stat& status) {
#ifdef __APPLE__
  const auto& time = status.st_ctimespec;
#else
  // Numbers of removed files are given again, and copies keep the time of their contents: only this one is never set.
  const auto& time = status.st_ctim;
#endif
  return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino),
          static_cast<std::int64_t>(status.st_size), static_cast<std::int64_t>(time.tv_sec),
          static_cast<std::int64_t>(time.tv_nsec)};
}

Folder::Folder(std::filesystem::path path, bool hold)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), hold_(hold) {
  if (descriptor_ < 0) {
    const int error = errno;
    if (error == ENOENT || error == ENOTDIR || error == ENAMETOOLONG || error == ELOOP) {
      bundle_error(shown(path_.string()), ": no such bundle directory; make one with `stca export`");
    }
    bundle_error(shown(path_.string()), ": cannot be read (", reason(error), ")");
  }
  pinned_ = "/proc/self/fd/" + std::to_string(descriptor_);
  struct stat here{};
  struct stat there{};
  const bool same = ::fstat(descriptor_, &here) == 0 && ::stat((pinned_ + "/.").c_str(), &there) == 0 &&
                    here.st_dev == there.st_dev && here.st_ino == there.st_ino;
  if (!same) pinned_ = path_.string();
  if (!hold_) return;
  try {
    for (const std::string& name : list()) {
      if (holds_rows(name)) {
        mapped_.push_back(name);
        continue;
      }
      std::string bytes;
      read_file(name, [&](std::string_view piece) { bytes += piece; });
      held_[name] = std::make_shared<const std::string>(std::move(bytes));
    }
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

Folder::~Folder() { ::close(descriptor_); }

void Folder::unreadable(const std::string& name, int error) const {
  if (error == ELOOP) {  // a pipe, a directory, or links in a circle
    bundle_error(shown(path_.string()), ": ", shown(name),
                 " is not a plain file inside the bundle; copy the bundle again");
  }
  bundle_error(shown(path_.string()), ": ", shown(name), " cannot be read (", reason(error), ")");
}

std::vector<std::string> Folder::names() const {
  const std::lock_guard lock(mutex_);
  if (held_.empty()) return list();
  std::vector<std::string> found = mapped_;
  for (const auto& [name, bytes] : held_) found.push_back(name);
  return found;
}

std::shared_ptr<const std::string> Folder::held(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto found = held_.find(name);
  return found == held_.end() ? nullptr : found->second;
}

void Folder::let_go() const {
  const std::lock_guard lock(mutex_);
  held_.clear();
}

std::vector<std::string> Folder::list() const {
  const int again = ::openat(descriptor_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const listing = again < 0 ? nullptr : ::fdopendir(again);
  if (listing == nullptr) {
    const int error = errno;
    if (again >= 0) ::close(again);
    bundle_error(shown(path_.string()), ": cannot be read (", reason(error), ")");
  }
  const std::unique_ptr<DIR, int (*)(DIR*)> owned(listing, ::closedir);
  std::vector<std::string> found;
  while (const dirent* entry = ::readdir(listing)) {
    const std::string name = entry->d_name;
    // "." and "..", where a mounted volume keeps its versions ("..data"), what file managers show (".DS_Store").
    if (name.front() != '.') found.push_back(name);
  }
  return found;
}

std::uint64_t Folder::size_of(const std::string& name) const {
  if (const auto bytes = held(name)) return bytes->size();
  struct stat status{};
  if (::fstatat(descriptor_, name.c_str(), &status, 0) != 0) unreadable(name, errno);
  if (!S_ISREG(status.st_mode)) unreadable(name, ELOOP);
  return static_cast<std::uint64_t>(status.st_size);
}

void Folder::read(const std::string& name, const std::function<void(std::string_view)>& take) const {
  if (const auto bytes = held(name)) return take(*bytes);
  read_file(name, take);
}

int Folder::open(const std::string& name) const {
  // Without waiting for whoever may be at the other end of a pipe.
  Descriptor file(::openat(descriptor_, name.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  if (file.number < 0) unreadable(name, errno);
  struct stat status{};
  if (::fstat(file.number, &status) != 0) unreadable(name, errno);
  if (!S_ISREG(status.st_mode)) unreadable(name, ELOOP);
  const Stamp stamp = stamp_of(status);
  const std::lock_guard lock(mutex_);
  const auto [known, fresh] = stamps_.emplace(name, stamp);
  if (!fresh && !(known->second == stamp)) bundle_error(shown(path_.string()), ": ", shown(name), " was changed");
  return std::exchange(file.number, -1);
}

void Folder::read_file(const std::string& name, const std::function<void(std::string_view)>& take) const {
  const Descriptor file(open(name));
  struct stat status{};
  if (::fstat(file.number, &status) != 0) unreadable(name, errno);
  std::string piece(static_cast<std::size_t>(std::clamp<std::int64_t>(status.st_size, 1, 1 << 20)), '\0');
  while (true) {
    const ssize_t got = ::read(file.number, piece.data(), piece.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) unreadable(name, errno);
    if (got == 0) return;
    take({piece.data(), static_cast<std::size_t>(got)});
  }
}

std::string Folder::path_of(const std::string& name) const { return pinned_ + "/" + name; }

bool Folder::intact() const {
  const std::lock_guard lock(mutex_);
  for (const auto& [name, stamp] : stamps_) {
    struct stat status{};
    const bool there = ::fstatat(descriptor_, name.c_str(), &status, 0) == 0;
    if (!there || !S_ISREG(status.st_mode) || !(stamp_of(status) == stamp)) return false;
  }
  return pinned_ != path_.string() || in_place();
}

bool Folder::in_place() const {
  struct stat here{};
  struct stat there{};
  return ::fstat(descriptor_, &here) == 0 && ::stat(path_.c_str(), &there) == 0 && here.st_dev == there.st_dev &&
         here.st_ino == there.st_ino;
}

void never_at_rest(const std::filesystem::path& path) {
  bundle_error(shown(path.string()), ": was replaced again and again while it was loaded; load it when it is at rest");
}

bool try_again(int tries) {
  constexpr int most = 200;
  if (tries + 1 >= most) return false;
  std::this_thread::sleep_for(std::chrono::milliseconds(std::min(tries, 5)));
  return true;
}

}  // namespace stca::core
