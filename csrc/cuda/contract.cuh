// The contractions of a linear layer in register tiles: some rows of a sample matrix times a quad of columns, a quad of
// the sum at a time. A weight [inputs][outputs] has rows an odd number of quads apart, so neighbouring threads meet no
// bank conflict along either axis. The order of each sum is that of the indices, whatever the tiles; of a sum over the
// columns that the blocks of a cluster share, that of their ranks.
#pragma once
#include "exchange.cuh"
#include "multiply.cuh"

namespace METAFAST_NAMESPACE {

template <int R>
using RowCount = std::integral_constant<int, R>;

// f(rows in a tile, first row, column) for all tiles: the fewest rows that keep every thread to a single tile.
template <class T, class Cluster>
template <class F>
METAFAST_DEVICE void BlockMachine<T, Cluster>::tiles(int n, int columns, const F& f) const {
  const auto run = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    const int count = (n + R - 1) / R * columns;
    threads.run([&](int thread) {
      for (int tile = thread; tile < count; tile += threads.count()) f(rows, tile / columns * R, tile % columns);
    });
  };
  if (n * columns <= threads.count()) return run(RowCount<1>{});
  if ((n + 1) / 2 * columns <= threads.count()) return run(RowCount<2>{});
  run(RowCount<4>{});
}

template <class T, class Cluster>
METAFAST_DEVICE void BlockMachine<T, Cluster>::correlate(const Op& op, int n, const Term* terms, int count,
                                                         const T* bias, T* y) const {
  const int depth = width(op.x), ld = op.y.ld, step = stride(op.y);
  const QuadRange own = columns(op.y);
  const bool all = !Cluster::single && !divided(op.y);
  const T *x = terms[0].a, *other = count > 1 ? terms[1].a : x;
  gather(op.x, n, x, other, count > 1);
  const Term one{in_shared_memory(x), in_shared_memory(terms[0].weights)};
  const Term two{in_shared_memory(other), count > 1 ? in_shared_memory(terms[1].weights) : one.weights};
  const int first = own.first * pack;
  const auto start = [&](int, int j) { return bias ? load(bias + first + j) : T(0); };
  const auto finish = [&](int i, int j, T v) {
    T* const to = y + i * ld + first + j;
    all ? store_everywhere(to, v) : store(to, v);
  };
  if (all) cluster.barrier();
  const Factors<T> factors{n,     own.count * pack, depth, {depth, 1}, {step, 1}, count,
                           one.a, one.weights,      two.a, two.weights};
  if (!on_tensor_cores(factors, start, finish)) {
    tiles(n, own.count, [&](auto rows, int row, int tile) {
      constexpr int R = decltype(rows)::value;
      const int column = (own.first + tile) * pack;
      Quad<T> sum[R];
      for (int r = 0; r < R; ++r) sum[r] = bias ? load4(bias + column) : Quad<T>{};
      for (int t = 0; t < count; ++t) {
        const T *a = t ? two.a : one.a, *weights = (t ? two.weights : one.weights) + tile * pack;
        for (int k = 0; k < depth; k += pack, weights += pack * step) {
          Quad<T> w[pack];
          for (int j = 0; j < pack; ++j) w[j] = load4(weights + j * step);
          for (int r = 0; r < R; ++r) {
            const Quad<T> x = load4(a + (row + r < n ? row + r : row) * depth + k);
            for (int j = 0; j < pack; ++j) sum[r].add(x.of[j], w[j]);
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        T* const to = y + (row + r) * ld + column;
        if (row + r < n) all ? store4_everywhere(to, sum[r]) : store4(to, sum[r]);
      }
    });
  }
  if (all) cluster.barrier();
}

template <class T, class Cluster>
METAFAST_DEVICE void BlockMachine<T, Cluster>::correlate_transposed(const Op& op, int n, const Term* terms, int count,
                                                                    T* g_x, bool add) const {
  const int outputs = op.y.ld, ld = width(op.x), step = stride(op.y), columns = ld / pack;
  const QuadRange own = this->columns(op.y);
  const int depth = own.count * pack, first = own.first * pack;
  T* const to = Cluster::single ? g_x : common;
  const Term one{in_shared_memory(terms[0].a) + first, in_shared_memory(terms[0].weights)};
  const Term two{count > 1 ? in_shared_memory(terms[1].a) + first : one.a,
                 count > 1 ? in_shared_memory(terms[1].weights) : one.weights};
  const Factors<T> factors{n, ld, depth, {outputs, 1}, {1, step}, count, one.a, one.weights, two.a, two.weights};
  const auto start = [](int, int) { return T(0); };
  const auto finish = [&](int i, int j, T v) { put(to + i * ld + j, v, Cluster::single && add); };
  if (!on_tensor_cores(factors, start, finish)) {
    tiles(n, columns, [&](auto rows, int row, int column) {
      constexpr int R = decltype(rows)::value;
      T sum[R][pack] = {};
      for (int t = 0; t < count; ++t) {
        const T *a = t ? two.a : one.a, *weights = (t ? two.weights : one.weights) + column * step;
        for (int k = 0; k < depth; k += pack) {
          Quad<T> w[pack];  // rows of W a quarter of them apart: neighbours in the block read neighbouring ones
          for (int j = 0; j < pack; ++j) w[j] = load4(weights + j * columns * step + k);
          for (int r = 0; r < R; ++r) {
            const Quad<T> g = load4(a + (row + r < n ? row + r : row) * outputs + k);
            for (int j = 0; j < pack; ++j) g.add_dot(sum[r][j], w[j]);
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < pack; ++j) {
          if (row + r < n) put(to + (row + r) * ld + column + j * columns, sum[r][j], Cluster::single && add);
        }
      }
    });
  }
  if constexpr (!Cluster::single) add_parts(op.x, n, g_x, add);
}

template <class T, class Cluster>
METAFAST_DEVICE void BlockMachine<T, Cluster>::outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const {
  const int inputs = width(op.x), outputs = op.y.ld, step = stride(op.y);
  const QuadRange own = columns(op.y);
  const int columns = own.count, first = own.first * pack;
  const T *x = pairs[0].x, *other = count > 1 ? pairs[1].x : x;
  gather(op.x, n, x, other, count > 1);
  const Pair one{in_shared_memory(x), in_shared_memory(pairs[0].g) + first};
  const Pair two{in_shared_memory(other), count > 1 ? in_shared_memory(pairs[1].g) + first : one.g};
  const Factors<T> factors{inputs, columns * pack, n, {1, inputs}, {outputs, 1}, count, one.x, one.g, two.x, two.g};
  const auto start = [&](int i, int j) { return load(g_w + i * step + j); };
  const auto finish = [&](int i, int j, T v) { store(g_w + i * step + j, v); };
  if (!on_tensor_cores(factors, start, finish)) {
    each(inputs / pack * columns, [&](long tile) {
      const int row = static_cast<int>(tile) / columns * pack, column = static_cast<int>(tile) % columns * pack;
      T* out = g_w + row * step + column;
      Quad<T> sum[pack];
      for (int i = 0; i < pack; ++i) sum[i] = load4(out + i * step);
      for (int t = 0; t < count; ++t) {
        const T *x = (t ? two.x : one.x) + row, *g = (t ? two.g : one.g) + column;
        for (int s = 0; s < n; ++s, x += inputs, g += outputs) {
          const Quad<T> a = load4(x), b = load4(g);
          for (int i = 0; i < pack; ++i) sum[i].add(a.of[i], b);
        }
      }
      for (int i = 0; i < pack; ++i) store4(out + i * step, sum[i]);
    });
  }
}

}  // namespace METAFAST_NAMESPACE
