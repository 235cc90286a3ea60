// Which bundle may take another's place.
#include "error.hpp"
#include "request.hpp"
#include "text.hpp"

namespace stca::core {

void check_swap(const std::string& bundle, const Manifest& served, const Manifest& other) {
  const auto refuse = [&](const std::string& what, const std::string& in_it, const std::string& there) {
    bundle_error(shown(bundle), ": cannot take the place of the bundle being served: ", what, " is ", in_it, " in it, ",
                 there, " there; load it as a session of its own");
  };
  const std::vector<TensorSpec>&old = served.graph("request").inputs, &fresh = other.graph("request").inputs;
  const auto input = [](const std::vector<TensorSpec>& specs, const std::string& name) -> std::string {
    for (const TensorSpec& spec : specs) {
      if (spec.name != name) continue;
      return std::string(dtype_name(spec.dtype)) + " " + spec.shape_text() + " of scope " + scope_name(spec.scope);
    }
    return "missing";
  };
  for (const auto* specs : {&old, &fresh}) {
    for (const TensorSpec& spec : *specs) {
      const std::string there = input(old, spec.name), in_it = input(fresh, spec.name);
      if (there != in_it) refuse("input " + in_quotes(spec.name), in_it, there);
    }
  }
  const auto outputs = [](const Manifest& manifest) {
    std::string text;
    for (TensorSpec spec : manifest.graph("request").outputs) {
      for (Axis& axis : spec.shape) {
        if (!axis.symbol.empty()) axis.symbol = "*";  // symbolic sizes of outputs are names that an exporter made up
      }
      text += std::string(text.empty() ? "" : ", ") + dtype_name(spec.dtype) + " " + spec.shape_text();
    }
    return text;
  };
  if (outputs(served) != outputs(other)) refuse("the output", outputs(other), outputs(served));
}

}  // namespace stca::core
