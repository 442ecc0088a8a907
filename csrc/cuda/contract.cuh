// The contractions of a linear layer in register tiles: some rows of a sample matrix times a quad of columns, a quad of
// the sum at a time. A weight [inputs][outputs] has rows an odd number of quads apart, so neighbouring threads meet no
// bank conflict along either axis. The order of each sum is that of the indices, whatever the tiles.
#pragma once
#include "machine.cuh"

namespace METAFAST_NAMESPACE {

template <int R>
using Rows = std::integral_constant<int, R>;

// f(rows in a tile, first row, column) for all tiles: the fewest rows that keep every thread to a single tile.
template <class T>
template <class F>
METAFAST_DEVICE void Block<T>::tiles(int n, int columns, const F& f) const {
  const auto run = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    const int count = (n + R - 1) / R * columns;
    threads.run([&](int thread) {
      for (int tile = thread; tile < count; tile += threads.count()) f(rows, tile / columns * R, tile % columns);
    });
  };
  if (n * columns <= threads.count()) return run(Rows<1>{});
  if ((n + 1) / 2 * columns <= threads.count()) return run(Rows<2>{});
  run(Rows<4>{});
}

template <class T>
METAFAST_DEVICE void Block<T>::correlate(const Op& op, int n, const Term* terms, int count, const T* bias, T* y) const {
  const int depth = op.x.ld, ld = op.y.ld, step = stride(ld);
  const Term one{near(terms[0].a), near(terms[0].weights)};
  const Term two{count > 1 ? near(terms[1].a) : one.a, count > 1 ? near(terms[1].weights) : one.weights};
  tiles(n, ld / pack, [&](auto rows, int row, int column) {
    constexpr int R = decltype(rows)::value;
    Quad<T> sum[R];
    for (int r = 0; r < R; ++r) sum[r] = bias ? load4(bias + column * pack) : Quad<T>{};
    for (int t = 0; t < count; ++t) {
      const T *a = t ? two.a : one.a, *weights = (t ? two.weights : one.weights) + column * pack;
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
      if (row + r < n) store4(y + (row + r) * ld + column * pack, sum[r]);
    }
  });
}

template <class T>
METAFAST_DEVICE void Block<T>::correlate_transposed(const Op& op, int n, const Term* terms, int count, T* g_x,
                                                    bool add) const {
  const int depth = op.y.ld, ld = op.x.ld, step = stride(depth), columns = ld / pack;
  const Term one{near(terms[0].a), near(terms[0].weights)};
  const Term two{count > 1 ? near(terms[1].a) : one.a, count > 1 ? near(terms[1].weights) : one.weights};
  tiles(n, columns, [&](auto rows, int row, int column) {
    constexpr int R = decltype(rows)::value;
    T sum[R][pack] = {};
    for (int t = 0; t < count; ++t) {
      const T *a = t ? two.a : one.a, *weights = (t ? two.weights : one.weights) + column * step;
      for (int k = 0; k < depth; k += pack) {
        Quad<T> w[pack];  // rows of W a quarter of them apart: neighbours in the block read neighbouring ones
        for (int j = 0; j < pack; ++j) w[j] = load4(weights + j * columns * step + k);
        for (int r = 0; r < R; ++r) {
          const Quad<T> g = load4(a + (row + r < n ? row + r : row) * depth + k);
          for (int j = 0; j < pack; ++j) g.add_dot(sum[r][j], w[j]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < pack; ++j) {
        if (row + r < n) put(g_x + (row + r) * ld + column + j * columns, sum[r][j], add);
      }
    }
  });
}

template <class T>
METAFAST_DEVICE void Block<T>::outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const {
  const int inputs = op.x.ld, outputs = op.y.ld, step = stride(outputs), columns = outputs / pack;
  const Pair one{near(pairs[0].x), near(pairs[0].g)};
  const Pair two{count > 1 ? near(pairs[1].x) : one.x, count > 1 ? near(pairs[1].g) : one.g};
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

}  // namespace METAFAST_NAMESPACE
