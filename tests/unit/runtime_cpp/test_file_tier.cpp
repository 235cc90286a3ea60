// States in files: they outlive memory and the session, and nothing that was changed is ever scored with.
#include <algorithm>
#include <atomic>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "check.hpp"
#include "file_tier.hpp"
#include "log_request.hpp"
#include "toy_engine.hpp"

namespace fs = std::filesystem;
namespace core = stca::core;

namespace {

stca::Options in_files(const fs::path& folder, std::uint64_t users = 0) {
  stca::Options options = with(toy::maker());
  options.state_folder = folder.string();
  options.max_users = users;
  return options;
}

void settle(const stca::Session& session) {
  while (session.stats().file_waiting > 0) std::this_thread::yield();
}

std::vector<fs::path> records(const fs::path& folder) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".state") found.push_back(entry.path());
  }
  return found;
}

std::string read(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

}  // namespace

TEST(files_outlive_memory_and_the_session) {
  const check::TemporaryFolder folder;
  const fs::path states = folder.path() / "of" / "states";
  const Log log;
  const std::vector<std::int64_t> nine{9}, zero{0};
  {
    stca::Session session(golden("log"), in_files(states, 1));
    for (const char* user : {"ann", "bob", "cid"}) {
      CHECK_EQUAL(session.score(stca::Request{log.all(), user, "v1"})(0, 0), log.first_score());
      settle(session);
    }
    CHECK_EQUAL(session.stats().file_users, 3u);
    const stca::Scores scores = session.score(stca::Request{log.rest(), "ann", "v1"});
    CHECK_EQUAL(scores.hits(), 1u);
    CHECK_EQUAL(scores(0, 0), log.first_score());
    CHECK_EQUAL(session.stats().hits_file, 1u);
    CHECK(session.append("bob", {{"history_item", nine}, {"history_action", zero}}, "v2", "v1"));
    CHECK_THROWS(stca::Session(golden("log"), in_files(states)), stca::UsageError, "another session has it");
  }  // writes what waits
  stca::Session session(golden("log"), in_files(states));
  CHECK_EQUAL(session.stats().users, 0u);
  CHECK_EQUAL(session.stats().file_users, 3u);
  const auto bob = session.residence("bob");
  CHECK(bob && bob->tier == "file" && bob->bytes > 0 && !bob->version);  // the file has a digest of it
  CHECK(session.residence("bob", "v2")->version == "v2");
  CHECK(!session.residence("bob", "v1") && !session.residence("dan"));
  CHECK_EQUAL(session.stats().file_reads, 0u);
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "bob", "v2"})(0, 0), log.first_score(9));
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"})(0, 0), log.first_score());
  CHECK_THROWS(session.score(stca::Request{log.rest(), "cid", "v2"}), stca::HistoryNeededError, "no state of version");
  CHECK(session.residence("bob")->tier == "memory");  // it was read
  session.score(stca::Request{log.all(), "cid", "v2"});
  const stca::CacheStats stats = session.stats();
  CHECK_EQUAL(stats.hits, 2u);
  CHECK_EQUAL(stats.file_reads, 2u);
  CHECK_EQUAL(stats.misses_version, 1u);
  for (const auto& entry : fs::directory_iterator(states)) {  // files tell nobody who the users are
    for (const char* user : {"ann", "bob", "cid"}) {
      CHECK(!check::contains(entry.path().string() + read(entry.path()), user));
    }
    CHECK((entry.status().permissions() & fs::perms(077)) == fs::perms::none);
  }
  CHECK(session.forget("cid") && session.forget("ann"));
  settle(session);
  CHECK_EQUAL(records(states).size(), 1u);
}

TEST(files_that_were_changed_are_no_states) {
  const check::TemporaryFolder folder;
  const Log log;
  const auto restarted = [&] { return stca::Session(golden("log"), in_files(folder.path())); };
  const auto session_of = [&] {
    stca::Session session = restarted();
    session.score(stca::Request{log.all(), "ann", "v1"});
    settle(session);
    return records(folder.path()).at(0);
  };
  const fs::path record = session_of();
  const std::string whole = read(record);
  const auto refused = [&](const std::string& text) {
    write(record, text);
    stca::Session session = restarted();
    CHECK_THROWS(session.score(stca::Request{log.rest(), "ann", "v1"}), stca::HistoryNeededError, "send the user");
    const stca::CacheStats stats = session.stats();
    // It is gone; or what was changed is the version, and then it is nobody's who asks for another.
    CHECK_EQUAL(stats.file_discarded + stats.file_users, 1u);
    CHECK_EQUAL(records(folder.path()).size(), stats.file_users);
    session.forget("ann");
    return stats.file_reads == 0 && stats.hits == 0;
  };
  for (std::size_t at = 0; at < whole.size(); at += 3) {
    std::string text = whole;
    text[at] = static_cast<char>(text[at] ^ (at % 2 == 0 ? 1 : 0x80));
    CHECK(refused(text));
  }
  for (std::size_t size = 0; size < whole.size(); size += 7) CHECK(refused(whole.substr(0, size)));
  CHECK(refused(whole + "x"));
  write(record, whole);
  write(folder.path() / "torn.state.new", "half");
  write(folder.path() / "other.state", whole);  // under another name than its own
  stca::Session session = restarted();
  CHECK_EQUAL(session.score(stca::Request{log.rest(), "ann", "v1"})(0, 0), log.first_score());
  CHECK_EQUAL(session.stats().file_discarded, 1u);
  CHECK(!fs::exists(folder.path() / "torn.state.new") && !fs::exists(folder.path() / "other.state"));
  session.swap(golden("log_other_weights"));
  CHECK(records(folder.path()).empty());
  CHECK_THROWS(session.score(stca::Request{log.rest(), "ann", "v1"}), stca::HistoryNeededError, "send the user");
}

