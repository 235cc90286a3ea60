// Why users have no state: remembered of those who went last, in a table of one size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace stca::core {

/// How a request came by its user's state: it was kept or being made already, or else why it is made anew.
enum class Came { memory, joined, new_user, version, expired, evicted, weights, too_large, file, damaged };
inline constexpr std::size_t came_count = 10;

/// Of those who are here a hash is kept and no name; whoever shares a place with a later one is taken for new.
class Gone {
 public:
  /// Remember why the user's state went.
  void note(const std::string& user, Came reason) {
    const Mark mark = of(user);
    table_[mark.place] = static_cast<std::uint64_t>(reason) << hash_bits | mark.hash;
  }
  /// The reason noted last, `new_user` where there is none.
  Came why(const std::string& user) const {
    const Mark mark = of(user);
    const std::uint64_t found = table_[mark.place];
    const bool known = found != 0 && (found & low_bits) == mark.hash;
    return known ? static_cast<Came>(found >> hash_bits) : Came::new_user;
  }
  /// The user was never here.
  void forget(const std::string& user) {
    const Mark mark = of(user);
    if ((table_[mark.place] & low_bits) == mark.hash) table_[mark.place] = 0;
  }

 private:
  static constexpr std::size_t places = std::size_t{1} << 13;
  static constexpr int hash_bits = 56;
  static constexpr std::uint64_t low_bits = (std::uint64_t{1} << hash_bits) - 1;

  struct Mark {
    std::size_t place;
    std::uint64_t hash;
  };
  static Mark of(const std::string& user) {
    const std::uint64_t hash = std::hash<std::string>{}(user);
    return {static_cast<std::size_t>(hash % places), (hash >> 7) & low_bits};
  }

  std::vector<std::uint64_t> table_ = std::vector<std::uint64_t>(places);
};

}  // namespace stca::core
