// The kernels' code on the CPU, one block and one thread after another, in memory that is NaN at first and watched.
#define METAFAST_NAMESPACE metafast::twin
#include <algorithm>
#include <limits>

#include "launch.h"
#include "sum.cuh"
#include "walk.cuh"

namespace metafast {

template <class T>
void twin_run(const BlockJob<T>& job, const BlockShape& shape) {
  using twin::Quad;
  const int64_t size = shape.bytes / static_cast<int64_t>(sizeof(T));
  std::vector<Quad<T>> memory((size + 3) / 4);
  T* base = memory[0].of;
  for (int64_t block = 0; block < shape.blocks; ++block) {
    std::fill(base, base + size, std::numeric_limits<T>::quiet_NaN());
    const twin::Watch watch(base, shape.bytes);
    twin::Walk<T> walk(job, shape.threads, base, block);
    for (int64_t task = block; task < job.tasks; task += shape.blocks) walk.run(task);
  }
}

template <class T>
void twin_sum(const Sum<T>& sum) {
  for (int64_t row = 0; row < sum.rows; ++row) {
    for (int64_t column = 0; column < sum.width; ++column) {
      T total = 0;
      for (int way = 0; way < twin::ways; ++way) total += twin::sum_way(sum, row, column, way);
      sum.out[row * sum.width + column] = total * sum.scale;
    }
  }
}

template void twin_run(const BlockJob<float>&, const BlockShape&);
template void twin_run(const BlockJob<double>&, const BlockShape&);
template void twin_sum(const Sum<float>&);
template void twin_sum(const Sum<double>&);

}  // namespace metafast
