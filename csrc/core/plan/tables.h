// Where the rows of a convolution's factors lie in an image, worked out once for all samples and steps.
#pragma once
#include <memory>
#include <vector>

#include "../program.h"

namespace metafast {

// Owns the tables that the operations of a Program point to.
class Tables {
 public:
  // Fills in what a convolution of known window and grids reads, writes and sums; with `backward` also for the adjoint
  // of its input.
  void tabulate(Op& op, bool backward);

 private:
  const int32_t* table(std::vector<int32_t> values);
  const GatherTable* gather(std::vector<GatherTable> values);
  void tabulate_backward(Op& op);

  std::vector<std::unique_ptr<std::vector<int32_t>>> tables_;
  std::vector<std::unique_ptr<std::vector<GatherTable>>> gathers_;
};

}  // namespace metafast
