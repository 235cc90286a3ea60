// The TensorRT engine with stand-ins for TensorRT and CUDA: the logic around
// them, not what they compute.
#include "fake_tensorrt.hpp"

using namespace fake;

TEST(tensorrt_keeps_states_on_the_gpu) {
  {
    const Plans plans;
    const Model model = plans.model({0, 0, 0});
    const Log log(3);
    const Row row = log.row(model.door());
    const StateCache::State state = model.encode(row);
    for (const Array& tensor : state->tensors) CHECK(tensor.device && gpu.holds(tensor.data, tensor.bytes()));
    CHECK_EQUAL(state->bytes(), 3u * 8 + 8 + 8 + 8);
    const std::size_t blocks = gpu.memory.size(), pinned = gpu.pinned.size();
    for (int i = 0; i < 3; ++i) {
      const Array scores = model.score({state}, {row});
      CHECK_EQUAL(scores.shape.text(), "[2, 2]");
      CHECK_EQUAL(at(scores, 0), log.first());
      CHECK_EQUAL(at(scores, 3), 100 + 3 + 0.25f + 0.5f);
    }
    CHECK_EQUAL(gpu.memory.size(),
                blocks);  // a hit allocates nothing on the GPU, nor page-locked memory
    CHECK_EQUAL(gpu.pinned.size(), pinned);
  }
  CHECK(gpu.empty());
}

TEST(tensorrt_joins_states_up_to_the_engines_requests) {
  const Plans plans;
  const Model model = plans.model();
  const Log logs[] = {Log(2), Log(1), Log(0), Log(3), Log(1)};
  std::vector<StateCache::State> states;
  std::vector<Row> rows;
  for (const Log& log : logs) {
    rows.push_back(log.row(model.door()));
    states.push_back(model.encode(rows.back()));
  }
  const Array scores = model.score(states, rows);  // three requests, then two
  CHECK_EQUAL(scores.shape.text(), "[10, 2]");
  for (std::size_t i = 0; i < 5; ++i) CHECK_EQUAL(at(scores, 4 * i), logs[i].first());
}

TEST(tensorrt_parts_batches_into_runs_that_it_takes) {
  const Plans plans;  // 3 requests, 6 tokens, 8 targets
  const Model model = plans.model({0, 0, 0});
  using Sizes = std::vector<std::pair<std::int64_t, std::size_t>>;
  const auto runs = [&](const Sizes& sizes) {
    std::vector<Log> logs;
    std::vector<Row> rows;
    for (auto [tokens, targets] : sizes) {
      Log& log = logs.emplace_back(tokens);
      log.targets.assign(targets, 7), log.prices.assign(2 * targets, 0);
    }
    for (const Log& log : logs) rows.push_back(log.row(model.door()));
    gpu.runs = 0;
    const std::vector<StateCache::State> states = model.encode(rows);
    const int encoded = gpu.runs;
    const Array scores = model.score(states, rows);
    std::size_t target = 0;
    for (const Log& log : logs) {
      for (std::size_t i = 0; i < log.targets.size(); ++i) CHECK_EQUAL(at(scores, 2 * target++), log.first());
    }
    CHECK_EQUAL(scores.shape[0], static_cast<std::int64_t>(target));
    return std::pair{encoded, gpu.runs - encoded};
  };
  CHECK(runs({{2, 1}, {2, 1}, {2, 1}}) == std::pair(1, 1));
  CHECK(runs({{1, 1}, {1, 1}, {0, 1}, {1, 1}}) == std::pair(2, 2));          // requests
  CHECK(runs({{4, 2}, {3, 1}, {3, 1}, {6, 1}, {0, 1}}) == std::pair(3, 3));  // tokens
  CHECK(runs({{1, 4}, {1, 4}, {1, 1}}) == std::pair(1, 2));                  // targets
  CHECK(runs({{0, 0}, {0, 8}, {0, 1}, {6, 8}, {1, 0}}) == std::pair(3, 3));  // all; no target, no run
  CHECK_THROWS(runs({{1, 1}, {1, 9}}), Error, "N_t is 9, target_scorer.plan was built for at most 8");
  plans.scorer().requests = 0;
  CHECK_EQUAL(plans.model().engine(false).largest_run().requests, no_limit);
}

TEST(tensorrt_appends_on_the_gpu) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(4), more(3);
  const Row row = log.row(model.door());
  Row added;
  const std::vector<stca_tensor> events = more.events();
  model.door().admit_events({events.data(), events.size()}, "append", true, added);
  const StateCache::State longer = model.extend(*model.encode(row), *model.encode(added));
  CHECK_EQUAL(longer->tokens, 6);  // the bundle's window
  CHECK(longer->tensors[0].device && !longer->tensors[1].device);
  CHECK_EQUAL(at(model.score({longer}, {row}), 0), Log(6).first());
}

