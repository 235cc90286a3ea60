// An engine that does what the manifest says of its graph and computes nothing: each output has the sizes that the
// inputs decide, and values that count up from one.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "stca/runtime.hpp"
#include "visit.hpp"

namespace spec {

/// Called before each run, with the graph's name.
using Hook = std::function<void(const std::string& graph)>;
/// What an output of a graph is filled with: `value(graph, output, element)`.
using Value = std::function<double(const std::string&, std::size_t, std::size_t)>;

class Engine : public stca::Engine {
 public:
  Engine(const stca::Bundle& bundle, std::string graph, Hook hook, Value value)
      : graph_(std::move(graph)),
        takes_(bundle.inputs(graph_)),
        gives_(bundle.outputs(graph_)),
        hook_(std::move(hook)),
        value_(std::move(value)) {}
  std::string name() const override { return "spec"; }

  void run(const stca_tensor* inputs, std::size_t count, stca::Outputs& outputs) override {
    if (hook_) hook_(graph_);
    std::map<std::string, std::int64_t> sizes;
    for (std::size_t i = 0; i < count; ++i) {
      for (int axis = 0; axis < takes_[i].rank; ++axis) {
        if (takes_[i].symbol[axis] != nullptr) sizes[takes_[i].symbol[axis]] = inputs[i].shape[axis];
      }
    }
    for (std::size_t i = 0; i < gives_.size(); ++i) {
      std::vector<std::int64_t> shape(gives_[i].shape, gives_[i].shape + gives_[i].rank);
      std::size_t elements = 1;
      for (int axis = 0; axis < gives_[i].rank; ++axis) {
        auto& size = shape[static_cast<std::size_t>(axis)];
        if (gives_[i].symbol[axis] != nullptr) {
          const auto known = sizes.find(gives_[i].symbol[axis]);
          size = known == sizes.end() ? 1 : known->second;
        }
        elements *= static_cast<std::size_t>(size);
      }
      fill(i, elements, outputs.allocate(i, shape));
    }
  }

 private:
  void fill(std::size_t output, std::size_t elements, void* data) const {
    const auto dtype = static_cast<stca_dtype>(gives_[output].dtype);
    const auto value = [&](std::size_t i) { return value_ ? value_(graph_, output, i) : static_cast<double>(i + 1); };
    if (dtype >= STCA_FLOAT16 && dtype <= STCA_FLOAT64) {
      stca::core::visit_floating(dtype, [&](auto type) {
        for (std::size_t i = 0; i < elements; ++i) {
          static_cast<decltype(type)*>(data)[i] = stca::core::from_double<decltype(type)>(value(i));
        }
      });
    } else if (dtype == STCA_BOOL) {
      for (std::size_t i = 0; i < elements; ++i) static_cast<bool*>(data)[i] = true;
    } else {
      stca::core::visit_integer(dtype, [&](auto type) {
        for (std::size_t i = 0; i < elements; ++i) static_cast<decltype(type)*>(data)[i] = 1;
      });
    }
  }

  std::string graph_;
  std::vector<stca_tensor_spec> takes_, gives_;
  Hook hook_;
  Value value_;
};

inline stca::MakeEngine maker(Hook hook = {}, Value value = {}) {
  return [hook, value](const stca::Bundle& bundle, const std::string& graph) {
    return std::make_unique<Engine>(bundle, graph, hook, value);
  };
}

}  // namespace spec
