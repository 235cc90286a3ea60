// JSON, SHA-256, tensors and the state cache, each on its own.
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <thread>

#include "check.hpp"
#include "digest.hpp"
#include "error.hpp"
#include "folder.hpp"
#include "json.hpp"
#include "onnxruntime_interface.hpp"
#include "process.hpp"
#include "request.hpp"
#include "state.hpp"
#include "tables.hpp"
#include "tensor.hpp"
#include "values.hpp"
#include "visit.hpp"

using namespace stca::core;

TEST(door_encodes_events_beside_valid_values_of_what_there_is_once_per_user) {
  Manifest manifest = Bundle::load(STCA_GOLDEN "/log")->manifest;
  std::vector<TensorSpec>& inputs = manifest.graphs.find("request")->second.inputs;
  const auto segment = std::find_if(inputs.begin(), inputs.end(), [](auto& spec) { return spec.name == "user_segment"; });
  segment->low = 1, segment->blank = 1;
  const std::int64_t items[] = {4, 5}, actions[] = {1, 0};
  const stca_tensor events[] = {{"history_item", items, STCA_INT64, 1, {2}},
                                {"history_action", actions, STCA_INT64, 1, {2}}};
  Row row;
  Door(manifest, std::nullopt, false, 100).admit_events({events, 2}, "append", true, row);
  const Array& made = row.arrays[static_cast<std::size_t>(segment - inputs.begin())];
  CHECK_EQUAL(made.shape.text(), "[1]");
  CHECK_EQUAL(*static_cast<const std::int64_t*>(made.data), 2);
}

TEST(floats_below_their_least_value_are_refused) {
  TensorSpec spec;
  spec.name = "price", spec.dtype = STCA_FLOAT32, spec.low = 0;
  const float prices[] = {0.0F, 2.0F, -0.5F};
  CHECK_EQUAL(checked(spec, view_of({"price", prices, STCA_FLOAT32, 1, {2}})).shape.text(), "[2]");
  CHECK_THROWS(checked(spec, view_of({"price", prices, STCA_FLOAT32, 1, {3}})), Error,
               "price: holds -0.5 at [2]; it must be at least 0");
}

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

