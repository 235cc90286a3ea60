// How many requests a second one core validates, looks up and packs in the C++ runtime; the engine computes nothing.
//
//   stca_benchmark BUNDLE HISTORY TARGETS SECONDS     prints JSON; benchmarks/cpp_runtime.py builds and runs it
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "stca/runtime.hpp"

namespace {

/// Outputs of the right shape, left as they are: neither computed nor cleared.
class Nothing : public stca::Engine {
 public:
  Nothing(const stca::Bundle& bundle, const std::string& graph)
      : takes_(bundle.inputs(graph)), gives_(bundle.outputs(graph)) {}
  std::string name() const override { return "nothing"; }
  void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
    const auto size_of = [&](const std::string& symbol) -> std::int64_t {
      for (std::size_t i = 0; i < count; ++i) {
        if (takes_[i].rank > 0 && takes_[i].symbol[0] != nullptr && symbol == takes_[i].symbol[0])
          return inputs[i].shape[0];
      }
      return 0;
    };
    for (std::size_t i = 0; i < gives_.size(); ++i) {
      std::vector<std::int64_t> shape(gives_[i].shape, gives_[i].shape + gives_[i].rank);
      if (gives_[i].symbol[0] != nullptr) shape[0] = size_of(gives_[i].symbol[0]);
      outputs.allocate(i, shape);
    }
  }

 private:
  std::vector<stca_tensor_spec> takes_, gives_;
};

/// A request with every input the bundle takes, and what it borrows. Ids are spread over their range.
struct Sample {
  std::vector<std::vector<std::int64_t>> memory;
  std::vector<stca::Tensor> user, rest;

  Sample(const stca::Bundle& bundle, std::int64_t history, std::int64_t targets) {
    for (const stca_tensor_spec& spec : bundle.inputs("request")) {
      const std::string rows = spec.rank > 0 && spec.symbol[0] != nullptr ? spec.symbol[0] : "";
      if (rows == "B_plus_1") continue;
      const std::int64_t count = rows == "N_h" ? history : rows == "N_t" ? targets : 1;
      auto& values = memory.emplace_back(static_cast<std::size_t>(count));
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<std::int64_t>(i * 7919) % (spec.limit > 0 ? spec.limit : 1 << 30);
      }
      (spec.scope == STCA_USER ? user : rest)
          .emplace_back(spec.name, values.data(), std::initializer_list<std::int64_t>{count});
    }
  }
};

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Calls `f` for about `seconds` in five rounds; prints requests per second of processor and of wall time, medians.
template <class F>
void measure(const char* name, std::size_t requests_per_call, std::size_t state_bytes, double seconds, F&& f) {
  std::vector<double> cpu, wall;
  std::size_t calls = 0;
  for (int round = 0; round < 5; ++round) {
    const double c = cpu_seconds(), w = wall_seconds();
    std::size_t done = 0;
    while (cpu_seconds() - c < seconds / 5) {
      for (int i = 0; i < 16; ++i) f();
      done += 16;
    }
    const auto requests = static_cast<double>(done * requests_per_call);
    cpu.push_back(requests / (cpu_seconds() - c));
    wall.push_back(requests / (wall_seconds() - w));
    calls += done;
  }
  std::sort(cpu.begin(), cpu.end()), std::sort(wall.begin(), wall.end());
  std::printf(
      "  {\"name\": \"%s\", \"requests_per_call\": %zu, \"joined_state_bytes\": %zu, \"calls\": %zu, "
      "\"requests_per_cpu_second\": %.0f, \"lowest_round\": %.0f, \"requests_per_wall_second\": %.0f}",
      name, requests_per_call, state_bytes, calls, cpu[2], cpu[0], wall[2]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: stca_benchmark BUNDLE HISTORY TARGETS SECONDS\n");
    return 2;
  }
  const std::int64_t history = std::atoll(argv[2]), targets = std::atoll(argv[3]);
  const double seconds = std::atof(argv[4]);
  stca::Options options;
  options.cache_bytes = std::uint64_t{4} << 30;
  options.make_engine = [](const stca::Bundle& b, const std::string& g) { return std::make_unique<Nothing>(b, g); };
  const double before = wall_seconds();
  stca::Session session(argv[1], options);
  const double load = wall_seconds() - before;

  constexpr std::size_t users = 32;
  const auto keep = [&](const Sample& sample, const char* version) {
    std::vector<stca::Request> requests;
    for (std::size_t u = 0; u < users; ++u) {
      requests.push_back({sample.user, "user " + std::to_string(u), version});
      requests.back().inputs.insert(requests.back().inputs.end(), sample.rest.begin(), sample.rest.end());
      session.score(requests.back());        // the miss that fills the cache
      requests.back().inputs = sample.rest;  // from now on a hit
    }
    return requests;
  };
  std::printf("{\"load_seconds\": %.4f, \"rows\": [\n", load);
  const Sample sample(session.bundle(), history, targets), no_history(session.bundle(), 0, targets);
  std::vector<stca::Request> requests = keep(sample, "long");
  const std::size_t bytes = session.stats().bytes;
  std::size_t next = 0;
  measure("one request a call, cached history", 1, 0, seconds, [&] { session.score(requests[next++ % users]); });
  std::printf(",\n");
  measure("32 requests packed, cached history joined", users, bytes, seconds, [&] { session.score(requests); });
  std::printf(",\n");
  requests = keep(no_history, "empty");
  measure("32 requests packed, cached empty history", users, session.stats().bytes, seconds,
          [&] { session.score(requests); });
  const stca::CacheStats stats = session.stats();
  std::printf("],\n \"hits\": %llu, \"misses\": %llu}\n", static_cast<unsigned long long>(stats.hits),
              static_cast<unsigned long long>(stats.misses));
  return stats.misses == 2 * users ? 0 : 1;
}
