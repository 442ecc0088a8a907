// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) (Lavin & Gray 2015, 1509.09308): 16 products where the direct
// way needs 36. With the 1-D transforms B' of a patch d of four, G of three weights g and A' of four products,
//   y = A' [(G g G') o (B' d B)] A       g_W = G' [(A g_y A') o (B' d B)] G
// and the sums over channels (or, for g_W, over tiles) are 16 matrix products.
#pragma once
#include "direct.h"

namespace METAFAST_NAMESPACE {

template <class T>
struct Winograd {
  using S = Simd<T>;
  using D = Direct<T>;
  using Pack = typename S::Pack;
  static constexpr int lanes = S::lanes, panel = D::panel, points = 16;
  static constexpr int block = 36;  // tiles at a time: their transforms stay in the second-level cache
  static constexpr int point_padding = 64 / sizeof(T);  // keeps the 16 transforms from falling on the same cache sets

  // The cost in products of a channel with a channel, against the direct way.
  static bool pays(const Window& w, const Grid& x, const Grid& y, int n, int terms) {
    if (w.kh != 3 || w.kw != 3 || w.sy != 1 || w.sx != 1 || w.dy != 1 || w.dx != 1) return false;
    if (x.ld % lanes || w.py > 2 || w.px > 2) return false;
    const double transform = 60, overhead = 1.25;
    return overhead * points * n * tiles(y) + transform * terms < 9.0 * n * y.h * y.w;
  }

  static long tiles(const Grid& y) { return static_cast<long>((y.h + 1) / 2) * ((y.w + 1) / 2); }
  static long point_stride(int columns) { return block * columns + point_padding; }
  static long weights_size(int depth, int columns) {
    return (columns + panel - 1) / panel * points * weights_stride(depth);
  }
  static long weights_stride(int depth) { return static_cast<long>(depth) * panel + point_padding; }

  // Where a block of tiles lies.
  struct Tile {
    int sample, y, x;  // of its first output pixel
  };
  static Tile tile(const Grid& y, long index) {
    const int across = (y.w + 1) / 2;
    const long in_image = index % tiles(y);
    return {static_cast<int>(index / tiles(y)), static_cast<int>(in_image / across) * 2,
            static_cast<int>(in_image % across) * 2};
  }

  // Weights [panel][tap][depth][width] to [panel][point][depth][width], taps in reverse order if `flip`. The machine's
  // share of each panel.
  template <class M>
  static void transform_weights(const M& m, const T* w, int depth, int columns, bool flip, T* out) {
    for (int p = 0; p < (columns + panel - 1) / panel; ++p) {
      const T* from = w + static_cast<long>(p) * 9 * depth * panel;
      T* to = out + p * points * weights_stride(depth);
      const long size = static_cast<long>(depth) * D::width(columns, p * panel);  // of a tap
      const Share mine = m.share(size / lanes);
      for (long i = mine.first * lanes; i < mine.end * lanes; i += lanes) {
        Pack t[4][3];
        for (int kx = 0; kx < 3; ++kx) {
          Pack g[3];
          for (int ky = 0; ky < 3; ++ky) {
            const int tap = ky * 3 + kx;
            g[ky] = S::load(from + (flip ? 8 - tap : tap) * size + i);
          }
          t[0][kx] = g[0];
          t[3][kx] = g[2];
          const Pack outer = (g[0] + g[2]) * T(0.5), inner = g[1] * T(0.5);
          t[1][kx] = outer + inner;
          t[2][kx] = outer - inner;
        }
        for (int r = 0; r < 4; ++r) {
          const Pack outer = (t[r][0] + t[r][2]) * T(0.5), inner = t[r][1] * T(0.5);
          const Pack v[4] = {t[r][0], outer + inner, outer - inner, t[r][2]};
          for (int c = 0; c < 4; ++c) S::store(to + (r * 4 + c) * weights_stride(depth) + i, v[c]);
        }
      }
    }
  }

  // B' d B of the patches of `count` tiles from `first`, to out[point][tile][channel].
  static void transform_patches(const T* x, const Grid& gx, const Grid& gy, int py, int px, long first, int count,
                                const T* zeros, T* out) {
    const long stride = point_stride(gx.ld), image = static_cast<long>(gx.h) * gx.w * gx.ld;
    for (int k = 0; k < count; ++k) {
      const Tile t = tile(gy, first + k);
      const T* at[4][4];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          const int y = t.y - py + i, c = t.x - px + j;
          const bool inside = y >= 0 && y < gx.h && c >= 0 && c < gx.w;
          at[i][j] = inside ? x + t.sample * image + (static_cast<long>(y) * gx.w + c) * gx.ld : zeros;
        }
      }
      T* to = out + static_cast<long>(k) * gx.ld;
      for (int ch = 0; ch < gx.ld; ch += lanes) {
        Pack rows[4][4];
        for (int j = 0; j < 4; ++j) {
          const Pack d0 = S::load(at[0][j] + ch), d1 = S::load(at[1][j] + ch), d2 = S::load(at[2][j] + ch),
                     d3 = S::load(at[3][j] + ch);
          rows[0][j] = d0 - d2;
          rows[1][j] = d1 + d2;
          rows[2][j] = d2 - d1;
          rows[3][j] = d1 - d3;
        }
        for (int i = 0; i < 4; ++i) {
          const Pack* d = rows[i];
          const Pack v[4] = {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
          for (int j = 0; j < 4; ++j) S::store(to + (i * 4 + j) * stride + ch, v[j]);
        }
      }
    }
  }

