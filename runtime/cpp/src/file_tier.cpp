#include "file_tier.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <vector>

#include "error.hpp"

namespace stca::core {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view suffix = ".state", fresh_suffix = ".state.new";
/// Users whose states wait to be written; beyond, who waits longest is skipped.
constexpr std::size_t most_waiting = 1024;
/// How often states that are too old are looked for, and how long the last ones may take to be written.
constexpr double sweep_seconds = 60;
constexpr std::chrono::seconds close_seconds{5};

bool ends_with(const std::string& text, std::string_view end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

[[noreturn]] void unusable(const fs::path& folder, const std::string& why) {
  fail(STCA_USAGE_ERROR, "state_folder: ", shown(folder.string()), " cannot be used", why);
}

/// The folder, open and locked.
int opened(const fs::path& folder) {
  std::error_code error;
  if (folder.has_parent_path()) fs::create_directories(folder.parent_path(), error);
  int descriptor = -1;
  if (::mkdir(folder.c_str(), 0700) == 0 || errno == EEXIST) {
    descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  }
  const auto said = [] { return std::error_code(errno, std::generic_category()).message(); };
  if (descriptor < 0) unusable(folder, " (" + said() + "); name a folder of your own");
  if (::flock(descriptor, LOCK_EX | LOCK_NB) == 0) return descriptor;
  const bool taken = errno == EWOULDBLOCK;
  const std::string why = taken ? "another session has it; close that one, or name another folder" : "it fails (" + said() + ")";
  ::close(descriptor);
  unusable(folder, ": " + why);
}

}  // namespace

double FileTier::now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

double FileTier::steady() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

FileTier::FileTier(fs::path folder, std::uint64_t budget, double seconds, Fetch fetch, Clock clock)
    : folder_(std::move(folder)),
      budget_(budget),
      seconds_(seconds),
      fetch_(std::move(fetch)),
      clock_(std::move(clock)),
      descriptor_(opened(folder_)),
      swept_(steady()) {
  done_.budget = budget;
  try {
    names_ = RecordNames(RecordNames::key_of(folder_));
  } catch (const std::exception& e) {
    ::close(descriptor_);
    unusable(folder_, std::string(": it fails (") + e.what() + ")");
  }
}

FileTier::~FileTier() {
  {
    std::unique_lock lock(mutex_);
    if (thread_.joinable()) changed_.wait_for(lock, close_seconds, [&] { return idle(); });
    closed_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  ::close(descriptor_);
}

void FileTier::serve(const StateKind& served) {
  const std::lock_guard lock(mutex_);
  const std::string kind = kind_of(served);
  if (kind == kind_) return;
  kind_ = kind;
  writing_.clear();
  waiting_.clear();
  while (!records_.empty()) {
    remove(std::string(records_.front().name));
    ++done_.discarded;
  }
  if (thread_.joinable()) return;
  open();
  thread_ = std::thread([this] { work(); });
}

void FileTier::open() {
  struct Found {
    fs::file_time_type age;
    RecordHeader header;
    std::uint64_t size;
  };
  std::vector<Found> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, error)) {
    const std::string name = entry.path().filename().string();
    if (ends_with(name, fresh_suffix)) fs::remove(entry.path(), error);
    if (!ends_with(name, suffix)) continue;
    try {
      const RecordHeader header = read_record_header(entry.path());
      if (header.kind == kind_ && header.user + std::string(suffix) == name) {
        found.push_back({entry.last_write_time(), header, entry.file_size()});
        continue;
      }
    } catch (const std::exception&) {  // what cannot be read is no record
    }
    fs::remove(entry.path(), error);
    ++done_.discarded;
  }
  std::stable_sort(found.begin(), found.end(), [](const Found& a, const Found& b) { return a.age < b.age; });
  for (const Found& one : found) add(one.header, one.size, 0);
  expire(nullptr);
  make_room(0);
}

void FileTier::offer(const std::string& user) {
  const std::lock_guard lock(mutex_);
  waiting_.remove(user);
  waiting_.push_back(user);
  if (waiting_.size() > most_waiting) {
    waiting_.pop_front();
    ++done_.skipped;
  }
  changed_.notify_all();
}

std::optional<std::uint64_t> FileTier::bytes_of(const std::string& user, const char* version) {
  const std::string name = name_of(user);
  const std::lock_guard lock(mutex_);
  expire(&name);
  const auto held = by_name_.find(name);
  if (held == by_name_.end()) return std::nullopt;
  if (version != nullptr && held->second->version != names_.of({"version", version})) return std::nullopt;
  return held->second->bytes;
}

