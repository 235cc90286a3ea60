#include "record.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <random>
#include <system_error>

#include "digest.hpp"
#include "json.hpp"
#include "text.hpp"

namespace stca::core {
namespace {

constexpr std::string_view magic = "stca user state 1\n";
constexpr std::size_t digest_bytes = 32, prefix_bytes = magic.size() + digest_bytes + 4, key_bytes = 32;
constexpr std::uint32_t longest_header = 1 << 20;

[[noreturn]] void failed(const std::string& what) { throw RecordError(what); }
[[noreturn]] void failed_call() { failed(std::error_code(errno, std::generic_category()).message()); }

/// A file, open as long as this lives.
class File {
 public:
  File(const std::filesystem::path& path, int flags) : descriptor_(::open(path.c_str(), flags | O_CLOEXEC, 0600)) {
    if (descriptor_ < 0) failed_call();
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { ::close(descriptor_); }

  void write(const void* data, std::size_t size) const {
    const auto* from = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t done = ::write(descriptor_, from, size);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) failed_call();
      from += done, size -= static_cast<std::size_t>(done);
    }
  }
  void read(void* data, std::size_t size) const {
    auto* to = static_cast<char*>(data);
    while (size > 0) {
      const ssize_t done = ::read(descriptor_, to, size);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) failed_call();
      if (done == 0) failed("it ends early");
      to += done, size -= static_cast<std::size_t>(done);
    }
  }
  std::uint64_t size() const {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) failed_call();
    return static_cast<std::uint64_t>(status.st_size);
  }

 private:
  int descriptor_;
};

std::string bytes_of_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

template <class Text>
const Text& given(const Text* member) {
  if (member == nullptr) failed("its header cannot be read");
  return *member;
}

/// The header's text, what it says, and tensors without their bytes.
struct Opened {
  std::string text, digest;
  RecordHeader header;
  UserState state;
};

Opened parsed(std::string text, std::string digest) {
  Opened found{std::move(text), std::move(digest), {}, {}};
  try {
    const Json json = Json::parse(found.text);
    const auto text_of = [&](const char* name) { return given(given(json.find(name)).string()); };
    found.header = {text_of("user"), text_of("version"), text_of("kind"), 0};
    if (!given(json.find("born")).number(found.header.born)) failed("its header cannot be read");
    found.state.tokens = given(given(json.find("tokens")).integer());
    if (const Json& history = given(json.find("history")); !history.is_null()) found.state.history = given(history.string());
    for (const Json& tensor : given(given(json.find("tensors")).list())) {
      Array array;
      if (!dtype_from_name(given(given(tensor.find("dtype")).string()), array.dtype)) failed("a tensor of no known type");
      for (const Json& size : given(given(tensor.find("shape")).list())) {
        if (array.shape.rank == STCA_MAX_RANK) failed("a tensor of too many axes");
        array.shape[array.shape.rank++] = given(size.integer());
      }
      if (!array.shape.addressable(item_bytes(array.dtype))) failed("a tensor of no size");
      found.state.tensors.push_back(array);
    }
  } catch (const JsonError&) {
    failed("its header cannot be read");
  }
  return found;
}

Opened opened(const File& file) {
  std::array<char, prefix_bytes> prefix;
  file.read(prefix.data(), prefix.size());
  std::uint32_t length = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    length |= static_cast<std::uint32_t>(static_cast<unsigned char>(prefix[prefix_bytes - 4 + i])) << (8 * i);
  }
  if (std::string_view(prefix.data(), magic.size()) != magic || length > longest_header) {
    failed("it is no user state of this version");
  }
  std::string text(length, '\0');
  file.read(text.data(), text.size());
  Opened found = parsed(std::move(text), std::string(prefix.data() + magic.size(), digest_bytes));
  const std::uint64_t size = file.size();
  std::uint64_t expected = prefix_bytes + length;
  for (const Array& tensor : found.state.tensors) {
    if (tensor.bytes() > size || (expected += tensor.bytes()) > size) failed("it has another size");
  }
  if (expected != size) failed("it has another size");
  return found;
}