TEST(sha1_names_a_history_as_python_does) {
  Sha1 sha;
  sha.update("abc");
  CHECK_EQUAL(sha.hex(), "a9993e364706816aba3e25717850c26c9cd0d89d");
  Sha1 longer;
  longer.update(std::string(1000000, 'a'));
  CHECK_EQUAL(longer.hex(), "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
}

TEST(folder_whose_table_is_cut_short_while_it_is_mapped) {
  const check::TemporaryFolder place;
  const auto put = [&](const char* name, const std::string& text) {
    std::ofstream(place.path() / name, std::ios::binary) << text;
  };
  const std::string row(4096, '\1');
  put("t.rows", row + row + row);
  put("t.digests", std::string(32, '\0'));  // of a table so small, blocks are checked at load alone
  Bundle bundle;
  bundle.folder = std::make_shared<Folder>(place.path());
  bundle.manifest.tables = {{"t", "t.rows", "t.digests", STCA_FLOAT32, 3, 1024, 4}};
  const auto source = row_sources(bundle, {}).at("t");
  CHECK_EQUAL(source->rows(bundle.manifest.tables[0], {2, 0}).shape[0], 2);
  std::filesystem::resize_file(place.path() / "t.rows", 4096);
  CHECK_THROWS(source->rows(bundle.manifest.tables[0], {2}), Error,
               "t.rows has 4096 bytes, table 't' needs 12288; copy it again");
  put("t.rows", row + row + row);
  CHECK_EQUAL(source->rows(bundle.manifest.tables[0], {2}).shape[0], 1);
}

TEST(folder_stays_the_one_that_was_opened) {
  const check::TemporaryFolder root;
  const auto write = [&](const char* folder, const char* text) {
    std::filesystem::create_directories(root.path() / folder);
    std::ofstream(root.path() / folder / "a") << text;
  };
  write("one", "abc"), write("two", "xyz");
  const Folder folder(root.path() / "one");
  const auto bytes = [](const Folder& from) {
    std::string all;
    from.read("a", [&](std::string_view piece) { all += piece; });
    return all;
  };
  CHECK_EQUAL(bytes(folder), "abc");
  CHECK(folder.intact() && folder.in_place());
  std::filesystem::rename(root.path() / "one", root.path() / "aside");
  std::filesystem::rename(root.path() / "two", root.path() / "one");
  CHECK_EQUAL(bytes(folder), "abc");
  std::ostringstream through;
  through << std::ifstream(folder.path_of("a")).rdbuf();
  CHECK_EQUAL(through.str(), "abc");
  CHECK(folder.intact() && !folder.in_place());
  write("aside", "abcd");
  CHECK(!folder.intact());
  CHECK_THROWS(bytes(folder), Error, "a was changed");
  CHECK_THROWS(Folder(root.path() / "none"), Error, "no such bundle directory");
  std::filesystem::create_symlink("a", root.path() / "one" / "b");
  std::filesystem::create_directory(root.path() / "one" / "..data");
  std::filesystem::create_symlink("..data", root.path() / "one" / "c");
  const Folder links(root.path() / "one");
  CHECK_EQUAL(links.size_of("b"), links.size_of("a"));
  CHECK_EQUAL(bytes(links), bytes(Folder(root.path() / "one")));
  CHECK_THROWS(links.size_of("c"), Error, "c is not a plain file");
  CHECK_EQUAL(links.names().size(), std::size_t{3});
}

TEST(error_is_one_line_that_leaves_room) {
  CHECK_EQUAL(std::string(Error(STCA_ERROR, " a\nb\x1b[1m\x7f").what()), "a b\\x1b[1m\\x7f");
  CHECK_EQUAL(in_quotes("it's \"é\u202e\xff\n"), "'it\\'s \"é\\u202e\\xff\\n'");
  CHECK_EQUAL(in_quotes("it's"), "\"it's\"");
  CHECK_EQUAL(in_quotes(std::string(200, 'a')), "'" + std::string(60, 'a') + "'");
  CHECK_EQUAL(in_quotes(std::string(60, '\\')), "'" + std::string(68, '\\') + "…");
  CHECK_EQUAL(number_text(70000.0), "70000.0");
  CHECK_EQUAL(number_text(-0.1f), "-0.1");
  CHECK_EQUAL(number_text(1e300), "1e+300");
  CHECK_EQUAL(number_text(1.0e15 + 0.5), "1000000000000000.5");
  CHECK_EQUAL(shown(std::string(100, 'a')), std::string(100, 'a'));
  CHECK_EQUAL(shown(std::string(101, 'a')), std::string(100, 'a') + "…");
  CHECK_EQUAL(shown(std::string(99, 'a') + "ää"), std::string(99, 'a') + "…");
  CHECK(std::strlen(Error(STCA_ERROR, std::string(1 << 20, 'x')).what()) < 900);
}

TEST(error_of_an_onnxruntime_that_is_too_old) {
  check_version("1.32.0");
  for (const char* version : {"1.31.1", "1.9.0", "2.40.0", "dev"}) CHECK_THROWS(check_version(version), Error, version);
  CHECK_THROWS(check_version("1.31.1"), Error,
               "ONNX Runtime 1.31.1 can end the process on a request without events or targets; install onnxruntime "
               "1.32 or newer");
}

TEST(tensor_visits_throw_for_other_dtypes) {
  const auto nothing = [](auto) {};
  CHECK_THROWS(visit_integer(STCA_FLOAT32, nothing), Error, "taken for integers");
  CHECK_THROWS(visit_integer(STCA_BOOL, nothing), Error, "taken for integers");
  CHECK_THROWS(visit_floating(STCA_INT64, nothing), Error, "taken for floating point");
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
  const Array beside = concatenate(Memory::host(), "x", {&array, &array}, 1);
  CHECK_EQUAL(beside.shape.text(), "[3, 4]");
  const std::vector<std::int32_t> twice = {1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6};
  CHECK(std::memcmp(beside.data, twice.data(), beside.bytes()) == 0);
  const Array narrow{STCA_INT32, {3, 1}, values.data(), nullptr, false};
  CHECK_THROWS(rows(array, 2, 4), Error, "no rows 2 to 4");
  CHECK_THROWS(rows(array, -1, 2), Error, "no rows");
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

std::uint64_t cost(std::int64_t tokens, const std::string& user = "ann") {
  return cost_of(key_of(user), *state_of(tokens));
}

KeepLimits within(std::uint64_t bytes, std::uint64_t users = 0, double seconds = 0) { return {bytes, users, seconds}; }

}  // namespace

TEST(cache_finds_only_the_exact_key) {
  StateCache cache(within(10000));
  CHECK(cache.put(key_of("ann"), state_of(5)));
  CHECK(cache.get(key_of("ann")).state != nullptr);
  CHECK(cache.get(key_of("ann", "v2")).state == nullptr);
  CHECK(cache.get(key_of("bob")).state == nullptr);
  CHECK(cache.get({"ann", "v1", std::make_shared<StateKind>(StateKind{"other", "format"})}).state == nullptr);
  CHECK(cache.get({"ann", "v1", std::make_shared<StateKind>(StateKind{"weights", "format"})}).state != nullptr);
  const stca_cache_stats stats = cache.stats();
  CHECK_EQUAL(stats.hits, 0u);  // the session counts requests that nothing refuses
  CHECK_EQUAL(stats.misses, 0u);
  CHECK_EQUAL(stats.state_bytes, 20u);
  CHECK_EQUAL(stats.bytes, cost(5));
}

TEST(cache_keeps_within_its_budget) {
  const std::uint64_t budget = 3 * cost(10);
  StateCache cache(within(budget));
  for (int i = 0; i < 50; ++i) {
    CHECK(cache.put(key_of(std::to_string(i % 7)), state_of(i % 11)));
    CHECK(cache.stats().bytes <= budget);
  }
  CHECK(cache.stats().users >= 3u);
  const auto large = static_cast<std::int64_t>(budget / 4);
  CHECK(!cache.put(key_of("big"), state_of(large)));
  CHECK_EQUAL(cache.stats().refused, 1u);
  // A state that is refused still replaces what the user had: that was of an
  // older history.
  CHECK(cache.put(key_of("big"), state_of(25)));
  CHECK(!cache.put(key_of("big"), state_of(large)));
  CHECK(!cache.find("big"));
}

TEST(cache_counts_all_that_an_entry_takes) {
  const std::string name(20000, 'x');
  CHECK(cost(0, name) > 40000u);  // it is in the cache's two tables
  CHECK(cost(0) > 300u && cost(0) < 1000u);
  StateCache cache(within(100000));
  for (int i = 0; i < 100; ++i) cache.put(key_of(name + std::to_string(i)), state_of(0));
  CHECK(cache.stats().users < 5u);
}

TEST(process_may_use_what_it_is_bound_to_and_its_quota) {
  const check::TemporaryFolder folder;
  const auto write = [&](const std::string& path, const char* text) {
    std::filesystem::create_directories((folder.path() / path).parent_path());
    std::ofstream(folder.path() / path) << text;
  };
  const auto found = [&] { return processors(folder.path().string()); };
  const auto with_quota = [&](const char* text) {
    write("sys/fs/cgroup/cpu.max", text);
    return found();
  };
  const int bound = processors((folder.path() / "none").string());
  CHECK(bound >= 1);
  for (const char* text : {"max 100000", "", "x", "0 100000", "-5 100000", "100000 0", "900000000 100000"}) {
    CHECK_EQUAL(with_quota(text), bound);
  }
  CHECK_EQUAL(with_quota("100000 100000"), 1);
  CHECK_EQUAL(with_quota("50000 100000"), 1);
  CHECK_EQUAL(with_quota("150000 100000"), std::min(bound, 2));
  CHECK_EQUAL(with_quota("max 100000"), bound);
  write("proc/self/cgroup", "0::/a/b\n");
  write("sys/fs/cgroup/a/cpu.max", "100000 100000\n");  // of the group around it
  CHECK_EQUAL(found(), 1);
  write("proc/self/cgroup", "4:memory:/c\n3:cpu,cpuacct:/host/c\n0::/\n::\nx\n");
  CHECK_EQUAL(found(), bound);
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n");
  CHECK_EQUAL(found(), bound);
  write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");  // a container's, whose path is the host's
  CHECK_EQUAL(found(), 1);
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  CHECK_EQUAL(found(), bound);
  std::thread one([&] {  // affinity is a thread's own
    cpu_set_t first;
    CPU_ZERO(&first);
    CHECK_EQUAL(::sched_getaffinity(0, sizeof first, &first), 0);
    int lowest = 0;
    while (!CPU_ISSET(lowest, &first)) ++lowest;
    CPU_ZERO(&first);
    CPU_SET(lowest, &first);
    CHECK_EQUAL(::sched_setaffinity(0, sizeof first, &first), 0);
    CHECK_EQUAL(processors((folder.path() / "none").string()), 1);
  });
  one.join();
}

TEST(cache_keeps_so_many_users) {
  StateCache cache(within(1 << 20, 2));
  for (const char* user : {"ann", "bob"}) cache.put(key_of(user), state_of(1));
  cache.get(key_of("ann"));
  cache.put(key_of("cat"), state_of(1));
  CHECK(cache.find("ann") && !cache.find("bob") && cache.find("cat"));
  CHECK_EQUAL(cache.stats().evictions, 1u);
  cache.put(key_of("ann", "v2"), state_of(1));  // in the place of her own
  CHECK(cache.find("cat").has_value());
}

TEST(cache_restores_a_state_only_where_there_is_none) {
  StateCache cache(within(1 << 20));
  cache.put(key_of("ann", "v2"), state_of(2));
  CHECK(!cache.restore(key_of("ann", "v1"), state_of(1), 5, 0));  // read from a file while hers was changed
  CHECK(cache.get(key_of("ann", "v2")).state != nullptr);
  CHECK(cache.restore(key_of("bob"), state_of(1), 5, 0));
  CHECK(cache.fetch("bob")->age >= 5);
}

TEST(cache_drops_what_is_too_old) {
  double now = 100;
  StateCache cache(within(1 << 20, 0, 50), [&] { return now; });
  cache.put(key_of("ann"), state_of(1));
  CHECK(cache.get(key_of("ann")).state != nullptr);
  now = 130;
  cache.put(key_of("bob"), state_of(1));
  cache.get(key_of("ann"));  // use does not make it younger
  now = 149.5;
  CHECK(cache.get(key_of("ann")).state != nullptr);
  now = 150;
  CHECK(cache.get(key_of("ann")).state == nullptr);
  CHECK(cache.get(key_of("ann")).came == Came::expired);
  CHECK_EQUAL(cache.stats().expired, 1u);
  CHECK(cache.get(key_of("bob")).state != nullptr);
  now = 180;
  CHECK_EQUAL(cache.stats().users, 0u);
  CHECK_EQUAL(cache.stats().bytes, 0u);
}

TEST(cache_takes_a_finished_state_for_as_old_as_it_was) {
  double now = 100;
  StateCache cache(within(1 << 20, 0, 50), [&] { return now; });
  const StateCache::State first = state_of(1), second = state_of(2);
  cache.put(key_of("ann"), first);
  now = 120;
  CHECK(cache.put(key_of("ann"), second, first));
  CHECK_EQUAL(cache.fetch("ann")->age, 20.0);
  CHECK_EQUAL(cache.stats().appends, 0u);
  CHECK(cache.put(key_of("ann", "v2"), state_of(3), second));
  CHECK_EQUAL(cache.fetch("ann")->age, 0.0);
  CHECK_EQUAL(cache.stats().appends, 1u);
}

TEST(cache_drops_a_finished_state_when_it_would_have_gone) {
  double now = 100;
  StateCache cache(within(1 << 20, 0, 50), [&] { return now; });
  const StateCache::State first = state_of(1), second = state_of(2);
  cache.put(key_of("ann"), first);
  now = 110;
  cache.put(key_of("bob"), state_of(1));
  now = 120;
  CHECK(cache.put(key_of("ann"), second, first));
  now = 155;
  CHECK_EQUAL(cache.stats().users, 1u);  // whoever was put after it has longer
  const auto bob = cache.find("bob");
  CHECK(bob && !cache.put(key_of("bob"), state_of(1 << 20), bob->second));
  CHECK_EQUAL(cache.stats().users, 0u);
  now = 200;
  CHECK_EQUAL(cache.stats().expired, 1u);
}

TEST(cache_lets_one_finish_for_all) {
  StateCache cache(within(1 << 20));
  const auto late_of = [](std::int64_t tokens) {
    auto state = std::make_shared<UserState>(*state_of(tokens));
    state->waiting = std::make_shared<Row>();
    return StateCache::State(state);
  };
  const StateCache::State late = late_of(1), whole = state_of(2);
  cache.put(key_of("ann"), late);
  CHECK(cache.begin(key_of("ann"), true).state == late);  // to a request it is there
  const StateCache::Found first = cache.begin(key_of("ann"), true, 0, late);
  const StateCache::Found second = cache.begin(key_of("ann"), true, 0, late);
  CHECK(first.ours && !second.ours && second.flight == first.flight);
  CHECK(cache.land(first.flight, whole) && StateCache::wait(second.flight) == whole);
  CHECK(cache.begin(key_of("ann"), true, 0, late).state == whole);
  // One that is forgotten meanwhile is not kept, and one that cannot be finished goes, but no other in its place.
  cache.put(key_of("bob"), late);
  const StateCache::Found forgotten = cache.begin(key_of("bob"), true, 0, late);
  cache.forget("bob");
  CHECK(!cache.land(forgotten.flight, whole) && !cache.find("bob"));
  cache.put(key_of("bob"), late);
  const StateCache::Found failed = cache.begin(key_of("bob"), true, 0, late);
  CHECK(!cache.land(failed.flight, nullptr) && !cache.find("bob"));
  cache.put(key_of("bob"), late);
  const StateCache::Found again = cache.begin(key_of("bob"), true, 0, late);
  cache.put(key_of("bob", "v2"), whole);
  CHECK(!cache.land(again.flight, nullptr) && cache.find("bob")->second == whole);
}

TEST(cache_remembers_why_a_state_is_not_kept) {
  StateCache cache(within(1 << 20, 1));
  cache.serve(kind);
  CHECK(cache.get(key_of("ann")).came == Came::new_user);
  cache.put(key_of("ann"), state_of(1));
  CHECK(cache.get(key_of("ann")).came == Came::memory);
  CHECK(cache.get(key_of("ann", "v2")).came == Came::version);
  const auto other = std::make_shared<StateKind>(StateKind{"other", "format"});
  CHECK(cache.get({"ann", "v1", other}).came == Came::weights);
  cache.put(key_of("bob"), state_of(1));
  CHECK(cache.get(key_of("ann")).came == Came::evicted);
  cache.serve(other);
  CHECK(cache.get({"bob", "v1", other}).came == Came::weights);
  CHECK(!cache.put({"bob", "v1", other}, state_of(1 << 20)));
  CHECK(cache.get({"bob", "v1", other}).came == Came::too_large);
  cache.forget("bob");
  CHECK(cache.get({"bob", "v1", other}).came == Came::new_user);
}

TEST(cache_lets_one_encode_for_all) {
  StateCache cache(within(1 << 20));
  const StateCache::Found first = cache.begin(key_of("ann"), true);
  CHECK(first.ours && cache.flying(key_of("ann")) && !cache.flying(key_of("ann", "v2")));
  const StateCache::Found second = cache.begin(key_of("ann"), true);
  CHECK(!second.ours && second.flight == first.flight);
  CHECK(!cache.begin(key_of("bob"), false).flight);
  StateCache::State waited;
  std::thread waiting([&] { waited = StateCache::wait(second.flight); });
  const StateCache::State state = state_of(3);
  cache.land(first.flight, state);
  waiting.join();
  CHECK(waited == state && cache.get(key_of("ann")).state == state && !cache.flying(key_of("ann")));
}

TEST(cache_lets_forget_win) {
  StateCache cache(within(1 << 20));
  const StateCache::Found old = cache.begin(key_of("ann"), true);
  CHECK(cache.forget("ann"));
  const StateCache::Found fresh = cache.begin(key_of("ann"), true);  // is not served with what was forgotten
  CHECK(fresh.ours && fresh.flight != old.flight);
  cache.land(old.flight, state_of(3));
  CHECK(!cache.find("ann"));
  CHECK(StateCache::wait(old.flight) != nullptr);
  cache.land(fresh.flight, state_of(4));
  CHECK_EQUAL(cache.find("ann")->second->tokens, 4);
}

TEST(cache_keeps_what_a_later_call_made) {
  StateCache cache(within(1 << 20));
  const std::uint64_t first = cache.next_call(), second = cache.next_call();
  const StateCache::Found slow = cache.begin(key_of("ann", "v1"), true, first);
  const StateCache::Found fast = cache.begin(key_of("ann", "v2"), true, second);
  CHECK(cache.land(fast.flight, state_of(2)));
  CHECK(!cache.land(slow.flight, state_of(1)));  // it is scored with, and not kept
  CHECK_EQUAL(cache.find("ann")->first.version, "v2");
  const StateCache::Found late = cache.begin(key_of("ann", "v1"), true, cache.next_call());
  CHECK(cache.land(late.flight, state_of(1)));  // whoever comes later says what is so now, whatever they call it
  CHECK_EQUAL(cache.find("ann")->first.version, "v1");
  const StateCache::Found before = cache.begin(key_of("ann", "v0"), true);
  CHECK(cache.put(key_of("ann", "v3"), state_of(3), cache.find("ann")->second));  // an append
  CHECK(!cache.land(before.flight, state_of(4)));
  CHECK_EQUAL(cache.find("ann")->first.version, "v3");
}

TEST(cache_serves_one_kind) {
  StateCache cache(within(1 << 20));
  const auto other = std::make_shared<StateKind>(StateKind{"other", "format"});
  cache.serve(kind);
  CHECK(cache.put(key_of("ann"), state_of(5)));
  const StateCache::Found late = cache.begin(key_of("bob"), true);
  cache.serve(std::make_shared<StateKind>(*kind));
  CHECK(cache.find("ann").has_value());
  cache.serve(other);
  cache.land(late.flight,
             state_of(5));  // encoded before the swap, done after it
  CHECK(!cache.put(key_of("ann"), state_of(5)));
  CHECK_EQUAL(cache.stats().users, 0u);
  CHECK_EQUAL(cache.stats().bytes, 0u);
  CHECK(cache.put({"ann", "v1", other}, state_of(5)));
}

TEST(cache_leaves_states_in_use_whole) {
  StateCache cache(within(1000));
  cache.put(key_of("ann"), state_of(5));
  const StateCache::State held = cache.get(key_of("ann")).state;
  CHECK(cache.forget("ann"));
  CHECK(!cache.forget("ann"));
  CHECK_EQUAL(held->tensors[0].bytes(), 20u);
  std::memset(const_cast<void*>(held->tensors[0].data), 0, 20);
}
