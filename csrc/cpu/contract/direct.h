// Contractions by register tiles: R rows of one factor, read a scalar at a time, times V packs of the other. Weights
// lie in panels of output channels, [panel][row][width], as they do in the inner parameter vector: two packs wide, the
// last panel one where that is enough.
#pragma once
#include "../core_machine.h"

namespace METAFAST_NAMESPACE {

// R x V sums in registers. Indices are constants from the start (no loops to unroll), or the compiler keeps the sums in
// memory.
template <class T, int R, int V>
class RegisterTile {
  using S = Simd<T>;
  using Pack = typename S::Pack;
  template <class F, size_t... I>
  METAFAST_INLINE static void unrolled(const F& f, std::index_sequence<I...>) {
    (f(std::integral_constant<int, I>{}), ...);
  }

 public:
  // From rows `stride` apart; 0 gives all the same. Packs of a row are `next` apart.
  METAFAST_INLINE void start(const T* from, long stride, long next = S::lanes) {
    each([&](auto i) { sum[i] = S::load(from + i / V * stride + i % V * next); });
  }

  // sum[i] += a(i, k * a_step) * b[k * b_step] for k < count.
  template <class A>
  METAFAST_INLINE void multiply(const A& a, long a_step, const T* b, long b_step, long count, long next = S::lanes) {
    Pack local[R * V];
    each([&](auto i) { local[i] = sum[i]; });
    for (long k = 0, at = 0; k < count; ++k, at += a_step, b += b_step) {
      Pack column[V];
      unrolled([&](auto v) { column[v] = S::load(b + v * next); }, std::make_index_sequence<V>{});
      each([&](auto i) { local[i] += column[i % V] * a(i / V, at); });
    }
    each([&](auto i) { sum[i] = local[i]; });
  }

  METAFAST_INLINE void finish(T* out, long stride, bool add, long next = S::lanes) const {
    each([&](auto i) { S::put(out + i / V * stride + i % V * next, sum[i], add); });
  }

  // out[i] = f(i, sum).
  template <class F>
  METAFAST_INLINE void finish(const F& f, T* out, long stride, long next) const {
    each([&](auto i) { S::store(out + (i / V * stride + i % V * next), f(i / V * stride + i % V * next, sum[i])); });
  }

  METAFAST_INLINE void finish(T* const (&out)[R], bool add) const {
    each([&](auto i) { S::put(out[i / V] + i % V * S::lanes, sum[i], add); });
  }

 private:
  template <class F>
  METAFAST_INLINE static void each(const F& f) {
    unrolled(f, std::make_index_sequence<R * V>{});
  }

  Pack sum[R * V];
};

template <class T>
struct Direct {
  template <int R, int V>
  using RegisterTile = METAFAST_NAMESPACE::RegisterTile<T, R, V>;
  using S = Simd<T>;
  using Pack = typename S::Pack;
  static constexpr int lanes = S::lanes, panel = 2 * lanes, max_rows = sizeof(Pack) == 64 ? 12 : 6;

  // One factor as rows of images; `zeros` stands in for what lies outside.
  struct GatheredRows {
    const GatherTable* gather;
    long image;  // elements from sample to sample of the rows read
    const T* zeros;
  };

  struct Target {
    T* base;
    long image;
    const T* bias;
    bool add;
  };

  // Where a row is among n * gather.rows.
  struct Place {
    long sample;
    int row;
    void advance(int rows, int in_sample) {
      for (row += rows; row >= in_sample; row -= in_sample) ++sample;
    }
  };

  // What one call of a kernel covers: `tiles` times R rows of `panels` panels, V packs wide.
  struct Range {
    int column, panels, first, tiles;
  };

  template <int R, int V>
  METAFAST_KERNEL static void gather_tiles(const GatheredRows& rows, const Term<T>* terms, int count,
                                           const Range& range, long depth, const Target& to) {
    const GatherTable& g = *rows.gather;
    for (int column = range.column; column < range.column + range.panels * V * lanes; column += V * lanes) {
      Place at{0, 0};
      at.advance(range.first, g.rows);
      for (int tile = 0; tile < range.tiles; ++tile) {
        const int32_t* source[R];
        long image[R];
        T* out[R];
        for (int i = 0; i < R; ++i, at.advance(1, g.rows)) {
          source[i] = g.source + static_cast<long>(at.row) * g.segments;
          image[i] = at.sample * rows.image;
          out[i] = to.base + at.sample * to.image + g.target[at.row] + column;
        }
        RegisterTile<R, V> sums{};
        if (to.bias) sums.start(to.bias + column, 0);
        for (int t = 0; t < count; ++t) {
          for (int s = 0; s < g.segments; ++s) {
            const T* a[R];
            for (int i = 0; i < R; ++i) a[i] = source[i][s] < 0 ? rows.zeros : terms[t].a + image[i] + source[i][s];
            const T* w = terms[t].weights + column * depth + static_cast<long>(g.first[s]) * V * lanes;
            sums.multiply([&](int i, long k) { return a[i][k]; }, 1, w, V * lanes, g.length);
          }
        }
        sums.finish(out, to.add);
      }
    }
  }

