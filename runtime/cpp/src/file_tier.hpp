// States in files of one folder: written behind the requests' back, read where memory has a state no more. A file is put
// in place whole, and its digest is held against every byte before it is used: after a crash a record is whole or
// discarded. One session at a time has the folder.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>

#include "record.hpp"
#include "state.hpp"

namespace stca::core {

/// What a folder of states holds and did, as Python's `FileStats` tells.
struct FileStats {
  std::uint64_t users = 0, bytes = 0, budget = 0, reads = 0, writes = 0, written_bytes = 0, evictions = 0, expired = 0,
                skipped = 0, discarded = 0, failed = 0, waiting = 0;
  double read_seconds = 0;
};

/// A folder of states, least recently used out first. Safe to share between threads.
class FileTier {
 public:
  using State = StateCache::State;
  /// A user's state in memory.
  using Fetch = std::function<std::optional<StateCache::Aged>(const std::string& user)>;
  /// Seconds since 1970.
  using Clock = std::function<double()>;

  /// `folder` is made if need be, and is this object's alone. `budget`: most bytes of all records; `seconds`: how long a
  /// state is kept after it was made, 0 for ever. Throws UsageError when the folder cannot be used, or another has it.
  FileTier(std::filesystem::path folder, std::uint64_t budget, double seconds, Fetch fetch, Clock clock = now);
  FileTier(const FileTier&) = delete;
  FileTier& operator=(const FileTier&) = delete;
  /// Writes what waits, for a few seconds at most, and lets go of the folder. The records stay.
  ~FileTier();

  /// Keeps states of this kind, and discards all others.
  void serve(const StateKind& kind);
  /// Writes the user's state, when there is time.
  void offer(const std::string& user);
  /// Bytes of the user's record, of whatever version where that is null; nothing where there is none.
  std::optional<std::uint64_t> bytes_of(const std::string& user, const char* version = nullptr);
  /// The state with exactly this key, and whether there was one that was damaged. `keep` is told of the state and the
  /// seconds since it was made, and of the call that made it, unless its user was forgotten meanwhile.
  std::pair<State, bool> read(const StateKey& key,
                              const std::function<void(const State&, double, std::uint64_t)>& keep);
  /// Removes the user's record, and writes none that is under way; false when there was none.
  bool forget(const std::string& user);
  /// Counters and sizes, taken at one moment.
  FileStats stats();

 private:
  struct Record {
    std::string name, version;
    std::uint64_t bytes;
    double born;
    std::uint64_t call;  // which made the state; 0 where that was before this session
  };
  using Records = std::list<Record>;  // least recently used first

  static double now();
  /// Seconds that only grow.
  static double steady();
  void work();
  void write(const std::string& user, const std::string& name, const std::string& kind);
  std::string name_of(const std::string& user) const { return names_.of({"user", user}); }
  std::string kind_of(const StateKind& kind) const { return names_.of({"kind", kind.weights, kind.format}); }
  std::filesystem::path path(const std::string& name, const char* suffix = ".state") const {
    return folder_ / (name + suffix);
  }

  // With the lock held.
  void open();
  void make_room(std::uint64_t size);
  void add(const RecordHeader& header, std::uint64_t size, std::uint64_t call);
  bool remove(const std::string& name);
  void expire(const std::string* asked);
  bool idle() const { return waiting_.empty() && !busy_; }

  const std::filesystem::path folder_;
  const std::uint64_t budget_;
  const double seconds_;
  const Fetch fetch_;
  const Clock clock_;
  int descriptor_ = -1;
  RecordNames names_{""};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string kind_, writing_;  // the name being written, empty too once that record is unwanted
  Records records_;
  std::unordered_map<std::string, Records::iterator> by_name_;
  std::list<std::string> waiting_;  // users, who waits longest first
  FileStats done_;
  bool busy_ = false, closed_ = false;
  double swept_;
  std::thread thread_;
};

}  // namespace stca::core
