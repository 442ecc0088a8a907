// A block as the Machine that takes steps by rules: it works on whole vectors of parameters, those of a task or, in a
// cluster, a block's part of them.
#pragma once
#include "../core/steps/rule_step.h"
#include "block_machine.cuh"

namespace METAFAST_NAMESPACE {

template <class T, class Cluster>
class ParameterMachine : public BlockMachine<T, Cluster> {
  using Base = BlockMachine<T, Cluster>;

 public:
  // `size` elements, of which the first `common` are those that all blocks of the cluster have alike; `partials`:
  // memory for a number of each sum.
  METAFAST_DEVICE ParameterMachine(const Base& block, int64_t size, int64_t common, T* partials)
      : Base(block),
        before(this->cluster.rank() * size),
        owned_from(this->cluster.rank() == 0 ? 0 : common),
        partials(partials) {}

  static METAFAST_DEVICE T sqrt(T x) { return std::sqrt(x); }

  template <class F>
  METAFAST_DEVICE void once(const F& f) const {
    this->each(1, [&](long) { f(); });
  }

  // Of an inner vector of all blocks, in global memory.
  METAFAST_DEVICE T load_shared(const T* p, long i) const { return p[before + i]; }

  template <class F>
  static METAFAST_DEVICE T by_task(const F& f) {
    return static_cast<T>(f(0));
  }

  // Calls f(i, sums) for each element, and gives the sums over those of all blocks; what these have alike counts once.
  template <int K, class F>
  METAFAST_DEVICE void totals(long size, const StepRule<T>&, double*, double (&out)[K][1], const F& f) const {
    static_assert(K <= max_warps, "partials have room for so many");
    T sums[K];
    this->threads.sums(sums, [&](int thread, T* mine) {
      for (int i = thread; i < static_cast<int>(size); i += this->threads.count()) {
        T parts[K] = {};
        f(i, parts);
        for (int k = 0; k < K && i >= owned_from; ++k) mine[k] += parts[k];
      }
    });
    if constexpr (Cluster::single) {
      for (int k = 0; k < K; ++k) out[k][0] = sums[k];
    } else {
      once([&] {
        for (int k = 0; k < K; ++k) Base::store(partials + k, sums[k]);
      });
      this->cluster.barrier();
      this->threads.run([&](int) {
        for (int k = 0; k < K; ++k) {
          out[k][0] = 0;
          for (int rank = 0; rank < this->cluster.size(); ++rank)
            out[k][0] += Base::load(this->cluster.at(partials + k, rank));
        }
      });
      this->cluster.barrier();
    }
  }

 private:
  int64_t before;  // elements of the blocks before this one
  int64_t owned_from;
  T* partials;
};

}  // namespace METAFAST_NAMESPACE
