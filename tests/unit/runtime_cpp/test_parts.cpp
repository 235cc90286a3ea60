// JSON, SHA-256, tensors and the state cache, each on its own.
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>

#include "check.hpp"
#include "json.hpp"
#include "sha256.hpp"
#include "state.hpp"
#include "tensor.hpp"
#include "visit.hpp"

using namespace stca::core;

TEST(json_reads_every_kind_of_value) {
  const Json json =
      Json::parse(R"( {"a": [1, -2, true, false, null], "b": {"c": "d"}, "e": 1.5e1, "f": -0, "g": []} )");
  const Json::List& list = *json.find("a")->list();
  CHECK_EQUAL(list.size(), 5u);
  CHECK_EQUAL(*list[0].integer(), 1);
  CHECK_EQUAL(*list[1].integer(), -2);
  CHECK(*list[2].boolean() && !*list[3].boolean() && list[4].is_null());
  CHECK_EQUAL(*json.find("b")->find("c")->string(), "d");
  double number = 0;
  CHECK(json.find("e")->number(number) && number == 15.0);
  CHECK(json.find("e")->integer() == nullptr);
  CHECK_EQUAL(*json.find("f")->integer(), 0);
  CHECK(json.find("g")->list()->empty());
  CHECK(json.find("nothing") == nullptr && list[0].find("a") == nullptr);
}

TEST(json_reads_strings) {
  CHECK_EQUAL(*Json::parse(R"("\"\\\/\b\f\n\r\t")").string(), "\"\\/\b\f\n\r\t");
  CHECK_EQUAL(*Json::parse(R"("\u0041\u00e9\u20AC\uD83D\uDE00")").string(), "A\u00e9\u20ac\U0001F600");
  CHECK_EQUAL(*Json::parse("\"\u00e9\u20ac\U0001F600\"").string(), "\u00e9\u20ac\U0001F600");
  CHECK_EQUAL(Json::parse(R"("\u0000")").string()->size(), 1u);
}

TEST(json_keeps_64_bits) {
  CHECK_EQUAL(*Json::parse("9223372036854775807").integer(), std::numeric_limits<std::int64_t>::max());
  CHECK_EQUAL(*Json::parse("-9223372036854775808").integer(), std::numeric_limits<std::int64_t>::min());
  CHECK(Json::parse("9223372036854775808").integer() == nullptr);
}

TEST(json_refuses_what_is_not_json) {
  const std::vector<std::string> texts = {"",
                                          " ",
                                          "{",
                                          "}",
                                          "[",
                                          "[1,]",
                                          "{\"a\":1,}",
                                          "{\"a\"}",
                                          "{a:1}",
                                          "{\"a\":1 \"b\":2}",
                                          "01",
                                          "+1",
                                          "1.",
                                          ".5",
                                          "1e",
                                          "-",
                                          "NaN",
                                          "Infinity",
                                          "tru",
                                          "nul",
                                          "'a'",
                                          "\"a",
                                          "\"\\x\"",
                                          "\"\\u12\"",
                                          "\"\\u12G4\"",
                                          "\"\\ud800\"",
                                          "\"\\ud800\\u0041\"",
                                          "\"\\udc00\"",
                                          "\"\n\"",
                                          "1 2",
                                          "[1] x",
                                          "\"\x80\"",
                                          "\"\xc0\xaf\"",
                                          "\"\xed\xa0\x80\"",
                                          "\"\xf4\x90\x80\x80\"",
                                          "\"\xe2\x82\"",
                                          "/* */ 1",
                                          "{\"a\":1,\"a\":2}",
                                          "\xef\xbb\xbf{}",
                                          std::string("1\0", 2)};
  for (const std::string& text : texts) CHECK_THROWS(Json::parse(text), JsonError, " at byte ");
}

TEST(json_bounds_its_depth) {
  const auto nested = [](int depth) {
    return std::string(static_cast<std::size_t>(depth), '[') + std::string(static_cast<std::size_t>(depth), ']');
  };
  CHECK(Json::parse(nested(60)).list() != nullptr);
  CHECK_THROWS(Json::parse(nested(70)), JsonError, "deep");
  CHECK_THROWS(Json::parse(std::string(1 << 20, '[')), JsonError, "deep");
}

