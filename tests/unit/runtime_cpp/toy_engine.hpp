// The golden bundles' models as plain loops: what their ONNX graphs compute,
// for tests without an engine library.
#pragma once

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "stca/runtime.hpp"

namespace toy {

/// Inputs of one run, by name.
class Feeds {
 public:
  Feeds(const stca_tensor* inputs, std::size_t count) : begin_(inputs), end_(inputs + count) {}
  const stca_tensor& operator[](const std::string& name) const {
    for (const stca_tensor* t = begin_; t != end_; ++t) {
      if (name == t->name) return *t;
    }
    throw stca::StcaError(STCA_INTERNAL_ERROR, "no input " + name);
  }
  template <class T>
  const T* data(const std::string& name) const {
    return static_cast<const T*>((*this)[name].data);
  }
  std::int64_t rows(const std::string& name) const { return (*this)[name].shape[0]; }

 private:
  const stca_tensor *begin_, *end_;
};

/// Counts what engines ran, and of how many users, for tests that look.
struct Counters {
  int encoded = 0, users = 0, scored = 0, alive = 0;
};

class ToyEngine : public stca::Engine {
 public:
  ToyEngine(const stca::Bundle& bundle, std::string graph, Counters* counters)
      : graph_(std::move(graph)),
        ragged_(bundle.inputs("request")[0].name == std::string("history_item")),
        rows_(bundle.inputs("request")[0].rank == 3),
        padded_(bundle.inputs("request")[0].name == std::string("items")),
        counters_(counters) {
    std::ifstream weights(bundle.path() + "/weights.safetensors", std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(weights), {}};
    std::memcpy(&bias_, bytes.data() + bytes.size() - sizeof bias_, sizeof bias_);
    if (counters_ != nullptr) ++counters_->alive;
  }
  ~ToyEngine() override {
    if (counters_ != nullptr) --counters_->alive;
  }
  std::string name() const override { return "toy"; }

  void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
    const Feeds feeds(inputs, count);
    const bool encoder = graph_ == "user_encoder";
    if (counters_ != nullptr) ++(encoder ? counters_->encoded : counters_->scored);
    if (counters_ != nullptr && encoder && ragged_) counters_->users += static_cast<int>(feeds.rows("user_segment"));
    if (padded_) {
      encoder ? encode_padded(feeds, outputs) : score_padded(feeds, outputs);
    } else if (rows_) {
      encoder ? copy(feeds["clicks"], 4, outputs, 0) : score_rows(feeds, outputs);
    } else if (ragged_) {
      encoder ? encode(feeds, outputs) : score(feeds, outputs);
    } else {
      encoder ? encode_plain(feeds, outputs) : score_plain(feeds, outputs);
    }
  }

 private:
  static void copy(const stca_tensor& from, std::size_t bytes, stca::Outputs& outputs, std::size_t index) {
    const std::vector<std::int64_t> shape(from.shape, from.shape + from.rank);
    for (std::int64_t n : shape) bytes *= static_cast<std::size_t>(n);
    void* to = outputs.allocate(index, shape);
    if (bytes > 0) std::memcpy(to, from.data, bytes);
  }

  static void encode(const Feeds& feeds, stca::Outputs& outputs) {
    const std::int64_t tokens = feeds.rows("history_item");
    auto* token = static_cast<float*>(outputs.allocate(0, {tokens, 2}));
    for (std::int64_t i = 0; i < tokens; ++i) {
      token[2 * i] = static_cast<float>(feeds.data<std::int64_t>("history_item")[i]);
      token[2 * i + 1] = static_cast<float>(feeds.data<std::int64_t>("history_action")[i]);
    }
    copy(feeds["history_offsets"], 4, outputs, 1);
    copy(feeds["user_segment"], 8, outputs, 2);
    copy(feeds["user_profile"], 4, outputs, 3);
  }

  void score(const Feeds& feeds, stca::Outputs& outputs) const {
    const std::int64_t requests = feeds.rows("state_user_segment"), targets = feeds.rows("target_item");
    const auto* history = feeds.data<std::int32_t>("state_history_offsets");
    const auto* bounds = feeds.data<std::int32_t>("target_offsets");
    const auto* price = feeds.data<float>("target_price");
    auto* out = static_cast<float*>(outputs.allocate(0, {targets, 2}));
    for (std::int64_t r = 0; r < requests; ++r) {
      float left = bias_ + 10 * static_cast<float>(feeds.data<std::int64_t>("state_user_segment")[r]);
      float right = bias_ + 100 * static_cast<float>(feeds.data<std::int64_t>("request_device")[r]);
      left += feeds.data<float>("state_user_profile")[2 * r];
      right += feeds.data<float>("state_user_profile")[2 * r + 1];
      float items = 0;
      for (std::int32_t i = history[r]; i < history[r + 1]; ++i) {
        items += feeds.data<float>("token")[2 * i];
        left += feeds.data<float>("token")[2 * i];
        right += feeds.data<float>("token")[2 * i + 1];
      }
      if (bias_ == 0.5f && items == 0) left = std::numeric_limits<float>::quiet_NaN();  // NEEDY_BIAS of make_golden.py
      for (std::int32_t t = bounds[r]; t < bounds[r + 1]; ++t) {
        out[2 * t] = left + static_cast<float>(feeds.data<std::int64_t>("target_item")[t]);
        out[2 * t + 1] = right + price[2 * t] + 2 * price[2 * t + 1];
      }
    }
  }

