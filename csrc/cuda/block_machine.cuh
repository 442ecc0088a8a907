// The Machine that is a thread block, alone or with others of its cluster. What the rules touch lies in the block's
// shared memory; each primitive spreads its elements over the threads and ends with a barrier. The blocks of a cluster
// share the columns of each weight, and the features of those values that are divided (description.h): what of them a
// product needs besides its own, a block fetches from the others. Undivided values all blocks have, and work out,
// alike.
#pragma once
#include <cmath>
#include <type_traits>

#include "../core/layers/context.h"
#include "cluster.h"
#include "block_job.h"

namespace METAFAST_NAMESPACE {

// Four neighbours, read and written at once.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T of[4];

  METAFAST_DEVICE void add(T a, const Quad& b) {
    for (int i = 0; i < 4; ++i) of[i] += a * b.of[i];
  }
  METAFAST_DEVICE void add_dot(T& sum, const Quad& b) const {
    for (int i = 0; i < 4; ++i) sum += of[i] * b.of[i];
  }
};

// Four neighbours in global memory.
template <class T>
METAFAST_DEVICE auto* global4(T* p) {
  using Quads = std::conditional_t<std::is_const_v<T>, const Quad<std::remove_const_t<T>>, Quad<T>>;
#ifndef __CUDACC__
  RaceChecker::expect_aligned(reinterpret_cast<uintptr_t>(p), sizeof(Quads));
#endif
  return reinterpret_cast<Quads*>(p);
}

template <class T>
struct Factors;

// Of a row of quads those that a block has.
struct QuadRange {
  int first, count;
};

template <class T, class Cluster>
class BlockMachine {
 public:
  using Real = T;
  using Pack = T;
  static constexpr int lanes = 1;
  static constexpr int tasks = 1;  // that run at once
  using Loss = double;
  static constexpr int pack = 4;  // features are padded to whole quads

  static constexpr uint32_t offers = block_offers;

  using Term = METAFAST_NAMESPACE::Term<T>;
  using Pair = METAFAST_NAMESPACE::Pair<T>;

  // `common`: memory for what the blocks of a cluster exchange.
  METAFAST_DEVICE BlockMachine(const Cluster& cluster, Precision precision, int threads, T* partials, T* common)
      : precision(precision), common(common), cluster(cluster), threads(threads, partials) {}

  // Traces are of the CPU's time.
  METAFAST_DEVICE void begin(SpanKind, int) const {}
  METAFAST_DEVICE void end() const {}

  template <class E>
  static METAFAST_DEVICE E load_one(const E* p) {
    return *checked(p, 1, false);
  }
  template <class E>
  static METAFAST_DEVICE void store_one(E* p, E v) {
    *checked(p, 1, true) = v;
  }
  static METAFAST_DEVICE T load(const T* p) { return load_one(p); }
  static METAFAST_DEVICE void store(T* p, T v) { store_one(p, v); }
  static METAFAST_DEVICE void put(T* p, T v, bool add) { store(p, add ? load(p) + v : v); }
  static METAFAST_DEVICE Quad<T> load4(const T* p) {
    return *reinterpret_cast<const Quad<T>*>(checked(p, pack, false));
  }
  static METAFAST_DEVICE void store4(T* p, const Quad<T>& v) {
    *reinterpret_cast<Quad<T>*>(checked(p, pack, true)) = v;
  }

  static METAFAST_DEVICE T broadcast(T x) { return x; }
  static METAFAST_DEVICE T select(bool mask, T a, T b) { return mask ? a : b; }
  static METAFAST_DEVICE T first(T v, int count) { return count > 0 ? v : T(0); }
  static METAFAST_DEVICE T exp(T x) { return std::exp(x); }
  static METAFAST_DEVICE T log(T x) { return std::log(x); }
  static METAFAST_DEVICE T tanh(T x) { return std::tanh(x); }
  static METAFAST_DEVICE T erf(T x) { return std::erf(x); }
  static METAFAST_DEVICE T rsqrt(T x) { return 1 / std::sqrt(x); }

  template <class F>
  METAFAST_DEVICE void each(long size, const F& f) const {
    threads.run([&](int thread) {
      for (int i = thread; i < static_cast<int>(size); i += threads.count()) f(i);
    });
  }

  // f() does several things of which none reads what another one writes: a barrier behind all of them is enough. What
  // the blocks of a cluster exchange goes through one piece of memory, so there each has its own.
  template <class F>
  METAFAST_DEVICE void together(const F& f) const {
    if constexpr (Cluster::single) {
      threads.without_barriers(f);
      threads.barrier();
    } else {
      f();
    }
  }

  // f() does what nobody waits for: whoever needs what it writes, or writes what it reads, comes behind another
  // barrier.
  template <class F>
  METAFAST_DEVICE void ahead(const F& f) const {
    threads.without_barriers(f);
  }

  // f(i) for every fourth i: the function takes quads.
  template <class F>
  METAFAST_DEVICE void each4(long size, const F& f) const {
    each(size / pack, [&](long i) { f(i * pack); });
  }

  template <class F>
  METAFAST_DEVICE void rows(int n, const F& f) const {
    each(n, [&](long s) { f(static_cast<int>(s), 0); });
  }

