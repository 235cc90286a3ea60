// A request to the golden `log` bundles and what its inputs borrow.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "stca/runtime.hpp"

inline std::string golden(const std::string& name) { return std::string(STCA_GOLDEN) + "/" + name; }

inline stca::Options with(stca::MakeEngine make) {
  stca::Options options;
  options.make_engine = std::move(make);
  return options;
}

struct Log {
  std::vector<std::int64_t> items{1, 2, 3}, actions{0, 1, 3}, segment{2}, device{1}, targets{7, 999};
  std::vector<float> profile{0.5f, 1.0f}, prices{1.5f, 2.0f, 0.25f, 0.0f};

  std::vector<stca::Tensor> rest() const {
    const auto count = static_cast<std::int64_t>(targets.size());
    return {{"request_device", device}, {"target_item", targets}, {"target_price", prices.data(), {count, 2}}};
  }
  std::vector<stca::Tensor> events() const { return {{"history_item", items}, {"history_action", actions}}; }
  std::vector<stca::Tensor> all() const {
    std::vector<stca::Tensor> inputs = rest();
    for (const stca::Tensor& event : events()) inputs.push_back(event);
    inputs.insert(inputs.end(), {{"user_segment", segment}, {"user_profile", profile}});
    return inputs;
  }
  float first_score(float bias = 0) const { return 33.5f + bias; }
};
