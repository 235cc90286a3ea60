// SHA-256 for the digests of a bundle's files, and SHA-1 for those that name histories, where speed matters and
// nobody's safety rests on it (both FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace stca::core {

/// A digest of blocks of 64 bytes, whose state is so many words. `Block` takes one block into the state.
template <std::size_t Words, void (*Block)(std::array<std::uint32_t, Words>&, const unsigned char*)>
class BlockDigest {
 public:
  explicit BlockDigest(const std::array<std::uint32_t, Words>& initial) : state_(initial) {}

  void update(std::string_view text) { update(text.data(), text.size()); }
  void update(const void* data, std::size_t size) {
    const auto* from = static_cast<const unsigned char*>(data);
    size_ += size;
    while (size > 0) {
      if (pending_size_ == 0 && size >= 64) {
        Block(state_, from);
        from += 64, size -= 64;
        continue;
      }
      const std::size_t n = size < 64 - pending_size_ ? size : 64 - pending_size_;
      std::memcpy(pending_.data() + pending_size_, from, n);
      from += n, size -= n;
      if ((pending_size_ += n) < 64) continue;
      Block(state_, pending_.data());
      pending_size_ = 0;
    }
  }

  /// The digest in lower-case hex; the object is spent.
  std::string hex() {
    const std::uint64_t bits = size_ * 8;
    const unsigned char padding[64] = {0x80};
    update(padding, pending_size_ < 56 ? 56 - pending_size_ : 120 - pending_size_);
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    update(length, 8);
    std::string text;
    for (const std::uint32_t word : state_) {
      for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[(word >> shift) & 15];
    }
    return text;
  }

 private:
  std::array<std::uint32_t, Words> state_;
  std::array<unsigned char, 64> pending_{};
  std::size_t pending_size_ = 0;
  std::uint64_t size_ = 0;
};

void sha256_block(std::array<std::uint32_t, 8>& state, const unsigned char* data);
void sha1_block(std::array<std::uint32_t, 5>& state, const unsigned char* data);

struct Sha256 : BlockDigest<8, sha256_block> {
  Sha256()
      : BlockDigest({0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}) {}
};

struct Sha1 : BlockDigest<5, sha1_block> {
  Sha1() : BlockDigest({0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0}) {}
};

}  // namespace stca::core
