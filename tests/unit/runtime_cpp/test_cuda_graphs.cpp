// CUDA graphs in the TensorRT engine, with stand-ins for TensorRT and CUDA.
#include "fake_tensorrt.hpp"

using namespace fake;

namespace {

/// A user with `tokens` tokens that are like no other's, scored.
struct User {
  Log log;
  Row row;
  StateCache::State state;
  float first;

  User(const Model& model, std::int64_t tokens, std::int64_t item) : log(tokens) {
    std::fill(log.items.begin(), log.items.end(), item);
    row = log.row(model.door());
    state = model.encode(row);
    first = 20 + 7 + static_cast<float>(tokens * item);
  }
  bool right(const Model& model) const { return at(model.score({state}, {row}), 0) == first; }
};

}  // namespace

TEST(tensorrt_replays_a_shape_that_comes_again) {
  {
    const Plans plans;
    const Model model = plans.model();
    std::vector<User> users;
    gpu.launches = 0;
    for (std::int64_t item = 1; item <= 5; ++item) users.emplace_back(model, 3, item);
    CHECK_EQUAL(gpu.launches, 3);  // the encoder's; the first of a shape is run,
                                   // the second run and recorded
    CHECK_EQUAL(gpu.executables, 1);
    CHECK_EQUAL(gpu.contexts, 3);
    gpu.launches = 0;
    for (const User& user : users) CHECK(user.right(model));  // each state lies elsewhere
    CHECK_EQUAL(gpu.launches, 3);
    CHECK_EQUAL(gpu.executables, 2);
    CHECK_EQUAL(gpu.contexts, 4);
    CHECK_EQUAL(gpu.graphs, 0);  // made into executables and gone

    // Nothing is allocated by a replay but the memory of the state it makes.
    const std::size_t blocks = gpu.memory.size(), pinned = gpu.pinned.size();
    for (const User& user : users) CHECK(user.right(model));
    CHECK_EQUAL(gpu.memory.size(), blocks);
    const User more(model, 3, 9);
    CHECK_EQUAL(gpu.memory.size(), blocks + more.state->tensors.size());
    CHECK_EQUAL(gpu.pinned.size(), pinned);
    CHECK(more.right(model));

    // Other shapes in between go through the one context that changes, and leave the graphs' own alone.
    for (std::int64_t tokens : {1, 3, 6, 3, 4, 3}) {
      const User user(model, tokens, 5);
      CHECK(user.right(model) && user.right(model));
    }
    CHECK_EQUAL(gpu.wrong, 0);
  }
  CHECK(gpu.empty());
}

TEST(tensorrt_fills_rows_up_to_a_few_sizes) {
  for (auto [rows, size] :
       {std::pair{1, 16}, {16, 16}, {17, 32}, {64, 64}, {65, 80}, {128, 128}, {129, 160}, {10000, 10240}})
    CHECK_EQUAL(bucket(rows), size);
  std::int64_t sizes = 0;
  for (std::int64_t rows = 1; rows <= 10240; rows = bucket(rows) + 1) ++sizes;
  CHECK_EQUAL(sizes, 33);
  const Plans plans;
  plans.pad();
  CHECK_EQUAL(filled_up(plans.scorer(), {{"N_h", 17}, {"N_t", 3}, {"B", 2}}, 1).at("N_h"), 32);
  CHECK_EQUAL(filled_up(plans.scorer(), {{"N_h", 33}, {"N_t", 3}, {"B", 2}}, 1).at("N_h"), 40);  // the profile's end
  CHECK_EQUAL(filled_up(plans.scorer(), {{"N_h", 33}, {"N_t", 3}, {"B", 2}}, 0).at("N_h"), 48);
  CHECK_EQUAL(filled_up(plans.scorer(), {{"N_h", 33}, {"N_t", 3}, {"B", 2}}, 0).at("N_t"), 16);
  CHECK_EQUAL(filled_up(plans.scorer(), {{"N_h", 33}, {"N_t", 3}, {"B", 2}}, 0).at("B"), 2);
}

TEST(tensorrt_replays_histories_of_about_a_length) {
  const Plans plans;
  plans.pad();
  const Model model = plans.model();
  gpu.launches = 0;
  for (std::int64_t tokens : {31, 17, 30, 18, 32, 20}) {  // long ones leave rows behind that short ones must not see
    const User user(model, tokens, tokens);
    CHECK_EQUAL(user.state->tensors[0].shape[0], tokens);
    CHECK_EQUAL(user.state->bytes(), static_cast<std::size_t>(tokens) * 8 + 8 + 8 + 8);
    CHECK(user.right(model));
  }
  CHECK_EQUAL(gpu.launches, 2 * 4);
  CHECK_EQUAL(gpu.executables, 2);
  const User none(model, 0, 1), four(model, 4, 1), again(model, 0, 1);
  CHECK_EQUAL(gpu.executables, 3);  // of up to 16 tokens
  CHECK_EQUAL(again.state->tensors[0].shape.text(), "[0, 2]");
  for (int i = 0; i < 3; ++i) CHECK(none.right(model) && four.right(model) && again.right(model));
  CHECK_EQUAL(gpu.executables, 4);
  CHECK_EQUAL(gpu.wrong, 0);
}