  // Some of the rows of all samples times all panels of `columns` output elements; a panel is `depth` rows deep.
  static void product(const GatheredRows& rows, Share some, const Term<T>* terms, int count, long depth, int columns,
                      const Target& to) {
    in_tiles(some, {0, columns}, [&](const Range& range, auto r, auto v) {
      gather_tiles<decltype(r)::value, decltype(v)::value>(rows, terms, count, range, depth, to);
    });
  }

  // Rows that lie `a_stride` apart and go to rows `out_stride` apart, a panel `depth` rows deep: vectors, or the tiles
  // of a transform.
  struct Matrix {
    const Term<T>* terms;
    int count;
    long a_stride, length, depth;
    T* out;
    long out_stride;
    const T* bias;
    bool add;
  };

  template <int R, int V>
  METAFAST_KERNEL static void matrix_tiles(const Matrix& m, const Range& range) {
    for (int column = range.column; column < range.column + range.panels * V * lanes; column += V * lanes) {
      T* to = m.out + range.first * m.out_stride + column;
      long first = range.first * m.a_stride;
      for (int tile = 0; tile < range.tiles; ++tile, first += R * m.a_stride, to += R * m.out_stride) {
        RegisterTile<R, V> sums{};
        if (m.bias) sums.start(m.bias + column, 0);
        for (int t = 0; t < m.count; ++t) {
          const T* const a = m.terms[t].a + first;
          const long stride = m.a_stride;
          sums.multiply([=](int i, long k) { return a[i * stride + k]; }, 1, m.terms[t].weights + column * m.depth,
                        V * lanes, m.length);
        }
        sums.finish(to, m.out_stride, m.add);
      }
    }
  }

  static void matrix_product(const Matrix& m, Share rows, Share columns) {
    in_tiles(rows, columns, [&](const Range& range, auto r, auto v) {
      matrix_tiles<decltype(r)::value, decltype(v)::value>(m, range);
    });
  }

  // f(range, R, V) for tiles of about equal height that cover `rows` and `columns`, from one where a panel begins:
  // whole panels and what is left of them, each in at most two heights that differ by one.
  template <class F>
  static void in_tiles(Share rows, Share columns, const F& f) {
    if (rows.first == rows.end) return;
    const int first = static_cast<int>(columns.first), count = static_cast<int>(columns.end) - first;
    const int whole = count / panel, behind = first + whole * panel;
    if (whole > 0) in_heights<2>(rows, max_rows, {first, whole, 0, 0}, f);
    if (columns.end > behind) in_heights<1>(rows, 2 * max_rows, {behind, 1, 0, 0}, f);
  }

  template <int V, class F>
  static void in_heights(Share share, unsigned max_height, Range range, const F& f) {
    const unsigned begin = static_cast<unsigned>(share.first), rows = static_cast<unsigned>(share.end) - begin;
    const unsigned tiles = (rows + max_height - 1) / max_height, height = rows / tiles, taller = rows - height * tiles;
    const auto run = [&](unsigned first, unsigned count, unsigned high) {
      range.first = static_cast<int>(first);
      range.tiles = static_cast<int>(count);
      with_rows<V == 2 ? max_rows : 2 * max_rows>(static_cast<int>(high),
                                                  [&](auto r) { f(range, r, std::integral_constant<int, V>{}); });
    };
    if (taller > 0) run(begin, taller, height + 1);
    if (tiles > taller) run(begin + taller * (height + 1), tiles - taller, height);
  }

  // From a number of rows at run time to one known when compiling.
  template <int R, class F>
  static void with_rows(int rows, const F& f) {
    if constexpr (R > 0) {
      if (rows == R) return f(std::integral_constant<int, R>{});
      with_rows<R - 1>(rows, f);
    }
  }

  // A run of pixels that a weight gradient is summed over: `samples` x `lines` x `length`, with the distances between
  // them in x and in g, and where they begin.
  struct PixelRun {
    int samples, lines, length;
    long x_sample, x_line, x_pixel, g_sample, g_line, g_pixel, x_at, g_at;
  };

  // Vectors that a weight gradient [panel][depth][width] is summed over: on top of `out`, or (from) to
  // out = from - rate * it.
  struct OuterVectors {
    long length, x_stride, g_stride, depth;
    T* out;
    const T* from = nullptr;
    T rate = 0;
  };

  // A part of a weight gradient [panel][depth][width]: rows from `first`, at x + offset[i].
  struct GradientPart {
    T* base;
    int columns;
    long depth, first;
    const int32_t* offset;
    Share rows;
  };