TEST(tensorrt_serves_histories_as_long_as_both_engines_do) {
  const auto window_is = [](std::size_t window, auto&& change) {
    const Plans plans;
    change(*plans.bundle);
    Log old(4), more(3), both(7);
    old.items = {1, 2, 3, 4}, more.items = {10, 20, 30}, both.items = {1, 2, 3, 4, 10, 20, 30};
    const auto latest = [&](std::size_t tokens) {  // what an exact sum over the
                                                   // latest alone comes to
      float sum = 20 + 7;
      for (std::size_t i = 7 - tokens; i < 7; ++i) sum += static_cast<float>(both.items[i]);
      return sum;
    };
    const Model model = plans.model(), cutting = plans.model({}, true);
    CHECK_THROWS(both.row(model.door()), Error,
                 "history_item: has 7 tokens, the limit is " + std::to_string(window) + "; send the most recent ones");
    const Row cut = both.row(cutting.door());
    CHECK_EQUAL(at(cutting.score({cutting.encode(cut)}, {cut}), 0), latest(window));

    const Row row = old.row(model.door());
    Row added;
    const std::vector<stca_tensor> events = more.events();
    model.door().admit_events({events.data(), events.size()}, "append", true, added);
    const StateCache::State longer = model.extend(*model.encode(row), *model.encode(added));
    CHECK_EQUAL(longer->tokens, static_cast<std::int64_t>(window));
    CHECK_EQUAL(at(model.score({longer}, {row}), 0), latest(window));
  };
  const auto serves = [](EngineEntry& entry, std::int64_t tokens) {
    for (Profile& profile : entry.profiles) profile["N_h"].second = tokens;
  };
  window_is(6, [](Bundle& b) { b.manifest.max_history = 50; });
  window_is(6, [](Bundle& b) { b.manifest.max_history.reset(); });
  window_is(6, [&](Bundle& b) { serves(b.manifest.engines[0], 9), serves(b.manifest.engines[1], 9); });
  window_is(4, [&](Bundle& b) { serves(b.manifest.engines[0], 4); });
  window_is(4, [&](Bundle& b) { serves(b.manifest.engines[1], 4); });
}

TEST(tensorrt_runs_an_empty_history_as_one_token_left_out) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(0);
  const Row row = log.row(model.door());
  const StateCache::State state = model.encode(row);
  CHECK_EQUAL(gpu.wrong, 0);
  CHECK_EQUAL(state->tensors[0].shape.text(), "[0, 2]");
  CHECK_EQUAL(at(model.score({state}, {row}), 0), log.first());
  Log nothing(0);
  nothing.targets = {}, nothing.prices = {};
  CHECK_EQUAL(model.score({state}, {nothing.row(model.door())}).shape.text(), "[0, 2]");
}

TEST(tensorrt_says_what_a_run_exceeds) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(1);
  const Row row = log.row(model.door());
  const StateCache::State state = model.encode(row);
  const auto with_targets = [&](std::size_t count) {
    Log many(1);
    many.targets.assign(count, 1), many.prices.assign(2 * count, 0);
    model.score({state}, {many.row(model.door())});
  };
  CHECK_THROWS(with_targets(9), Error, "N_t is 9, target_scorer.plan was built for at most 8");
  CHECK_THROWS(with_targets(5), Error, "target_item of shape [5] is refused");
  CHECK_EQUAL(at(model.score({state}, {row}), 0), log.first());  // and goes on
}

TEST(tensorrt_says_when_the_gpu_is_full) {
  const Plans plans;
  const Model model = plans.model();
  const Log log(2);
  const Row row = log.row(model.door());
  const auto code_without_memory = [](auto&& f) {
    gpu.fail_next_allocations = 1;
    try {
      f();
    } catch (const Error& e) {
      CHECK(check::contains(e.what(), "the GPU is out of memory"));
      return e.code;
    }
    return STCA_OK;
  };
  CHECK_EQUAL(code_without_memory([&] { model.encode(row); }), STCA_ENGINE_ERROR);
  const StateCache::State state = model.encode(row);
  CHECK_EQUAL(code_without_memory([&] { model.score({state, state}, {row, row}); }),
              STCA_ENGINE_ERROR);  // to join them
  CHECK_EQUAL(code_without_memory([&] { plans.engines(); }), STCA_BUILD_ERROR);
  CHECK_EQUAL(at(model.score({state}, {row}), 0), log.first());
}