TEST(tensorrt_replays_give_the_scores_of_direct_runs) {
  const Plans plans;
  plans.pad();
  {
    const Model direct = plans.model({0, 0, 0}), replayed = plans.model({6, 1 << 20, 5});
    std::mt19937 random(11);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    gpu.launches = 0;
    for (int round = 0; round < 400; ++round) {
      std::vector<Log> logs;
      std::vector<Row> rows;
      std::size_t tokens = 0, targets = 0;
      for (std::size_t users = 1 + below(3); users > 0; --users) {
        Log& log = logs.emplace_back(static_cast<std::int64_t>(below(50)));
        for (std::int64_t& item : log.items) item = static_cast<std::int64_t>(1 + below(999));
        log.targets.assign(below(24), 0);
        for (std::int64_t& target : log.targets) target = static_cast<std::int64_t>(1 + below(999));
        log.prices.assign(2 * log.targets.size(), 0.25f);
        tokens += log.items.size(), targets += log.targets.size();
      }
      const auto odd = [](const Log& log) { return log.items.size() == 5 || log.targets.size() == 5; };
      if (std::any_of(logs.begin(), logs.end(), odd) || tokens == 5 || targets == 5) continue;  // refused, by any run
      for (const Log& log : logs) rows.push_back(log.row(direct.door()));
      const Array expected = direct.score(direct.encode(rows), rows), got = replayed.score(replayed.encode(rows), rows);
      CHECK_EQUAL(got.shape.text(), expected.shape.text());
      CHECK_EQUAL(got.shape[0], static_cast<std::int64_t>(targets));
      CHECK(got.bytes() == 0 || std::memcmp(got.data, expected.data, got.bytes()) == 0);
    }
    CHECK(gpu.launches > 100);
    CHECK_EQUAL(gpu.wrong, 0);
  }
  CHECK(gpu.empty());
}

TEST(tensorrt_replays_an_empty_history) {
  const Plans plans;
  const Model model = plans.model();
  const User one(model, 1, 8), none(model, 0, 1);
  CHECK_EQUAL(gpu.executables,
              1);  // an empty history is one token to the engine: the same shape
  gpu.launches = 0;
  for (int i = 0; i < 3; ++i) CHECK(one.right(model) && none.right(model));
  const User again(model, 0, 1);
  CHECK_EQUAL(again.state->tensors[0].shape.text(), "[0, 2]");
  CHECK(again.right(model) && gpu.launches > 0);
  CHECK_EQUAL(gpu.wrong, 0);
}

TEST(tensorrt_keeps_so_many_graphs) {
  const Plans plans;
  {
    const Model model = plans.model({2, 1 << 20, 3});
    const User one(model, 1, 1), two(model, 2, 1), six(model, 6, 1);
    const auto replayed = [&](const User& user) {
      gpu.launches = 0;
      CHECK(user.right(model));
      return gpu.launches == 1;
    };
    for (const User* user : {&six, &six, &one, &one}) CHECK(!replayed(*user));
    for (int i = 0; i < 5; ++i) CHECK(replayed(six) && replayed(one) && !replayed(two));  // both are in use: they stay
    CHECK_EQUAL(gpu.executables, 2);
    int runs = 0;
    while (runs < 20 && replayed(six) && !replayed(two)) ++runs;
    CHECK_EQUAL(runs, 3);  // `one` was not used in more than three runs: it goes, with its context
    CHECK_EQUAL(gpu.executables, 2);
    CHECK_EQUAL(gpu.contexts, 4);
    CHECK(replayed(six) && replayed(two) && !replayed(one));
    CHECK_EQUAL(gpu.wrong, 0);
  }
  {
    const Model model = plans.model({1, 1 << 20, 1});
    const User one(model, 1, 1), two(model, 2, 1), three(model, 3, 1), four(model, 4, 1), six(model, 6, 1);
    for (const User* user : {&one, &two, &three, &four, &six}) CHECK(user->right(model));
    CHECK(one.right(model));  // what comes once is forgotten after four others
    CHECK_EQUAL(gpu.executables, 0);
    CHECK(three.right(model));
    CHECK_EQUAL(gpu.executables, 1);
  }
  const Model without = plans.model({0, 1 << 20, 1});
  const User user(without, 2, 1);
  gpu.launches = 0;
  for (int i = 0; i < 4; ++i) CHECK(user.right(without));
  CHECK_EQUAL(gpu.launches + gpu.executables, 0);
}