std::pair<FileTier::State, bool> FileTier::read(const StateKey& key,
                                                const std::function<void(const State&, double, std::uint64_t)>& keep) {
  const std::string name = name_of(key.user), version = names_.of({"version", key.version});
  std::string kind;
  double born = 0;
  std::uint64_t call = 0;
  const auto same = [&] {
    const auto held = by_name_.find(name);
    return held != by_name_.end() && held->second->version == version && held->second->born == born;
  };
  {
    const std::lock_guard lock(mutex_);
    expire(&name);
    const auto held = by_name_.find(name);
    if (held == by_name_.end() || held->second->version != version || kind_of(*key.kind) != kind_) return {nullptr, false};
    records_.splice(records_.end(), records_, held->second);
    kind = kind_, born = held->second->born, call = held->second->call;
  }
  const double began = steady();
  std::shared_ptr<const UserState> state;
  try {
    auto [header, found] = read_record(path(name));
    if (header.user == name && header.version == version && header.kind == kind && header.born == born) {
      state = std::make_shared<const UserState>(std::move(found));
    }
  } catch (const RecordError&) {
  }
  const std::lock_guard lock(mutex_);
  if (state == nullptr) {  // the record itself, and not one that was replaced or went while it was read
    if (!same()) return {nullptr, false};
    remove(name);
    ++done_.discarded;
    return {nullptr, true};
  }
  ++done_.reads;
  done_.read_seconds += steady() - began;
  if (same()) keep(state, std::max(0.0, clock_() - born), call);
  return {state, false};
}

bool FileTier::forget(const std::string& user) {
  const std::string name = name_of(user);
  const std::lock_guard lock(mutex_);
  waiting_.remove(user);
  if (writing_ == name) writing_.clear();
  return remove(name);
}

FileStats FileTier::stats() {
  const std::lock_guard lock(mutex_);
  expire(nullptr);
  FileStats stats = done_;
  stats.users = records_.size();
  stats.waiting = waiting_.size() + (busy_ ? 1 : 0);
  return stats;
}

void FileTier::work() {
  std::unique_lock lock(mutex_);
  while (!closed_) {
    changed_.wait_for(lock, std::chrono::duration<double>(sweep_seconds), [&] { return !waiting_.empty() || closed_; });
    if (closed_) return;
    expire(nullptr);
    if (waiting_.empty()) continue;
    const std::string user = waiting_.front(), name = name_of(user), kind = kind_;
    waiting_.pop_front();
    writing_ = name, busy_ = true;
    lock.unlock();
    std::error_code error;
    bool failed = false;
    try {
      write(user, name, kind);
    } catch (const std::exception&) {  // no room on the disk, perhaps, or no memory
      fs::remove(path(name, ".state.new"), error);
      failed = true;
    }
    lock.lock();
    if (failed) ++done_.failed;
    writing_.clear(), busy_ = false;
    changed_.notify_all();
  }
}

void FileTier::write(const std::string& user, const std::string& name, const std::string& kind) {
  const std::optional<StateCache::Aged> found = fetch_(user);
  const std::string version = found ? names_.of({"version", found->key.version}) : "";
  {
    const std::lock_guard lock(mutex_);
    const auto held = by_name_.find(name);
    if (held != by_name_.end() && held->second->version == version) return;
    const bool older = found && held != by_name_.end() && held->second->call > found->call;
    if (!found || older || found->state->bytes() >= budget_ || kind_of(*found->key.kind) != kind) {
      ++done_.skipped;
      return;
    }
  }
  const RecordHeader header{name, version, kind, clock_() - found->age};
  const fs::path fresh = path(name, ".state.new");
  const std::uint64_t size = write_record(fresh, header, *found->state);
  std::error_code error;
  const std::lock_guard lock(mutex_);
  if (writing_ != name || closed_ || size > budget_) {  // unwanted meanwhile
    fs::remove(fresh, error);
    ++done_.skipped;
    return;
  }
  remove(name);
  make_room(size);
  fs::rename(fresh, path(name));
  add(header, size, found->call);
  ++done_.writes;
  done_.written_bytes += size;
}

void FileTier::make_room(std::uint64_t size) {
  while (!records_.empty() && done_.bytes + size > budget_) {
    remove(std::string(records_.front().name));
    ++done_.evictions;
  }
}

void FileTier::add(const RecordHeader& header, std::uint64_t size, std::uint64_t call) {
  records_.push_back({header.user, header.version, size, header.born, call});
  by_name_[header.user] = std::prev(records_.end());
  done_.bytes += size;
}

bool FileTier::remove(const std::string& name) {
  const auto held = by_name_.find(name);
  if (held == by_name_.end()) return false;
  done_.bytes -= held->second->bytes;
  std::error_code error;
  fs::remove(path(name), error);
  records_.erase(held->second);
  by_name_.erase(held);
  return true;
}

void FileTier::expire(const std::string* asked) {
  if (seconds_ <= 0) return;
  const double time = clock_();
  std::vector<std::string> old;
  const auto look = [&](const Record& record) {
    if (record.born + seconds_ <= time) old.push_back(record.name);
  };
  if (asked == nullptr || steady() - swept_ > sweep_seconds) {
    swept_ = steady();
    for (const Record& record : records_) look(record);
  } else if (const auto held = by_name_.find(*asked); held != by_name_.end()) {
    look(*held->second);
  }
  for (const std::string& name : old) {
    remove(name);
    ++done_.expired;
  }
}

}  // namespace stca::core
