// The kernels' code on the CPU, one block and one thread after another, in memory that is NaN at first and watched.
#define METAFAST_NAMESPACE metafast::twin
#include <algorithm>
#include <limits>

#include "../launch.h"
#include "../sum.cuh"
#include "../inner_loop.cuh"

namespace metafast {

namespace {

template <class T, bool by_rule, class Cluster>
void run_block(const BlockJob<T>& job, const BlockShape& shape, const Cluster& cluster, int64_t block,
               std::vector<twin::RaceChecker*>& checkers) {
  const int64_t size = shape.bytes / static_cast<int64_t>(sizeof(T));
  std::vector<twin::Quad<T>> memory((size + 3) / 4);
  T* base = memory[0].of;
  std::fill(base, base + size, std::numeric_limits<T>::quiet_NaN());
  const twin::RaceChecker checker(base, shape.bytes, cluster.rank(), checkers);
  twin::InnerLoopRun<T, Cluster, by_rule>(job, cluster, shape.threads, base, block).run(shape.blocks);
}

template <class T, bool by_rule>
void run_blocks(const BlockJob<T>& job, const BlockShape& shape) {
  std::vector<twin::RaceChecker*> checkers(shape.cluster);
  for (int64_t first = 0; first < shape.blocks; first += shape.cluster) {
    if (shape.cluster == 1) {
      run_block<T, by_rule>(job, shape, twin::SingleBlock{}, first, checkers);
      continue;
    }
    twin::RoundRobin round_robin(shape.cluster);
    round_robin.run([&](int rank) {
      run_block<T, by_rule>(job, shape, twin::BlockCluster(round_robin, rank), first + rank, checkers);
    });
  }
}

}  // namespace

template <class T>
void twin_run(const BlockJob<T>& job, const BlockShape& shape) {
  takes_a_rule(job) ? run_blocks<T, true>(job, shape) : run_blocks<T, false>(job, shape);
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
