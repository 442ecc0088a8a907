// Contractions by register tiles: R rows of one factor, read a scalar at a time, times V packs of the other. Weights
// lie in panels of two packs of output channels, [panel][row][2 * lanes], as they do in the inner parameter vector.
#pragma once
#include "machine.h"

namespace METAFAST_NAMESPACE {

// R x V sums in registers. Indices are constants from the start (no loops to unroll), or the compiler keeps the sums in
// memory.
template <class T, int R, int V>
class Sums {
  using S = Simd<T>;
  using Pack = typename S::Pack;
  template <class F, size_t... I>
  static void unrolled(const F& f, std::index_sequence<I...>) {
    (f(std::integral_constant<int, I>{}), ...);
  }

 public:
  // From rows `stride` apart; 0 gives all the same.
  void start(const T* from, long stride) {
    each([&](auto i) { sum[i] = S::load(from + i / V * stride + i % V * S::lanes); });
  }

  // sum[i] += a[i][k * a_step] * b[k * b_step] for k < count.
  void multiply(const T* const (&a)[R], long a_step, const T* b, long b_step, long count) {
    Pack local[R * V];
    each([&](auto i) { local[i] = sum[i]; });
    for (long k = 0, at = 0; k < count; ++k, at += a_step, b += b_step) {
      Pack column[V];
      unrolled([&](auto v) { column[v] = S::load(b + v * S::lanes); }, std::make_index_sequence<V>{});
      each([&](auto i) { local[i] += column[i % V] * a[i / V][at]; });
    }
    each([&](auto i) { sum[i] = local[i]; });
  }

  void finish(T* out, long stride) const {
    each([&](auto i) { S::store(out + i / V * stride + i % V * S::lanes, sum[i]); });
  }

  void finish(T* const (&out)[R], bool add) const {
    each([&](auto i) { S::put(out[i / V] + i % V * S::lanes, sum[i], add); });
  }

 private:
  template <class F>
  static void each(const F& f) {
    unrolled(f, std::make_index_sequence<R * V>{});
  }

  Pack sum[R * V];
};

template <class T>
struct Direct {
  template <int R, int V>
  using Sums = METAFAST_NAMESPACE::Sums<T, R, V>;
  using S = Simd<T>;
  using Pack = typename S::Pack;
  static constexpr int lanes = S::lanes, panel = 2 * lanes, max_rows = sizeof(Pack) == 64 ? 12 : 6;

  // One factor as rows of images; `zeros` stands in for what lies outside.
  struct Rows {
    const Gather* gather;
    long image;  // elements from sample to sample of the rows read
    const T* zeros;
  };

  struct Target {
    T* base;
    long image;
    const T* bias;
    bool add;
  };

  // R rows, from row `first` of n * gather.rows, times V packs of the panel whose weights begin at `shift`.
  template <int R, int V>
  METAFAST_KERNEL static void tile(const Rows& rows, const Term<T>* terms, int count, long first, long shift,
                                   const Target& to, int column) {
    const Gather& g = *rows.gather;
    const int32_t* source[R];
    long image[R];
    T* out[R];
    for (int i = 0; i < R; ++i) {
      const long sample = (first + i) / g.rows, row = (first + i) % g.rows;
      source[i] = g.source + row * g.segments;
      image[i] = sample * rows.image;
      out[i] = to.base + sample * to.image + g.target[row] + column;
    }
    Sums<R, V> sums{};
    if (to.bias) sums.start(to.bias + column, 0);
    for (int t = 0; t < count; ++t) {
      for (int s = 0; s < g.segments; ++s) {
        const T* a[R];
        for (int i = 0; i < R; ++i) a[i] = source[i][s] < 0 ? rows.zeros : terms[t].a + image[i] + source[i][s];
        const T* w = terms[t].weights + shift + static_cast<long>(g.first[s]) * panel;
        sums.multiply(a, 1, w, panel, g.length);
      }
    }
    sums.finish(out, to.add);
  }

  // All rows of n samples times all panels of `columns` output elements; a panel is `depth` rows deep.
  static void product(const Rows& rows, int n, const Term<T>* terms, int count, long depth, int columns,
                      const Target& to) {
    const long total = static_cast<long>(n) * rows.gather->rows;
    for (int column = 0; column < columns; column += panel) {
      const long shift = column * depth;
      const bool two = columns - column >= panel;
      const long most = two ? max_rows : 2 * max_rows, tiles = (total + most - 1) / most;
      for (long tile = 0; tile < tiles; ++tile) {
        const long first = total * tile / tiles, last = total * (tile + 1) / tiles;
        with_rows(static_cast<int>(last - first), [&](auto r) {
          constexpr int R = decltype(r)::value;
          if (!two) return Direct::tile<R, 1>(rows, terms, count, first, shift, to, column);
          if constexpr (R <= max_rows) Direct::tile<R, 2>(rows, terms, count, first, shift, to, column);
        });
      }
    }
  }