TEST(tensorrt_says_why_a_plan_is_refused) {
  const Plans plans;
  gpu.driver = CudaFunctions::error_no_device;
  CHECK_THROWS(plans.engines(), Error, "no usable NVIDIA GPU or driver (cudaErrorOfTheTest)");
  CHECK_THROWS(Device::current_sm(cuda()), GpuError, "no usable NVIDIA GPU or driver (cudaErrorOfTheTest)");
  gpu.driver = CudaFunctions::success;
  CHECK_EQUAL(Device::current_sm(cuda()), 90);
  CHECK_THROWS(Plans("refused").engines(), Error, "user_encoder.plan cannot be loaded: the plan has the wrong magic");
  CHECK_THROWS(Plans("retyped").engines(), Error, "has another type");
  Plans library("library");  // code of ours in a plan runs only where the manifest says that there is some
  CHECK_THROWS(library.engines(), Error, "host code");
  library.encoder().lowering = library.scorer().lowering = "plugin";
  library.engines();
  gpu.fail = "context";
  CHECK_THROWS(plans.engines(), Error, "user_encoder.plan cannot be loaded: TensorRT gives no reason");
  gpu.fail = "";
  std::ofstream(plans.folder.path() / "user_encoder.plan") << "user_encoder of someone else";
  CHECK_THROWS(plans.engines(), Error, "user_encoder.plan was changed");
  CHECK(gpu.empty());
}

TEST(tensorrt_says_when_sizes_make_no_sense) {
  const auto refused = [](const std::string& why, auto&& change) {
    const Plans plans;
    change(plans.encoder());
    CHECK_THROWS(plans.engines(), Error, "user_encoder.plan cannot be served: " + why);
  };
  refused("it has no profiles", [](EngineEntry& e) { e.profiles.clear(); });
  refused("a profile says nothing of N_h", [](EngineEntry& e) { e.profiles[1].erase("N_h"); });
  refused("a profile has no sizes for B", [](EngineEntry& e) { e.profiles[0]["B"] = {3, 2}; });
  refused("a profile has no sizes for B", [](EngineEntry& e) { e.profiles[0]["B"] = {-1, 2}; });
  refused("history_item is larger than any memory",
          [](EngineEntry& e) { e.profiles[0]["N_h"].second = std::int64_t{1} << 60; });
  const Plans plans;
  EngineEntry other = plans.encoder();
  other.spec.outputs[0].shape[0].symbol = "N_x";
  CHECK_THROWS(check_sizes(other), Error, "no input has the N_x rows of token");
  std::swap(plans.encoder(), other);
  CHECK_THROWS(plans.engines(), Error, "its output 'token' is float32 [N_x, 2], the manifest says float32 [N_h, 2]");
  std::swap(plans.encoder(), other);
  const Model model = plans.model();
  gpu.fail = "shape";  // nothing must be written where there is no room
  CHECK_THROWS(model.encode(Log(2).row(model.door())), Error, "the plan gives token as [3, 2], not [2, 2]");
  gpu.fail = "";
}

TEST(tensorrt_leaves_threads_their_gpu) {
  const Plans plans;
  const Model model = plans.model();
  gpu.thread = 1;  // the caller's own
  const Log log(2);
  const Row row = log.row(model.door());
  for (int i = 0; i < 3; ++i)
    CHECK_EQUAL(at(model.score({model.encode(row), model.encode(row)}, {row, row}), 0), log.first());
  CHECK_EQUAL(gpu.thread, 1);
  // Bundles are loaded on the thread's GPU. States stay on theirs, so those of
  // another one are not taken for its own.
  const Model other = plans.model();
  CHECK_EQUAL(other.engine(true).name(), "tensorrt 11.4.0.106 (SM 90, fp32, GPU 1)");
  CHECK(!(*other.state_kind() == *model.state_kind()));
  gpu.thread = 0;
}

TEST(tensorrt_keeps_apart_states_of_different_engines) {
  const Plans plans;
  const StateKind kind = *plans.model().state_kind();
  CHECK(kind == *plans.model().state_kind());
  const auto differs = [&](auto&& change) {
    const Plans changed;
    change(*changed.bundle);
    return !(*changed.model().state_kind() == kind);
  };
  CHECK(differs([](Bundle& b) { b.manifest.engines[0].precision = "tf32"; }));
  CHECK(differs([](Bundle& b) { b.manifest.engines[0].sm = 80; }));
  CHECK(differs([](Bundle& b) { b.manifest.engines[0].version = "11.5.0.1"; }));
  CHECK(differs([](Bundle& b) { b.manifest.max_history = 5; }));
  CHECK(!differs([](Bundle& b) { b.manifest.max_history = 50; }));  // the engines' window is the narrower one
  CHECK(differs([](Bundle& b) {
    for (Profile& profile : b.manifest.engines[1].profiles) profile["N_h"].second = 5;
  }));
  CHECK(differs([](Bundle& b) { b.manifest.weights = "other"; }));
  CHECK(differs([](Bundle& b) { b.manifest.files[b.manifest.graph("user_encoder").file].sha256 = "other"; }));
  CHECK(!differs([](Bundle& b) { b.manifest.files[b.manifest.graph("target_scorer").file].sha256 = "other"; }));
}
