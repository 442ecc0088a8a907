// Operations in a row that one rule can do at once.
#pragma once
#include <vector>

#include "../program.h"

namespace metafast {

// Batch norm, ReLU and 2x2 max-pooling in a row, read by nothing else, become one operation. `output`: the value that
// is the model's.
std::vector<Op> fused(const std::vector<Op>& ops, int output);

}  // namespace metafast
