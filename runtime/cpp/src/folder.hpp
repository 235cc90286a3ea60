// A bundle's directory and its files, held while others may replace them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace stca::core {

/// A directory, held open: when another is put in its place, the files here remain those of this one.
///
/// Each file that was read is remembered as it was, so that whoever read it a second time, by `path_of`, can be sure to
/// have read the same.
class Folder {
 public:
  /// Throws BundleError when there is no such directory. With `hold`, all its files are read into memory at once, and
  /// served from there until they are let go: what is removed meanwhile is no loss then. Rows of tables are not, which
  /// may be larger than memory.
  explicit Folder(std::filesystem::path path, bool hold = false);
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder();

  /// As it was given.
  const std::filesystem::path& path() const { return path_; }
  /// What lies in it.
  std::vector<std::string> names() const;
  /// Bytes of a plain file; throws BundleError when `name` is another thing, such as a link.
  std::uint64_t size_of(const std::string& name) const;
  /// Calls `take` with the file's bytes, piece by piece.
  void read(const std::string& name, const std::function<void(std::string_view)>& take) const;
  /// Opens a plain file, and remembers it as one that was read; the descriptor is the caller's to close.
  int open(const std::string& name) const;
  /// A path that leads here, wherever this directory is moved, while this object lives.
  const std::string& pinned() const { return pinned_; }
  /// The same for a file of it.
  std::string path_of(const std::string& name) const;

  /// The bytes of a file that is held in memory, else null.
  std::shared_ptr<const std::string> held(const std::string& name) const;
  void let_go() const;

  /// Whether every file that was read is still the one that was read.
  bool intact() const;
  /// Whether `path()` still leads here.
  bool in_place() const;

 private:
  struct Stamp {
    std::uint64_t device, file;
    std::int64_t size, seconds, nanoseconds;
    bool operator==(const Stamp& other) const;
  };
  template <class Stat>
  static Stamp stamp_of(const Stat& status);
  std::vector<std::string> list() const;
  void read_file(const std::string& name, const std::function<void(std::string_view)>& take) const;
  [[noreturn]] void unreadable(const std::string& name, int error) const;

  std::filesystem::path path_;
  std::string pinned_;  // leads here through the open descriptor, or `path_` where there is no /proc
  int descriptor_ = -1;
  bool hold_;
  std::vector<std::string> mapped_;  // files that are not held although others are
  mutable std::mutex mutex_;  // of what follows
  mutable std::map<std::string, std::shared_ptr<const std::string>> held_;
  mutable std::map<std::string, Stamp> stamps_;
};

/// A bundle was replaced again and again while it was read; `path` for the message.
[[noreturn]] void never_at_rest(const std::filesystem::path& path);
/// Waits before the next of several tries to read a bundle that is being replaced; false when there were enough.
bool try_again(int tries);

/// What `use` makes of a folder that did not change meanwhile; when it did, all is done again with what is there then.
/// Where that goes on, and the folder `may_hold` its files, they are read into memory first.
template <class Use>
auto with_folder(const std::filesystem::path& path, bool may_hold, Use&& use) {
  bool at_fault = false;  // what was read last where it lies was wrong, and lay there unchanged
  for (int tries = 0;; ++tries) {
    const bool hold = may_hold && tries >= 3;
    std::shared_ptr<const Folder> folder;
    try {
      folder = std::make_shared<const Folder>(path, hold);
      auto made = use(folder);
      folder->let_go();
      if (hold || folder->intact()) return made;
    } catch (const std::exception&) {
      // Where it is the bundle's fault, and not that of whoever replaced it, it is there to be complained of. A folder that
      // was away for a moment may be back as it was: so what was read out of memory has the last word.
      const bool fault = folder != nullptr && folder->intact() && folder->in_place();
      const bool unread = folder == nullptr && (hold ? at_fault : tries >= 2);
      if (unread || (fault && (hold || !may_hold))) throw;
      at_fault = fault;
    }
    if (!try_again(tries)) never_at_rest(path);
  }
}

}  // namespace stca::core
