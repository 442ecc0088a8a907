// The contractions of a convolution, each by the way that suits its shape.
#pragma once
#include "direct.h"
#include "machine.h"

namespace METAFAST_NAMESPACE {

inline long image_size(const Grid& g) { return static_cast<long>(g.h) * g.w * g.ld; }

template <class T>
void Core<T>::correlate(const Op& op, int n, const Term* terms, int count, const T* bias, T* y) const {
  using D = Direct<T>;
  const Window& w = op.window;
  const long depth = static_cast<long>(w.kh) * w.kw * op.x.ld;
  D::product({op.forward, image_size(op.x), zeros}, n, terms, count, depth, op.y.ld,
             {y, image_size(op.y), bias, false});
}

template <class T>
void Core<T>::correlate_transposed(const Op& op, int n, const Term* terms, int count, T* g_x, bool add) const {
  using D = Direct<T>;
  const int taps = op.window.kh * op.window.kw;
  const long depth = static_cast<long>(taps) * op.y.ld;
  const long size = depth * ((op.x.ld + D::panel - 1) / D::panel) * D::panel;
  Term transposed[2];
  for (int t = 0; t < count; ++t) {
    transposed[t] = {terms[t].a, packed + t * size};
    D::transpose_weights(terms[t].weights, taps, op.x.ld, op.y.ld, packed + t * size);
  }
  for (int c = 0; c < op.classes; ++c) {
    D::product({op.backward + c, image_size(op.y), zeros}, n, transposed, count, depth, op.x.ld,
               {g_x, image_size(op.x), nullptr, add});
  }
}

template <class T>
void Core<T>::outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const {
  using D = Direct<T>;
  constexpr int run_pixels = 256;  // what stays in the first-level cache beside a panel of the result
  const Window& w = op.window;
  const Grid &gx = op.x, &gy = op.y;
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
        const typename D::Run run{samples < n - s ? samples : n - s, y1 - y0, x1 - x0,
                                  image_size(gx), static_cast<long>(w.sy) * gx.w * gx.ld, static_cast<long>(w.sx) * gx.ld,
                                  image_size(gy), static_cast<long>(gy.w) * gy.ld, gy.ld};
        const long x_at = pixel(gx, s, y0 * w.sy - w.py + ky * w.dy, x0 * w.sx - w.px + kx * w.dx);
        D::outer(pairs, count, run, op.offsets, op.n_offsets, x_at, pixel(gy, s, y0, x0), gy.ld, depth,
                 g_w + static_cast<long>(tap) * gx.ld * D::panel);
      }
    }
  }
}

// Of one operation: the longest run of zeros, and the packed weights of two terms.
template <class T>
void needs(const Op& op, long& zeros, long& packed) {
  if (op.kind != Kind::conv2d) return;
  constexpr int panel = Direct<T>::panel;
  const long length = op.forward->length > op.y.ld ? op.forward->length : op.y.ld;
  const long weights = static_cast<long>(op.window.kh) * op.window.kw * op.y.ld * ((op.x.ld + panel - 1) / panel) * panel;
  if (length > zeros) zeros = length;
  if (2 * weights > packed) packed = 2 * weights;
}

template <class T>
void needs(const Program& program, long& zeros, long& packed) {
  zeros = packed = 0;
  for (int k = 0; k < program.n_ops; ++k) needs<T>(program.ops[k], zeros, packed);
  zeros = (zeros + 15) / 16 * 16;
}

template <class T>
long Core<T>::workspace_size(const Program& program) {
  long zeros, packed;
  needs<T>(program, zeros, packed);
  return zeros + packed;
}

template <class T>
Core<T>::Core(const Program& program, T* workspace) : zeros(workspace), transformed(nullptr) {
  long n_zeros, n_packed;
  needs<T>(program, n_zeros, n_packed);
  packed = workspace + n_zeros;
  std::memset(zeros, 0, n_zeros * sizeof(T));
}

}  // namespace METAFAST_NAMESPACE
