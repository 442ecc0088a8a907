// A model as metafast/executors/native/encode.py writes it down, in numbers:
//   loss, output, height, width and channels of the input, parameters, nodes
//   of each parameter: offset, size, adapted
//   of each node: kind, two inputs, two parameters, where its constants begin, options, and the options themselves
#pragma once
#include <vector>

#include "../program.h"

namespace metafast {

struct Parameter {
  int64_t at, size;  // elements of the user's flat vector
  bool adapted;
};

struct Node {
  Kind kind;
  int input[2];                 // values; input[1] < 0: none
  int param[2];                 // parameters, a weight and a bias; negative: none
  int64_t constants;            // where its constants begin among those of all nodes
  std::vector<double> options;  // as `make` of its kind reads them
};

// Value 0 is the input, value k + 1 what node k makes.
struct Description {
  // Throws std::runtime_error where numbers are missing.
  explicit Description(const std::vector<double>& numbers);

  // By value: can the blocks that run a task together each have some of its features? Not where rules read whole
  // samples: of the input, of what the loss reads, and of norms.
  std::vector<bool> divisible() const;

  LossKind loss;
  int output;  // the value that is the model's
  Grid input;  // without padding or border
  std::vector<Parameter> parameters;
  std::vector<Node> nodes;
};

}  // namespace metafast