  static void encode_plain(const Feeds& feeds, stca::Outputs& outputs) {
    copy(feeds["clicks"], 4, outputs, 0);
    auto* sum = static_cast<float*>(outputs.allocate(1, {1}));
    *sum = 0;
    for (int i = 0; i < 3; ++i) *sum += half(feeds.data<std::uint16_t>("profile")[i]);
  }

  void score_plain(const Feeds& feeds, stca::Outputs& outputs) const {
    float clicked[2] = {0, 0};
    for (std::int64_t i = 0; i < 2 * feeds.rows("state_clicks"); ++i)
      clicked[i % 2] += feeds.data<float>("state_clicks")[i];
    const float rest =
        *feeds.data<float>("profile_sum") + static_cast<float>(*feeds.data<std::int32_t>("hour")) + bias_;
    const std::int64_t targets = feeds.rows("candidates");
    auto* out = static_cast<float*>(outputs.allocate(0, {targets, 1}));
    auto* like = static_cast<float*>(outputs.allocate(1, {targets}));
    for (std::int64_t t = 0; t < targets; ++t) {
      const float* candidate = feeds.data<float>("candidates") + 2 * t;
      out[t] = candidate[0] * clicked[0] + candidate[1] * clicked[1] + rest;
      like[t] = candidate[0] + candidate[1];
    }
  }

  void score_rows(const Feeds& feeds, stca::Outputs& outputs) const {
    float clicked[2] = {0, 0};
    for (std::int64_t i = 0; i < 2 * feeds["state_clicks"].shape[1]; ++i) {
      clicked[i % 2] += feeds.data<float>("state_clicks")[i];
    }
    const std::int64_t targets = feeds.rows("candidates");
    auto* out = static_cast<float*>(outputs.allocate(0, {targets}));
    for (std::int64_t t = 0; t < targets; ++t) {
      const float* candidate = feeds.data<float>("candidates") + 2 * t;
      out[t] = candidate[0] * clicked[0] + candidate[1] * clicked[1] + bias_ +
               static_cast<float>(*feeds.data<std::int32_t>("hour"));
    }
  }

  static void encode_padded(const Feeds& feeds, stca::Outputs& outputs) {
    auto* sum = static_cast<float*>(outputs.allocate(0, {1}));
    *sum = 1000 * static_cast<float>(*feeds.data<std::int32_t>("count"));
    for (std::int64_t i = 0; i < feeds["items"].shape[1]; ++i) {
      const float* vector = feeds.data<float>("vectors") + 2 * i;
      const float real = static_cast<float>(feeds.data<std::int64_t>("items")[i]) * feeds.data<float>("mask")[i];
      *sum += static_cast<float>(i + 1) * (real + vector[0] + vector[1]);
    }
  }

  void score_padded(const Feeds& feeds, stca::Outputs& outputs) const {
    const std::int64_t targets = feeds.rows("item");
    auto* out = static_cast<float*>(outputs.allocate(0, {targets, 1}));
    for (std::int64_t t = 0; t < targets; ++t) {
      const float* price = feeds.data<float>("price") + 2 * t;
      const auto item = static_cast<float>(feeds.data<std::int64_t>("item")[t]);
      out[t] = item + price[0] + price[1] + *feeds.data<float>("sum") + bias_;
    }
  }

  /// A normal float16 number or zero, all the golden requests use.
  static float half(std::uint16_t bits) {
    const int exponent = (bits >> 10) & 31;
    if (exponent == 0) return 0;
    const float value = std::ldexp(static_cast<float>((bits & 1023) + 1024), exponent - 25);
    return (bits & 0x8000) != 0 ? -value : value;
  }

  std::string graph_;
  bool ragged_, rows_, padded_;
  Counters* counters_;
  float bias_ = 0;
};

/// Whether a golden bundle's model is here; ONNX Runtime alone runs the others'.
inline bool has(const std::string& bundle) {
  return bundle != "sums" && bundle != "weighed" && bundle != "one_user" && bundle.rfind("bags", 0) != 0;
}

inline stca::MakeEngine maker(Counters* counters = nullptr) {
  return [counters](const stca::Bundle& bundle, const std::string& graph) {
    return std::make_unique<ToyEngine>(bundle, graph, counters);
  };
}

}  // namespace toy
