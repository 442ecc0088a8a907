// A model as metafast/executors/native/encode.py writes it down, in numbers.
#pragma once
#include <vector>

#include "../program.h"

namespace metafast {

// Kinds of nodes: those of program.h, and the ones that become others in a plan.
enum NodeKind { linear = 100, flatten = 101, adaptive_avg_pool2d = 102 };

struct Parameter {
  int64_t at, size;
  bool adapted;
};

struct Node {
  int kind, input[2], param[2];
  int64_t constants;
  double option[10];
};

// Value 0 is the input, value k + 1 what node k makes.
struct Description {
  // Throws std::runtime_error where numbers are missing.
  explicit Description(const std::vector<double>& numbers);

  // By value: can the blocks that run a task together each have some of its features? Not where rules read whole
  // samples: of the input, of what the loss reads, and of norms.
  std::vector<bool> divisible() const;

  LossKind loss;
  int output;
  Grid input;
  std::vector<Parameter> parameters;
  std::vector<Node> nodes;
};

}  // namespace metafast
