// One user state as a file, in the form of runtime/record.py: a digest over all of it, what it is of, and its tensors'
// bytes. No name is in it: user and version are digests under a key of the folder's own.
#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "state.hpp"

namespace stca::core {

/// A record that cannot be read, is no whole record, or was changed; or one that cannot be written.
class RecordError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What a record is of.
struct RecordHeader {
  std::string user, version, kind;  ///< digests; the kind is that of weights and state format
  double born = 0;                  ///< when the state was made, in seconds since 1970
};

/// Writes a new record and returns its bytes. Throws RecordError; what there is of it then is no record.
std::uint64_t write_record(const std::filesystem::path& path, const RecordHeader& header, const UserState& state);
/// What a record says that it is; its digest is not looked at. Throws RecordError.
RecordHeader read_record_header(const std::filesystem::path& path);
/// A record whose every byte is the one that was written. Throws RecordError.
std::pair<RecordHeader, UserState> read_record(const std::filesystem::path& path);

/// Digests of users and versions under a folder's key: HMAC-SHA256 (RFC 2104), cut to 40 hexadecimal digits.
class RecordNames {
 public:
  explicit RecordNames(std::string key) : key_(std::move(key)) {}
  std::string of(std::initializer_list<std::string_view> parts) const;
  /// 32 random bytes, kept in the folder; made where there are none. Throws RecordError.
  static std::string key_of(const std::filesystem::path& folder);

 private:
  std::string key_;
};

}  // namespace stca::core