TEST(files_keep_within_their_budget_and_their_time) {
  const check::TemporaryFolder folder;
  const auto kind = std::make_shared<const core::StateKind>(core::StateKind{"weights", "format"});
  auto [rows, data] = core::make_array(core::Memory::host(), STCA_FLOAT32, {100});
  std::fill_n(reinterpret_cast<float*>(data), 100, 1.5f);
  auto state = std::make_shared<core::UserState>();
  state->tokens = 100;
  state->tensors.push_back(rows);
  double time = 1e9;
  const auto key = [&](const std::string& user) { return core::StateKey{user, "v1", kind}; };
  const auto fetch = [&](const std::string& user) -> std::optional<core::StateCache::Aged> {
    if (user == "gone") return std::nullopt;
    return core::StateCache::Aged{key(user), state, 10};
  };
  core::FileTier files(folder.path(), 1500, 60, fetch, [&] { return time; });
  files.serve(*kind);
  const auto offer = [&](const std::string& user) {
    files.offer(user);
    while (files.stats().waiting > 0) std::this_thread::yield();
  };
  const auto there = [&](const std::string& user) {
    double age = -1;
    const auto [read, damaged] = files.read(key(user), [&](const auto&, double seconds, std::uint64_t) { age = seconds; });
    CHECK(!damaged);
    if (read == nullptr) return false;
    CHECK_EQUAL(read->tokens, 100);
    CHECK_EQUAL(static_cast<const float*>(read->tensors.at(0).data)[99], 1.5f);
    CHECK(age >= 10);
    return true;
  };
  offer("ann"), offer("bob");
  CHECK(there("ann"));
  offer("cid");  // room for two: the one that was not used for longest goes
  CHECK(there("ann") && !there("bob") && there("cid"));
  CHECK_EQUAL(files.stats().evictions, 1u);
  CHECK(files.stats().bytes <= 1500);
  offer("gone");
  CHECK_EQUAL(files.stats().skipped, 1u);
  time += 49.5;
  CHECK(there("ann"));
  time += 1;  // each was ten seconds old when it was written
  CHECK(!there("ann"));
  CHECK_EQUAL(files.stats().expired, 2u);
  CHECK_EQUAL(files.stats().users, 0u);
  auto [many, more] = core::make_array(core::Memory::host(), STCA_FLOAT32, {1000});
  std::fill_n(more, many.bytes(), std::byte{0});
  state->tensors[0] = many;
  offer("dan");
  CHECK_EQUAL(files.stats().skipped, 2u);
  CHECK(records(folder.path()).empty());
}

TEST(files_need_a_folder_that_can_be_used) {
  CHECK_THROWS(stca::Session(golden("log"), in_files("/dev/null/states")), stca::UsageError,
               "state_folder: /dev/null/states cannot be used");
  const check::TemporaryFolder folder;
  write(folder.path() / "file", "");
  CHECK_THROWS(stca::Session(golden("log"), in_files(folder.path() / "file")), stca::UsageError, "name a folder");
}

TEST(threads_share_files) {
  const check::TemporaryFolder folder;
  stca::Session session(golden("log"), in_files(folder.path(), 3));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      const Log log;
      const std::vector<std::int64_t> nine{9}, zero{0};
      for (int i = 0; i < 120; ++i) {
        const std::string user = std::to_string(random() % 9);
        try {
          if (random() % 8 == 0) session.forget(user);
          if (random() % 8 == 0) session.append(user, {{"history_item", nine}, {"history_action", zero}}, "v2", "v1");
          const bool whole = random() % 2 == 0;
          const float score = session.score(stca::Request{whole ? log.all() : log.rest(), user, "v1"})(0, 0);
          wrong += score == log.first_score() || score == log.first_score(1000) ? 0 : 1;
        } catch (const stca::HistoryNeededError&) {
        } catch (const std::exception& e) {
          ++wrong;
          std::cerr << e.what() << "\n";
        }
      }
    });
  }
  for (int i = 0; i < 4; ++i) session.swap(golden(i % 2 == 0 ? "log_other_weights" : "log"));
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(wrong.load(), 0);
}
