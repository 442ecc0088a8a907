// Means over windows, fixed or adaptive: y = A x, g_x = A' g.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct AvgPool2d {
  template <class M>
  static void forward(const Frame<M>& f) {
    gather(f, f.x[0], f.y);
  }

  template <class M>
  static void backward(const Frame<M>& f) {
    if (f.g_x[0]) scatter(f, f.g_y, f.g_x[0]);
  }

  template <class M>
  static void tangent_forward(const Frame<M>& f) {
    gather(f, f.xd[0], f.yd);
  }

  template <class M>
  static void tangent_backward(const Frame<M>& f) {
    if (f.gd_x[0]) scatter(f, f.gd_y, f.gd_x[0]);
  }

 private:
  // Rows and columns [y0, y1) x [x0, x1) of the input that an output pixel is a mean of, and 1 / (what it divides by).
  struct Cell {
    int y0, y1, x0, x1;
    double scale;
  };

  static Cell cell(const Op& op, int oy, int ox) {
    const Window& w = op.window;
    if (op.adaptive) {
      Cell c{oy * op.x.h / op.y.h, ((oy + 1) * op.x.h + op.y.h - 1) / op.y.h, ox * op.x.w / op.y.w,
             ((ox + 1) * op.x.w + op.y.w - 1) / op.y.w, 0};
      c.scale = 1.0 / ((c.y1 - c.y0) * (c.x1 - c.x0));
      return c;
    }
    const int top = oy * w.sy - w.py, left = ox * w.sx - w.px;
    // A window of ceil mode may reach past the padding: what lies there is not counted.
    const int bottom = least(top + w.kh, op.x.h + w.py), right = least(left + w.kw, op.x.w + w.px);
    Cell c{top < 0 ? 0 : top, least(bottom, op.x.h), left < 0 ? 0 : left, least(right, op.x.w), 0};
    const int counted = op.count_pad ? (bottom - top) * (right - left) : (c.y1 - c.y0) * (c.x1 - c.x0);
    c.scale = 1.0 / (op.divisor > 0 ? op.divisor : counted);
    return c;
  }

  static int least(int a, int b) { return a < b ? a : b; }

  template <class M, class T>
  static void gather(const Frame<M>& f, const T* x, T* y) {
    const Grid& gx = f.op.x;
    f.m.pixels(f.op.y, f.n, [&](int sample, long out, int oy, int ox) {
      const Cell c = cell(f.op, oy, ox);
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        auto sum = M::broadcast(0);
        for (int iy = c.y0; iy < c.y1; ++iy)
          for (int ix = c.x0; ix < c.x1; ++ix) sum += M::load(x + M::pixel(gx, sample, iy, ix) + ch);
        M::store(y + out + ch, sum * T(c.scale));
      }
    });
  }

  template <class M, class T>
  static void scatter(const Frame<M>& f, const T* g, T* g_x) {
    const Grid& gx = f.op.x;
    if (!f.op.add[0]) {
      const auto zero = M::broadcast(0);
      f.m.each(static_cast<long>(f.pixels(gx)) * gx.ld, [=](long i) { M::store(g_x + i, zero); });
    }
    f.m.pixels(f.op.y, f.n, [&](int sample, long out, int oy, int ox) {
      const Cell c = cell(f.op, oy, ox);
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        const auto value = M::load(g + out + ch) * T(c.scale);
        for (int iy = c.y0; iy < c.y1; ++iy)
          for (int ix = c.x0; ix < c.x1; ++ix) M::put(g_x + M::pixel(gx, sample, iy, ix) + ch, value, true);
      }
    });
  }
};

}  // namespace METAFAST_NAMESPACE
