#include "description.h"

#include <stdexcept>

namespace metafast {

namespace {

bool elementwise(int kind) {
  switch (kind) {
    case static_cast<int>(Kind::relu):
    case static_cast<int>(Kind::leaky_relu):
    case static_cast<int>(Kind::tanh):
    case static_cast<int>(Kind::sigmoid):
    case static_cast<int>(Kind::gelu):
    case static_cast<int>(Kind::add):
    case flatten:
      return true;
    default:
      return false;
  }
}

}  // namespace

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
    p.at = next(), p.size = next();
    p.adapted = next() != 0;
  }
  for (Node& n : nodes) {
    n.kind = next();
    for (int& v : n.input) v = next();
    for (int& v : n.param) v = next();
    n.constants = next();
    for (double& v : n.option) v = real();
  }
}

std::vector<bool> Description::divisible() const {
  std::vector<bool> out(nodes.size() + 1, true);
  out[0] = out[output] = false;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = 0; k < nodes.size(); ++k) {
      const Node& n = nodes[k];
      const bool product = n.kind == linear || n.kind == static_cast<int>(Kind::conv2d);
      if (product) continue;  // it can take what is divided and make what is not
      const int values[3] = {static_cast<int>(k) + 1, n.input[0], n.input[1] < 0 ? n.input[0] : n.input[1]};
      bool all = elementwise(n.kind);
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