TEST(sha256_of_the_standards_examples) {
  const auto digest = [](const std::string& text) {
    Sha256 sha;
    sha.update(text);
    return sha.hex();
  };
  CHECK_EQUAL(digest(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK_EQUAL(digest("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_EQUAL(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK_EQUAL(digest(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(sha256_does_not_depend_on_the_pieces) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  for (std::size_t length : {0u, 1u, 55u, 56u, 63u, 64u, 65u, 119u, 120u, 128u, 300u}) {
    Sha256 whole, pieces;
    whole.update(text.data(), length);
    for (std::size_t i = 0; i < length; i += 7) pieces.update(text.data() + i, std::min<std::size_t>(7, length - i));
    CHECK_EQUAL(pieces.hex(), whole.hex());
  }
}

TEST(sha256_of_a_file) {
  const check::TemporaryFolder folder;
  std::ofstream(folder.path() / "a") << "abc";
  CHECK_EQUAL(sha256_of(folder.path() / "a"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_THROWS(sha256_of(folder.path() / "b"), std::ios_base::failure, "opened");
}

TEST(tensor_small_floats_round_to_nearest_even) {
  const auto half = [](double x) { return Float16::from(x).bits; };
  CHECK_EQUAL(half(0.0), 0x0000);
  CHECK_EQUAL(half(-0.0), 0x8000);
  CHECK_EQUAL(half(1.0), 0x3c00);
  CHECK_EQUAL(half(-2.5), 0xc100);
  CHECK_EQUAL(half(65504.0), 0x7bff);
  CHECK_EQUAL(half(65519.9), 0x7bff);
  CHECK_EQUAL(half(65520.0), 0x7c00);
  CHECK_EQUAL(half(1e300), 0x7c00);
  CHECK_EQUAL(half(std::ldexp(1, -24)), 0x0001);
  CHECK_EQUAL(half(std::ldexp(1, -25)), 0x0000);  // a tie, to even
  CHECK_EQUAL(half(std::ldexp(3, -25)), 0x0002);  // a tie, to even
  CHECK_EQUAL(half(1.0 + std::ldexp(1, -11)), 0x3c00);
  CHECK_EQUAL(half(1.0 + std::ldexp(3, -11)), 0x3c02);
  CHECK_EQUAL(half(std::ldexp(2047.5, -25)),
              0x0400);  // rounds up into the normal numbers
  CHECK_EQUAL(BFloat16::from(1.0).bits, 0x3f80);
  CHECK_EQUAL(BFloat16::from(-3.140625).bits, 0xc049);
  CHECK(std::isnan(static_cast<double>(Float16::from(std::nan("")))));
  for (int bits = 0; bits < 0x10000; ++bits) {  // every one survives the way through double
    const Float16 f{static_cast<std::uint16_t>(bits)};
    const BFloat16 b{static_cast<std::uint16_t>(bits)};
    if (!std::isnan(static_cast<double>(f))) CHECK_EQUAL(Float16::from(static_cast<double>(f)).bits, f.bits);
    if (!std::isnan(static_cast<double>(b))) CHECK_EQUAL(BFloat16::from(static_cast<double>(b)).bits, b.bits);
  }
}

TEST(tensor_rows_and_concatenation) {
  const std::vector<std::int32_t> values = {1, 2, 3, 4, 5, 6};
  const Array array{STCA_INT32, {3, 2}, values.data(), nullptr, false};
  const Array last = rows(array, 2, 3), none = rows(array, 3, 3);
  const Array joined = concatenate(Memory::host(), "x", {&last, &none, &array});
  CHECK_EQUAL(joined.shape.text(), "[4, 2]");
  const std::vector<std::int32_t> expected = {5, 6, 1, 2, 3, 4, 5, 6};
  CHECK(std::memcmp(joined.data, expected.data(), joined.bytes()) == 0);
  const Array narrow{STCA_INT32, {3, 1}, values.data(), nullptr, false};
  CHECK_THROWS(concatenate(Memory::host(), "x", {&array, &narrow}), std::runtime_error, "x: has rows of shape [3, 1]");
}

namespace {

StateCache::State state_of(std::int64_t tokens) {
  UserState state;
  state.tokens = tokens;
  state.tensors.push_back(make_array(Memory::host(), STCA_FLOAT32, {tokens}).array);
  return std::make_shared<const UserState>(std::move(state));
}

const auto kind = std::make_shared<StateKind>(StateKind{"weights", "format"});
StateKey key_of(const std::string& user, const std::string& version = "v1") { return {user, version, kind}; }

}  // namespace

TEST(cache_finds_only_the_exact_key) {
  StateCache cache(1000);
  CHECK(cache.put(key_of("ann"), state_of(5)));
  CHECK(cache.get(key_of("ann")) != nullptr);
  CHECK(cache.get(key_of("ann", "v2")) == nullptr);
  CHECK(cache.get(key_of("bob")) == nullptr);
  CHECK(cache.get({"ann", "v1", std::make_shared<StateKind>(StateKind{"other", "format"})}) == nullptr);
  CHECK(cache.get({"ann", "v1", std::make_shared<StateKind>(StateKind{"weights", "format"})}) != nullptr);
  const stca_cache_stats stats = cache.stats();
  CHECK_EQUAL(stats.hits, 2u);
  CHECK_EQUAL(stats.misses, 3u);
  CHECK_EQUAL(stats.bytes, 20u);
}

TEST(cache_keeps_within_its_budget) {
  StateCache cache(100);
  for (int i = 0; i < 50; ++i) {
    CHECK(cache.put(key_of(std::to_string(i % 7)), state_of(i % 11)));
    CHECK(cache.stats().bytes <= 100);
  }
  CHECK(!cache.put(key_of("big"), state_of(26)));
  CHECK_EQUAL(cache.stats().refused, 1u);
  // A state that is refused still replaces what the user had: that was of an
  // older history.
  CHECK(cache.put(key_of("big"), state_of(25)));
  CHECK_EQUAL(cache.stats().users, 1u);
  CHECK(!cache.put(key_of("big"), state_of(26)));
  CHECK_EQUAL(cache.stats().users, 0u);
  CHECK_EQUAL(cache.stats().bytes, 0u);
}

TEST(cache_leaves_states_in_use_whole) {
  StateCache cache(1000);
  cache.put(key_of("ann"), state_of(5));
  const StateCache::State held = cache.get(key_of("ann"));
  CHECK(cache.forget("ann"));
  CHECK(!cache.forget("ann"));
  cache.clear();
  CHECK_EQUAL(held->tensors[0].bytes(), 20u);
  std::memset(const_cast<void*>(held->tensors[0].data), 0, 20);
}