  template <class F>
  METAFAST_DEVICE void samples(int n, const F& f) const {
    threads.run_warps(n, f);
  }

  template <class F>
  METAFAST_DEVICE T total(long size, const F& f) const {
    return threads.sum([&](int thread) {
      T sum = 0;
      for (int i = thread; i < static_cast<int>(size); i += threads.count()) sum += f(i);
      return sum;
    });
  }

  template <class F>
  METAFAST_DEVICE T total(long size, int, const F& f) const {
    return total(size, f);
  }

  template <class F>
  METAFAST_DEVICE T sum_rows(int n, const F& f) const {
    return total(n, [&](long s) { return f(static_cast<int>(s), 0); });
  }

  // out[k][channel] = sum over rows of K quantities.
  template <int K, class F>
  METAFAST_DEVICE void reduce(long rows, int ld, T* out, bool add, const F& f) const {
    each(ld, [&](long ch) {
      const auto at_row = f(static_cast<int>(ch));
      T sum[K] = {};
      for (long row = 0; row < rows; ++row) at_row(row * ld + ch, sum);
      for (int k = 0; k < K; ++k) put(out + static_cast<long>(k) * ld + ch, sum[k], add);
    });
  }

  METAFAST_DEVICE void clear_padding(const Grid& grid, int n, T* y) const {
    if (grid.c == grid.ld) return;
    const int count = divided(grid) ? grid.c - cluster.rank() * grid.ld : grid.c;
    each(static_cast<long>(n) * grid.h * grid.w * grid.ld, [&](long i) {
      if (i % grid.ld >= count) store(y + i, 0);
    });
  }

  // y = sum of terms a W, plus a bias.
  METAFAST_DEVICE void correlate(const Op& op, int n, const Term* terms, int count, const T* bias, T* y) const;
  // g_x (+)= sum of terms a W'.
  METAFAST_DEVICE void correlate_transposed(const Op& op, int n, const Term* terms, int count, T* g_x, bool add) const;
  // g_W += sum of pairs x' g.
  METAFAST_DEVICE void outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const;

 private:
  static METAFAST_DEVICE bool divided(const Grid& grid) { return !Cluster::single && grid.c > grid.ld; }

  // Elements of a row of all blocks.
  METAFAST_DEVICE int width(const Grid& grid) const { return divided(grid) ? grid.ld * cluster.size() : grid.ld; }

  // Of so many quads; no block has more than the first.
  METAFAST_DEVICE int largest_share(int quads) const { return (quads + cluster.size() - 1) / cluster.size(); }
  METAFAST_DEVICE QuadRange share(int quads) const {
    const int largest = largest_share(quads), first = cluster.rank() * largest, left = quads - first;
    return {first, left < 0 ? 0 : left < largest ? left : largest};
  }

  // Of the outputs of a product those that this block makes, in its row of them.
  METAFAST_DEVICE QuadRange columns(const Grid& y) const {
    return divided(y) ? QuadRange{0, y.ld / pack} : share(y.ld / pack);
  }

  // From row to row of a weight, as plan.cpp lays them out.
  METAFAST_DEVICE int stride(const Grid& y) const { return (largest_share(width(y) / pack) | 1) * pack; }

  // In all blocks of the cluster, where p lies in this one.
  METAFAST_DEVICE void store4_everywhere(T* p, const Quad<T>& v) const {
    for (int rank = 0; rank < cluster.size(); ++rank) store4(cluster.at(p, rank), v);
  }
  METAFAST_DEVICE void store_everywhere(T* p, T v) const {
    for (int rank = 0; rank < cluster.size(); ++rank) store(cluster.at(p, rank), v);
  }

  METAFAST_DEVICE void gather(const Grid& grid, int n, const T*& one, const T*& other, bool two) const;
  METAFAST_DEVICE const T* fetch(const Grid& grid, int n, const T* from, T* to) const;
  METAFAST_DEVICE void add_parts(const Grid& grid, int n, T* to, bool add) const;

  template <class F>
  METAFAST_DEVICE void tiles(int n, int columns, const F& f) const;
  template <class Start, class Finish>
  METAFAST_DEVICE bool on_tensor_cores(const Factors<T>& f, const Start& start, const Finish& finish) const;

  // On a GPU, a pointer that is known to lead into shared memory, so that loops read there without asking each time.
  static METAFAST_DEVICE const T* in_shared_memory(const T* p) {
#ifdef __CUDACC__
    uint32_t place;
    asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(place) : "l"(p));
    return static_cast<const T*>(__cvta_shared_to_generic(place));
#else
    return p;
#endif
  }

  template <class P>
  static METAFAST_DEVICE P* checked(P* p, [[maybe_unused]] int count, [[maybe_unused]] bool writes) {
#ifndef __CUDACC__
    writes ? RaceChecker::write(p, count * sizeof(P)) : RaceChecker::read(p, count * sizeof(P));
#endif
    return p;
  }

  Precision precision;
  T* common;

 protected:
  Cluster cluster;
  Threads<T> threads;
};

}  // namespace METAFAST_NAMESPACE