  // out[i][width] += sum over the run of x[offset[i]] * g[column].
  template <int R, int V>
  METAFAST_KERNEL static void outer_tiles(const Pair<T>* pairs, int count, const PixelRun& run, const GradientPart& to,
                                          const Range& range) {
    for (int column = range.column; column < range.column + range.panels * V * lanes; column += V * lanes) {
      const int32_t* offset = to.offset + range.first;
      T* out = to.base + column * to.depth + (to.first + range.first) * V * lanes;
      for (int tile = 0; tile < range.tiles; ++tile, offset += R, out += R * V * lanes) {
        RegisterTile<R, V> sums;
        sums.start(out, V * lanes);
        for (int t = 0; t < count; ++t) {
          for (int s = 0; s < run.samples; ++s) {
            for (int l = 0; l < run.lines; ++l) {
              const T* x = pairs[t].x + run.x_at + s * run.x_sample + l * run.x_line;
              const T* g = pairs[t].g + run.g_at + s * run.g_sample + l * run.g_line + column;
              const T* a[R];
              for (int i = 0; i < R; ++i) a[i] = x + offset[i];
              sums.multiply([&](int i, long k) { return a[i][k]; }, run.x_pixel, g, run.g_pixel, run.length);
            }
          }
        }
        sums.finish(out, V * lanes, false);
      }
    }
  }

  static void outer(const Pair<T>* pairs, int count, const PixelRun& run, const GradientPart& to) {
    in_tiles(to.rows, {0, to.columns}, [&](const Range& range, auto r, auto v) {
      outer_tiles<decltype(r)::value, decltype(v)::value>(pairs, count, run, to, range);
    });
  }

  // The same for vectors: out[i][width] += sum over k < length of x[k * x_stride + i] * g[k * g_stride + column].
  template <int R, int V>
  METAFAST_KERNEL static void vector_outer_tiles(const Pair<T>* pairs, int count, const OuterVectors& of,
                                                 const Range& range) {
    for (int column = range.column; column < range.column + range.panels * V * lanes; column += V * lanes) {
      T* out = of.out + column * of.depth + range.first * V * lanes;
      int first = range.first;
      for (int tile = 0; tile < range.tiles; ++tile, first += R, out += R * V * lanes) {
        RegisterTile<R, V> sums{};
        if (!of.from) sums.start(out, V * lanes);
        for (int t = 0; t < count; ++t) {
          const T* const x = pairs[t].x + first;
          sums.multiply([=](int i, long k) { return x[k + i]; }, of.x_stride, pairs[t].g + column, of.g_stride,
                        of.length);
        }
        if (of.from) {
          const T* const from = of.from + (out - of.out);
          const Pack rate = S::broadcast(of.rate);
          sums.finish([=](long i, Pack g) { return S::load(from + i) - rate * g; }, out, V * lanes, lanes);
        } else {
          sums.finish(out, V * lanes, false);
        }
      }
    }
  }

  static void vector_outer(const Pair<T>* pairs, int count, const OuterVectors& of, Share rows, Share columns) {
    in_tiles(rows, columns, [&](const Range& range, auto r, auto v) {
      vector_outer_tiles<decltype(r)::value, decltype(v)::value>(pairs, count, of, range);
    });
  }

  // Weights [panel of y][tap][x][width] as [panel of x][tap][y][width]; x and y are whole packs. Some of the
  // panels of y and their taps, of which there are transposed_parts.
  static void transpose_weights(const T* weights, int taps, Share some, int x, int y, T* out) {
    for (long part = some.first; part < some.end; ++part) {
      const long cy = part / taps * panel, tap = part % taps;
      const int wide = width(y, static_cast<int>(cy));
      for (int cx = 0; cx < x; cx += panel) {
        const int high = width(x, cx);
        const T* from = weights + (cy * taps + tap * wide) * x + static_cast<long>(cx) * wide;
        T* to = out + (cx * taps + tap * high) * y + cy * high;
        if (wide == panel) {
          high == panel ? transpose_block<panel, panel>(from, to) : transpose_block<lanes, panel>(from, to);
        } else {
          high == panel ? transpose_block<panel, lanes>(from, to) : transpose_block<lanes, lanes>(from, to);
        }
      }
    }
  }

  static long transposed_parts(int taps, int y) { return static_cast<long>((y + panel - 1) / panel) * taps; }

  // Of the panel that begins at `column` of `columns`.
  static int width(int columns, int column) { return columns - column >= panel ? panel : lanes; }

 private:
  template <int Rows, int Columns>
  static void transpose_block(const T* from, T* to) {
    for (int r = 0; r < Rows; r += lanes) {
      for (int c = 0; c < Columns; c += lanes) {
        Pack block[lanes];
        S::transposed([=](int i) { return from + (r + i) * Columns + c; }, block);
        for (int i = 0; i < lanes; ++i) S::store(to + (c + i) * Rows + r, block[i]);
      }
    }
  }
};

}  // namespace METAFAST_NAMESPACE