TEST(tensorrt_does_not_copy_large_states_for_a_replay) {
  const Plans plans;
  const Model model = plans.model({16, 3 * 8 + 8 + 8 + 8, 1});  // a state of three tokens, and no more
  gpu.launches = 0;
  const User small(model, 3, 1), large(model, 4, 1);
  for (int i = 0; i < 4; ++i) CHECK(large.right(model));
  CHECK_EQUAL(gpu.launches, 0);
  for (int i = 0; i < 4; ++i) CHECK(small.right(model));
  CHECK_EQUAL(gpu.launches, 2);
}

TEST(tensorrt_runs_without_graphs_where_none_can_be_recorded) {
  for (const char* what : {"begin", "enqueue", "end", "instantiate", "context"}) {
    {
      const Plans plans;
      const Model model = plans.model();
      const User one(model, 1, 1), two(model, 2, 1), three(model, 3, 1);
      CHECK(one.right(model) && one.right(model));
      CHECK_EQUAL(gpu.executables, 1);
      gpu.fail = what;
      CHECK(two.right(model) && two.right(model));
      CHECK_EQUAL(gpu.executables, 0);
      CHECK_EQUAL(gpu.contexts, 2);
      gpu.fail = "";
      gpu.launches = 0;
      for (int i = 0; i < 3; ++i) CHECK(one.right(model) && two.right(model) && three.right(model));
      CHECK_EQUAL(gpu.launches + gpu.executables + gpu.graphs,
                  0);  // and never tries again
      // The other half has an opinion of its own.
      const User more(model, 2, 7), and_more(model, 2, 8);
      CHECK(more.right(model) && gpu.executables == 1);
    }
    CHECK(gpu.empty());
  }
  const Plans plans;  // out of memory is no different
  const Model model = plans.model();
  const User one(model, 1, 1);
  CHECK(one.right(model));
  gpu.fail_next_allocations = 1;
  CHECK(one.right(model) && one.right(model));
  CHECK_EQUAL(gpu.fail_next_allocations + gpu.executables, 0);
}

TEST(tensorrt_records_nothing_of_other_threads) {
  const Plans plans;
  const Model model = plans.model();
  const User one(model, 2, 1);
  Memory& memory = const_cast<Engine&>(model.engine(true)).memory();
  int times = 0;
  gpu.while_recording = [&] {  // what another thread may do with its states meanwhile
    const auto a = memory.allocate(10), b = memory.allocate(10);
    memory.copy(a.get(), b.get(), 10);
    ++times;
  };
  for (int i = 0; i < 4; ++i) CHECK(one.right(model));
  gpu.while_recording = nullptr;
  CHECK_EQUAL(times, 1);
  CHECK_EQUAL(gpu.executables, 1);
  CHECK_EQUAL(gpu.wrong, 0);
}

TEST(tensorrt_records_anew_when_memory_moves) {
  const Plans plans;
  const auto device = std::make_shared<Device>(cuda());
  const EngineEntry& entry = plans.scorer();
  TensorRtEngine<Trt> scorer(plans.bundle, entry, plans.create(), device);
  TensorRtEngine<Trt> encoder(plans.bundle, plans.encoder(), plans.create(), device);
  const Door door(plans.bundle->manifest, {}, false, most_targets);
  const auto score = [&](std::int64_t tokens) {
    const Log log(tokens);
    const Row row = log.row(door);
    const auto input = [&](const char* name) { return row.arrays[static_cast<std::size_t>(door.find(name))]; };
    const Array offsets = offsets_array(STCA_INT32, {tokens});
    const auto state = encoder.run(
        {input("history_item"), input("history_action"), offsets, input("user_segment"), input("user_profile")});
    std::vector<Array> feeds;
    for (const TensorSpec& spec : entry.spec.inputs) {
      if (spec.name == "target_offsets") {
        feeds.push_back(offsets_array(STCA_INT32, {2}));
        continue;
      }
      const auto& outputs = plans.encoder().spec.outputs;
      const auto found =
          std::find_if(outputs.begin(), outputs.end(), [&](const auto& o) { return o.name == spec.name; });
      feeds.push_back(found == outputs.end() ? input(spec.name.c_str())
                                             : state[static_cast<std::size_t>(found - outputs.begin())]);
    }
    gpu.launches = 0;
    CHECK_EQUAL(at(scorer.run(feeds)[0], 0), log.first());
    return gpu.launches;
  };
  for (int expected : {0, 0, 1, 1}) CHECK_EQUAL(score(2), expected);
  device->scratch(5000);  // as another engine that needs more of it
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(2), expected);
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(6), expected);  // the graphs' own place for states grows
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(2), expected);
  for (int expected : {0, 0, 1}) CHECK_EQUAL(score(4), expected);  // there is room for it now
  CHECK_EQUAL(score(2), 1);
  CHECK_EQUAL(gpu.wrong, 0);
}
