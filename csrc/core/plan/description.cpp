#include "description.h"

#include <stdexcept>

#include "planned_kinds.h"

namespace metafast {

Description::Description(const std::vector<double>& numbers) {
  size_t cursor = 0;
  const auto real = [&] {
    if (cursor >= numbers.size()) throw std::runtime_error("the description of the model ends early");
    return numbers[cursor++];
  };
  const auto next = [&] { return static_cast<int>(real()); };
  loss = static_cast<LossKind>(next());
  output = next();
  input = {next(), next(), next(), 0};
  parameters.resize(next());
  nodes.resize(next());
  for (Parameter& p : parameters) {
    p.at = next();
    p.size = next();
    p.adapted = next() != 0;
  }
  for (Node& n : nodes) {
    n.kind = static_cast<Kind>(next());
    if (n.kind != Kind::flatten && !facts(planning::operation(n.kind)).name) {
      throw std::runtime_error("the description has a kind of layer that this build does not know");
    }
    for (int& v : n.input) v = next();
    for (int& v : n.param) v = next();
    n.constants = next();
    n.options.resize(next());
    for (double& v : n.options) v = real();
  }
}

std::vector<bool> Description::divisible() const {
  std::vector<bool> out(nodes.size() + 1, true);
  out[0] = out[output] = false;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = 0; k < nodes.size(); ++k) {
      const Node& n = nodes[k];
      const Features features = n.kind == Kind::flatten ? Features::own : facts(planning::operation(n.kind)).features;
      if (features == Features::products) continue;  // it can take what is divided and make what is not
      const int values[3] = {static_cast<int>(k) + 1, n.input[0], n.input[1] < 0 ? n.input[0] : n.input[1]};
      bool all = features == Features::own;
      for (int v : values) all = all && out[v];
      for (int v : values) {
        changed = changed || (out[v] && !all);
        out[v] = out[v] && all;
      }
    }
  }
  return out;
}

}  // namespace metafast