std::string header_text(const RecordHeader& header, const UserState& state) {
  std::string text = R"({"user": ")" + header.user + R"(", "version": ")" + header.version + R"(", "kind": ")" +
                     header.kind + R"(", "born": )" + number_text(header.born) +
                     R"(, "tokens": )" + std::to_string(state.tokens) + R"(, "history": )" +
                     (state.history.empty() ? "null" : '"' + state.history + '"') + R"(, "tensors": [)";
  for (std::size_t i = 0; i < state.tensors.size(); ++i) {
    const Array& tensor = state.tensors[i];
    text += std::string(i == 0 ? "" : ", ") + R"({"name": ")" + std::to_string(i) + R"(", "dtype": ")" +
            dtype_name(tensor.dtype) + R"(", "shape": )" + tensor.shape.text() + "}";
  }
  return text + "]}";
}

}  // namespace

std::uint64_t write_record(const std::filesystem::path& path, const RecordHeader& header, const UserState& state) {
  const std::string text = header_text(header, state);
  Sha256 digest;
  digest.update(text);
  for (const Array& tensor : state.tensors) digest.update(tensor.data, tensor.bytes());
  std::string prefix = std::string(magic) + bytes_of_hex(digest.hex());
  for (int shift = 0; shift < 32; shift += 8) prefix += static_cast<char>((text.size() >> shift) & 255);
  const File file(path, O_WRONLY | O_CREAT | O_TRUNC);
  file.write(prefix.data(), prefix.size());
  file.write(text.data(), text.size());
  for (const Array& tensor : state.tensors) file.write(tensor.data, tensor.bytes());
  return prefix.size() + text.size() + state.bytes();
}

RecordHeader read_record_header(const std::filesystem::path& path) {
  return opened(File(path, O_RDONLY | O_NOFOLLOW)).header;
}

std::pair<RecordHeader, UserState> read_record(const std::filesystem::path& path) {
  const File file(path, O_RDONLY | O_NOFOLLOW);
  Opened found = opened(file);
  Sha256 digest;
  digest.update(found.text);
  for (Array& tensor : found.state.tensors) {
    auto [array, data] = make_array(Memory::host(), tensor.dtype, tensor.shape);
    file.read(data, array.bytes());
    digest.update(data, array.bytes());
    tensor = array;
  }
  if (bytes_of_hex(digest.hex()) != found.digest) failed("its digest is another");
  return {std::move(found.header), std::move(found.state)};
}

std::string RecordNames::of(std::initializer_list<std::string_view> parts) const {
  const auto padded = [&](char with) {
    std::string block(64, '\0');
    std::copy(key_.begin(), key_.end(), block.begin());
    for (char& c : block) c = static_cast<char>(c ^ with);
    return block;
  };
  Sha256 inner, outer;
  inner.update(padded(0x36));
  for (const std::string_view part : parts) {
    inner.update(std::to_string(part.size()) + ":");
    inner.update(part);
  }
  outer.update(padded(0x5c));
  outer.update(bytes_of_hex(inner.hex()));
  return outer.hex().substr(0, 40);
}

std::string RecordNames::key_of(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "key", fresh = folder / "key.new";
  std::string key(key_bytes, '\0');
  if (std::filesystem::exists(path)) {
    const File file(path, O_RDONLY);
    if (file.size() == key_bytes) {
      file.read(key.data(), key.size());
      return key;
    }
  }
  std::random_device random;  // the system's, where there is one
  for (char& byte : key) byte = static_cast<char>(random() & 255u);
  File(fresh, O_WRONLY | O_CREAT | O_TRUNC).write(key.data(), key.size());
  std::filesystem::rename(fresh, path);
  return key;
}

}  // namespace stca::core