  // From a number of rows at run time to one known when compiling.
  template <int R = 2 * max_rows, class F>
  static void with_rows(int rows, const F& f) {
    if constexpr (R > 0) {
      if (rows == R) return f(std::integral_constant<int, R>{});
      with_rows<R - 1>(rows, f);
    }
  }

  // A run of pixels that a weight gradient is summed over: `samples` x `lines` x `length`, with the distances between
  // them in x and in g.
  struct Run {
    int samples, lines, length;
    long x_sample, x_line, x_pixel, g_sample, g_line, g_pixel;
  };

  // out[i][panel] += sum over the run of x[offset[i]] * g.
  template <int R, int V>
  METAFAST_KERNEL static void outer_tile(const Pair<T>* pairs, int count, const Run& run, const int32_t* offset,
                                         long x_at, long g_at, T* out) {
    Sums<R, V> sums;
    sums.start(out, panel);
    for (int t = 0; t < count; ++t) {
      for (int s = 0; s < run.samples; ++s) {
        for (int l = 0; l < run.lines; ++l) {
          const T* x = pairs[t].x + x_at + s * run.x_sample + l * run.x_line;
          const T* g = pairs[t].g + g_at + s * run.g_sample + l * run.g_line;
          const T* a[R];
          for (int i = 0; i < R; ++i) a[i] = x + offset[i];
          sums.multiply(a, run.x_pixel, g, run.g_pixel, run.length);
        }
      }
    }
    sums.finish(out, panel);
  }

  // `rows` rows of a weight gradient (at x + offset[i]) times all columns of g.
  static void outer(const Pair<T>* pairs, int count, const Run& run, const int32_t* offset, int rows, long x_at,
                    long g_at, int columns, long depth, T* out) {
    for (int column = 0; column < columns; column += panel) {
      const bool two = columns - column >= panel;
      const int most = two ? max_rows : 2 * max_rows, tiles = (rows + most - 1) / most;
      for (int tile = 0; tile < tiles; ++tile) {
        const int first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
        T* to = out + column * depth + static_cast<long>(first) * panel;
        with_rows(last - first, [&](auto r) {
          constexpr int R = decltype(r)::value;
          if (!two) return outer_tile<R, 1>(pairs, count, run, offset + first, x_at, g_at + column, to);
          if constexpr (R <= max_rows) outer_tile<R, 2>(pairs, count, run, offset + first, x_at, g_at + column, to);
        });
      }
    }
  }

  // Weights [panel of y][tap][x][lanes of y] as [panel of x][tap][y][lanes of x]; both padded to whole panels of zeros.
  static void transpose_weights(const T* weights, int taps, int x, int y, T* out) {
    const int x_panels = (x + panel - 1) / panel, y_panels = (y + panel - 1) / panel;
    for (int py = 0; py < y_panels; ++py) {
      for (int tap = 0; tap < taps; ++tap) {
        const T* from = weights + (static_cast<long>(py) * taps + tap) * x * panel;
        for (int px = 0; px < x_panels; ++px) {
          T* to = out + ((static_cast<long>(px) * taps + tap) * y + py * panel) * panel;
          transpose_panel(from + static_cast<long>(px) * panel * panel, smaller(panel, x - px * panel), to,
                          smaller(panel, y - py * panel));
        }
      }
    }
  }

 private:
  static int smaller(int a, int b) { return a < b ? a : b; }

  // rows x columns, lanes at a time, `panel` elements from row to row on both sides.
  static void transpose_panel(const T* from, int rows, T* to, int columns) {
    for (int r = 0; r < panel; r += lanes) {
      for (int c = 0; c < columns; c += lanes) {
        Pack block[lanes];
        for (int i = 0; i < lanes; ++i) block[i] = r + i < rows ? S::load(from + (r + i) * panel + c) : Pack{};
        S::transpose(block);
        for (int i = 0; i < lanes && c + i < columns; ++i) S::store(to + (c + i) * panel + r, block[i]);
      }
    }
  }
};

}  // namespace METAFAST_NAMESPACE
