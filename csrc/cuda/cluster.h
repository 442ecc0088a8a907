// The blocks that run a task together. Each has all activations, and of each weight some of the columns: what it makes
// of its columns it writes into the others' memory. Between two barriers of theirs, what one block writes no other may
// touch; nothing is written behind the last one, so that a block may end when it has passed it.
#pragma once
#include "threads.h"
#ifndef __CUDACC__
#include "twin/round_robin.h"
#endif

namespace METAFAST_NAMESPACE {

// A block that runs its tasks by itself.
struct SingleBlock {
  static constexpr bool single = true;
  METAFAST_DEVICE int size() const { return 1; }
  METAFAST_DEVICE int rank() const { return 0; }
  METAFAST_DEVICE void barrier() const {}
  template <class T>
  METAFAST_DEVICE T* at(T* p, int) const {
    return p;
  }
};

// Distributed shared memory: PTX ISA, "mapa" and "barrier.cluster". For compute capability 9.0 and later.
class BlockCluster {
 public:
  static constexpr bool single = false;

#ifdef __CUDACC__
  __device__ int size() const {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
  }

  __device__ int rank() const {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
  }

  // By all threads of all blocks.
  __device__ void barrier() const {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }

  // What lies in the block of that rank where p lies in this one.
  template <class T>
  __device__ T* at(T* p, int rank) const {
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return there;
  }
#else
  BlockCluster(RoundRobin& round_robin, int rank) : round_robin(round_robin), rank_(rank) {}
  int size() const { return round_robin.count(); }
  int rank() const { return rank_; }
  void barrier() const {
    round_robin.barrier(rank_);
    RaceChecker::cluster_barrier();
  }
  template <class T>
  T* at(T* p, int rank) const {
    return RaceChecker::peer(p, rank);
  }

 private:
  RoundRobin& round_robin;
  int rank_;
#endif
};

}  // namespace METAFAST_NAMESPACE
