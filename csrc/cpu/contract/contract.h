// The contractions of a convolution, each by the way that suits its shape.
#pragma once
#include "direct.h"
#include "../../core/kinds.h"
#include "../core_machine.h"
#include "winograd.h"

namespace METAFAST_NAMESPACE {

static inline long image_size(const Grid& g) { return static_cast<long>(g.h) * g.w * g.ld; }

// Elements of the transposed weights.
static inline long transposed_size(const Op& op) {
  return static_cast<long>(op.window.kh) * op.window.kw * op.y.ld * op.x.ld;
}

// Of one pixel to one pixel. Without padding: a large stride can put the only window outside the image.
static inline bool of_vectors(const Op& op) {
  const Window& w = op.window;
  return w.kh * w.kw == 1 && w.py + w.px == 0 && op.x.h * op.x.w == 1;
}

template <class T>
void CoreMachine<T>::correlate(const Op& op, int n, const Term* terms, int count, const T* bias, T* y) const {
  using D = Direct<T>;
  using W = Winograd<T>;
  const Window& w = op.window;
  if (W::pays(w, op.x, op.y, n, count)) {
    const long size = W::weights_size(op.x.ld, op.y.ld);
    Term transforms[2];
    for (int t = 0; t < count; ++t) {
      transforms[t] = {terms[t].a, transformed + t * size};
      W::transform_weights(*this, terms[t].weights, op.x.ld, op.y.ld, false, transformed + t * size);
    }
    barrier();
    W::correlate(op.x, op.y, w.py, w.px, share(n * W::tiles(op.y)), transforms, count, bias, false, zeros, y, scratch);
  } else if (of_vectors(op)) {
    multiply_vectors(op.x, op.y, n, terms, count, bias, false, y);
  } else {
    const long depth = static_cast<long>(w.kh) * w.kw * op.x.ld;
    D::product({op.forward, image_size(op.x), zeros}, share(static_cast<long>(n) * op.forward->rows), terms, count,
               depth, op.y.ld, {y, image_size(op.y), bias, false});
  }
  barrier();
}

template <class T>
void CoreMachine<T>::correlate_transposed(const Op& op, int n, const Term* terms, int count, T* g_x, bool add) const {
  using D = Direct<T>;
  using W = Winograd<T>;
  const int taps = op.window.kh * op.window.kw;
  const long depth = static_cast<long>(taps) * op.y.ld;
  Term transposed[2];
  for (int t = 0; t < count; ++t) {
    T* const to = terms[t].transposed ? terms[t].transposed : packed + t * transposed_size(op);
    transposed[t] = {terms[t].a, to};
    if (terms[t].kept) continue;
    D::transpose_weights(terms[t].weights, taps, share(D::transposed_parts(taps, op.y.ld)), op.x.ld, op.y.ld, to);
  }
  barrier();
  if (W::pays(op.window, op.y, op.x, n, count)) {
    const long space = W::weights_size(op.y.ld, op.x.ld);
    for (int t = 0; t < count; ++t) {
      W::transform_weights(*this, transposed[t].weights, op.y.ld, op.x.ld, true, transformed + t * space);
      transposed[t].weights = transformed + t * space;
    }
    barrier();
    W::correlate(op.y, op.x, 2 - op.window.py, 2 - op.window.px, share(n * W::tiles(op.x)), transposed, count, nullptr,
                 add, zeros, g_x, scratch);
  } else if (of_vectors(op)) {
    multiply_vectors(op.y, op.x, n, transposed, count, nullptr, add, g_x);
  } else {
    for (int c = 0; c < op.classes; ++c) {
      const Share rows = share(static_cast<long>(n) * op.backward[c].rows);
      D::product({op.backward + c, image_size(op.y), zeros}, rows, transposed, count, depth, op.x.ld,
                 {g_x, image_size(op.x), nullptr, add});
    }
  }
  barrier();
}

// Does each member of a team take some columns of a matrix for all samples, and not some samples for all columns? Then
// it meets the same part of the weights again and again, which are more than the samples.
template <class T>
bool CoreMachine<T>::shares_columns(int n, int columns) const {
  return member.team && columns > n && columns % (Direct<T>::panel * member.members) == 0;
}

// to (+)= sum of terms W a (+ bias), of vectors.
template <class T>
void CoreMachine<T>::multiply_vectors(const Grid& from, const Grid& to, int n, const Term* terms, int count,
                                      const T* bias, bool add, T* y) const {
  using D = Direct<T>;
  const bool by_columns = shares_columns(n, to.ld);
  D::matrix_product({terms, count, from.ld, from.c, from.ld, y, to.ld, bias, add}, by_columns ? Share{0, n} : share(n),
                    by_columns ? share(to.ld) : Share{0, to.ld});
}

template <class T>
void CoreMachine<T>::outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const {
  using D = Direct<T>;
  constexpr int run_pixels = 256;  // what stays in the first-level cache beside a panel of the result
  const Window& w = op.window;
  const Grid &gx = op.x, &gy = op.y;
  if (Winograd<T>::pays(w, gx, gy, n, 1)) {
    Winograd<T>::outer(*this, gx, gy, w.py, w.px, n, pairs, count, zeros, g_w, transformed);
    return barrier();
  }
  if (of_vectors(op)) {
    const bool by_columns = shares_columns(n, gy.ld);
    const Descent way = part_of_descent(g_w);
    const int rows = way.of ? gx.ld : gx.c;  // all of what is written, and not added to
    D::vector_outer(pairs, count, {n, gx.ld, gy.ld, gx.ld, way.of ? way.to : g_w, way.from, way.rate},
                    by_columns ? Share{0, rows} : share(rows), by_columns ? share(gy.ld) : Share{0, gy.ld});
    return barrier();
  }
  const Share rows = share(op.n_offsets);
  const long depth = static_cast<long>(w.kh) * w.kw * gx.ld;
  const int image = gy.h * gy.w;
  const int samples = image < run_pixels ? run_pixels / image : 1;
  const int lines = image < run_pixels ? gy.h : (gy.w < run_pixels ? run_pixels / gy.w : 1);
  // The outputs along one axis whose tap k falls on the image.
  const auto range = [&](int k, int step, int pad, int spread, int in, int out, int& from, int& to) {
    const int first = k * spread - pad;
    from = first < 0 ? (-first + step - 1) / step : 0;
    to = in - first <= 0 ? 0 : (in - first - 1) / step + 1;
    if (to > out) to = out;
  };
  for (int s = 0; s < n; s += samples) {
    for (int top = 0; top < gy.h; top += lines) {
      for (int tap = 0; tap < (op.padded ? 1 : w.kh * w.kw); ++tap) {
        const int ky = tap / w.kw, kx = tap % w.kw;
        int y0 = 0, y1 = gy.h, x0 = 0, x1 = gy.w;
        if (!op.padded) {
          range(ky, w.sy, w.py, w.dy, gx.h, gy.h, y0, y1);
          range(kx, w.sx, w.px, w.dx, gx.w, gy.w, x0, x1);
        }
        if (y0 < top) y0 = top;
        if (y1 > top + lines) y1 = top + lines;
        if (y0 >= y1 || x0 >= x1) continue;
        const typename D::PixelRun run{samples < n - s ? samples : n - s,
                                       y1 - y0,
                                       x1 - x0,
                                       image_size(gx),
                                       static_cast<long>(w.sy) * gx.w * gx.ld,
                                       static_cast<long>(w.sx) * gx.ld,
                                       image_size(gy),
                                       static_cast<long>(gy.w) * gy.ld,
                                       gy.ld,
                                       pixel(gx, s, y0 * w.sy - w.py + ky * w.dy, x0 * w.sx - w.px + kx * w.dx),
                                       pixel(gy, s, y0, x0)};
        D::outer(pairs, count, run, {g_w, gy.ld, depth, static_cast<long>(tap) * gx.ld, op.offsets, rows});
      }
    }
  }
  barrier();
}

// The parts of the workspace, in elements: a run of zeros as long as any that is read, transposed weights of two terms,
// and for Winograd's way transformed weights of two terms and the transforms of two more.
struct WorkspaceParts {
  long zeros, packed, transformed, scratch;
  long size() const { return zeros + packed + transformed + scratch; }
};

template <class T>
WorkspaceParts parts(const Program& program) {
  using W = Winograd<T>;
  constexpr int panel = Direct<T>::panel;
  const auto larger = [](long a, long b) { return a > b ? a : b; };
  WorkspaceParts need{0, 0, 0, 0};
  for (int k = 0; k < program.n_ops; ++k) {
    const Op& op = program.ops[k];
    if (!makes_products(op)) continue;
    const int x = op.x.ld, y = op.y.ld, taps = op.window.kh * op.window.kw;
    need.zeros = larger(need.zeros, larger(op.forward->length, larger(x, y)));
    if (op.backward) need.packed = larger(need.packed, 2 * transposed_size(op));
    if (taps != 9) continue;
    const long weights = larger(W::weights_size(x, y), W::weights_size(y, x));
    const long tiles = 2 * W::points * (W::point_stride(x) + W::point_stride(y)) + W::points * W::block * panel;
    need.transformed = larger(need.transformed, 2 * weights);
    need.scratch = larger(need.scratch, tiles);
  }
  need.zeros = (need.zeros + 15) / 16 * 16;
  need.packed = (need.packed + 15) / 16 * 16;
  return need;
}

template <class T>
long CoreMachine<T>::workspace_size(const Program& program) {
  return parts<T>(program).size();
}

template <class T>
CoreMachine<T>::CoreMachine(const Program& program, T* own, T* shared, Member member) : member(member) {
  const WorkspaceParts need = parts<T>(program);
  zeros = own;
  scratch = own + need.size() - need.scratch;
  packed = shared + need.zeros;
  transformed = packed + need.packed;
  std::memset(zeros, 0, need.zeros * sizeof(T));
}

}  // namespace METAFAST_NAMESPACE