  // A g A' of the 2x2 pixels of `count` tiles, to out[point][tile][channel].
  static void transform_adjoints(const T* g, const Grid& gy, long first, int count, const T* zeros, T* out) {
    const long stride = point_stride(gy.ld), image = static_cast<long>(gy.h) * gy.w * gy.ld;
    for (int k = 0; k < count; ++k) {
      const Tile t = tile(gy, first + k);
      const T* at[2][2];
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          const int y = t.y + i, c = t.x + j;
          at[i][j] = y < gy.h && c < gy.w ? g + t.sample * image + (static_cast<long>(y) * gy.w + c) * gy.ld : zeros;
        }
      }
      T* to = out + static_cast<long>(k) * gy.ld;
      for (int ch = 0; ch < gy.ld; ch += lanes) {
        Pack rows[4][2];
        for (int j = 0; j < 2; ++j) {
          const Pack a = S::load(at[0][j] + ch), b = S::load(at[1][j] + ch);
          rows[0][j] = a;
          rows[1][j] = a + b;
          rows[2][j] = a - b;
          rows[3][j] = -b;
        }
        for (int i = 0; i < 4; ++i) {
          const Pack a = rows[i][0], b = rows[i][1];
          const Pack v[4] = {a, a + b, a - b, -b};
          for (int j = 0; j < 4; ++j) S::store(to + (i * 4 + j) * stride + ch, v[j]);
        }
      }
    }
  }

  // A' m A of `count` tiles of one panel, products [point][tile][lanes of the panel], into the image y.
  template <int V>
  static void transform_products(const T* m, const Grid& gy, long first, int count, int column, const T* bias, bool add,
                                 T* y) {
    const long image = static_cast<long>(gy.h) * gy.w * gy.ld;
    for (int k = 0; k < count; ++k) {
      const Tile t = tile(gy, first + k);
      T* to = y + t.sample * image + (static_cast<long>(t.y) * gy.w + t.x) * gy.ld + column;
      const bool below = t.y + 1 < gy.h, right = t.x + 1 < gy.w;
      for (int v = 0; v < V; ++v) {
        const T* from = m + static_cast<long>(k) * panel + v * lanes;
        const auto at = [&](int i, int j) { return S::load(from + static_cast<long>(i * 4 + j) * block * panel); };
        Pack top[4], bottom[4];
        for (int j = 0; j < 4; ++j) {
          const Pack m1 = at(1, j), m2 = at(2, j);
          top[j] = at(0, j) + m1 + m2;
          bottom[j] = m1 - m2 - at(3, j);
        }
        const Pack b = bias ? S::load(bias + column + v * lanes) : Pack{};
        T* pixel = to + v * lanes;
        const long down = static_cast<long>(gy.w) * gy.ld;
        S::put(pixel, top[0] + top[1] + top[2] + b, add);
        if (right) S::put(pixel + gy.ld, top[1] - top[2] - top[3] + b, add);
        if (below) S::put(pixel + down, bottom[0] + bottom[1] + bottom[2] + b, add);
        if (below && right) S::put(pixel + down + gy.ld, bottom[1] - bottom[2] - bottom[3] + b, add);
      }
    }
  }

  // y (+)= sum of terms, with transformed weights; windows begin py above and px to the left of their output. Some of
  // the tiles of all samples.
  static void correlate(const Grid& gx, const Grid& gy, int py, int px, Share some, const Term<T>* terms, int count,
                        const T* bias, bool add, const T* zeros, T* y, T* scratch) {
    const long patches = points * point_stride(gx.ld);
    T* products = scratch + count * patches;
    for (long first = some.first; first < some.end; first += block) {
      const int tiles_here = static_cast<int>(some.end - first < block ? some.end - first : block);
      for (int t = 0; t < count; ++t) {
        transform_patches(terms[t].a, gx, gy, py, px, first, tiles_here, zeros, scratch + t * patches);
      }
      for (int column = 0; column < gy.ld; column += panel) {
        const long shift = column / panel * points * weights_stride(gx.ld);
        const int width = D::width(gy.ld, column);
        for (int point = 0; point < points; ++point) {
          const T* a = scratch + point * point_stride(gx.ld);
          const long weights = shift + point * weights_stride(gx.ld);
          const Term<T> here[2] = {{a, terms[0].weights + weights}, {a + patches, terms[count - 1].weights + weights}};
          T* const out = products + point * block * panel;
          D::matrix_product({here, count, gx.ld, gx.ld, gx.ld, out, panel, nullptr, false}, {0, tiles_here},
                            {0, width});
        }
        width == panel ? transform_products<2>(products, gy, first, tiles_here, column, bias, add, y)
                       : transform_products<1>(products, gy, first, tiles_here, column, bias, add, y);
      }
    }
  }

  // g_W += sum of pairs. Scratch: the products [panel][point][channel][width], then the transforms of a block. The
  // members of a team share the tiles that are transformed, then the points, then the packs of the gradient.
  template <class M>
  static void outer(const M& m, const Grid& gx, const Grid& gy, int py, int px, int n, const Pair<T>* pairs, int count,
                    const T* zeros, T* g_w, T* scratch) {
    const long products = weights_size(gx.ld, gy.ld), patches = points * point_stride(gx.ld);
    const long adjoints = points * point_stride(gy.ld), total = n * tiles(gy);
    T* const x = scratch + products;
    T* const g = x + count * patches;
    const Share cleared = m.share(products), multiplied = m.share(points);
    std::memset(scratch + cleared.first, 0, (cleared.end - cleared.first) * sizeof(T));
    for (long first = 0; first < total; first += block) {
      const int tiles_here = static_cast<int>(total - first < block ? total - first : block);
      const Share mine = m.share(tiles_here);
      const int tiles_mine = static_cast<int>(mine.end - mine.first);
      for (int t = 0; t < count; ++t) {
        transform_patches(pairs[t].x, gx, gy, py, px, first + mine.first, tiles_mine, zeros,
                          x + t * patches + mine.first * gx.ld);
        transform_adjoints(pairs[t].g, gy, first + mine.first, tiles_mine, zeros,
                           g + t * adjoints + mine.first * gy.ld);
      }
      m.barrier();
      for (long point = multiplied.first; point < multiplied.end; ++point) {
        outer_point(x + point * point_stride(gx.ld), patches, g + point * point_stride(gy.ld), adjoints, count, gx.ld,
                    gy.ld, tiles_here, scratch + point * weights_stride(gx.ld));
      }
      m.barrier();
    }
    for (int p = 0; p < (gy.ld + panel - 1) / panel; ++p) {
      transform_gradient(m, scratch + p * points * weights_stride(gx.ld), gx.ld, D::width(gy.ld, p * panel),
                         g_w + static_cast<long>(p) * 9 * gx.ld * panel);
    }
  }

  static void outer_point(const T* x, long next_x, const T* g, long next_g, int count, int depth, int columns,
                          int tiles, T* out) {
    const Pair<T> pairs[2] = {{x, g}, {x + next_x, g + next_g}};
    // From panel to panel it is `points` transforms.
    const long next = points * weights_stride(depth) / panel;
    D::vector_outer(pairs, count, {tiles, depth, columns, next, out}, {0, depth}, {0, columns});
  }

  // g_w [tap][depth][width] += G' m G of products m [point][depth][width].
  template <class M>
  static void transform_gradient(const M& m, const T* products, int depth, int width, T* g_w) {
    const long size = static_cast<long>(depth) * width;  // of a tap
    const Share mine = m.share(size / lanes);
    for (long i = mine.first * lanes; i < mine.end * lanes; i += lanes) {
      Pack rows[3][4];
      for (int c = 0; c < 4; ++c) {
        Pack p[4];
        for (int r = 0; r < 4; ++r) p[r] = S::load(products + (r * 4 + c) * weights_stride(depth) + i);
        const Pack plus = (p[1] + p[2]) * T(0.5), minus = (p[1] - p[2]) * T(0.5);
        rows[0][c] = p[0] + plus;
        rows[1][c] = minus;
        rows[2][c] = plus + p[3];
      }
      for (int ky = 0; ky < 3; ++ky) {
        const Pack* p = rows[ky];
        const Pack plus = (p[1] + p[2]) * T(0.5), minus = (p[1] - p[2]) * T(0.5);
        const Pack v[3] = {p[0] + plus, minus, plus + p[3]};
        for (int kx = 0; kx < 3; ++kx) S::put(g_w + (ky * 3 + kx) * size + i, v[kx], true);
      }
    }
  }
};

}  // namespace METAFAST_NAMESPACE
