// Means over windows, fixed or adaptive: y = A x, g_x = A' g.
#pragma once
#include "linear_map.h"

namespace METAFAST_NAMESPACE {

struct AvgPool2d : LinearMap<AvgPool2d> {
  // Options: kernel, stride, padding (y and x of each), ceil mode, does it count padding, a divisor (0: what it
  // counts).
  template <class Node>
  static void make(Node& node, Op& op) {
    Window& w = op.window;
    node.read(w.kh, w.kw, w.sy, w.sx, w.py, w.px);
    w.dy = w.dx = 1;
    const bool ceil = node.flag();
    op.count_pad = node.flag();
    op.divisor = node.real();
    op.y = node.pooled(op.x, w, ceil);
  }

 private:
  friend LinearMap<AvgPool2d>;

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
    const int bottom = smaller(top + w.kh, op.x.h + w.py), right = smaller(left + w.kw, op.x.w + w.px);
    Cell c{top < 0 ? 0 : top, smaller(bottom, op.x.h), left < 0 ? 0 : left, smaller(right, op.x.w), 0};
    const int counted = op.count_pad ? (bottom - top) * (right - left) : (c.y1 - c.y0) * (c.x1 - c.x0);
    c.scale = 1.0 / (op.divisor > 0 ? op.divisor : counted);
    return c;
  }

  static int smaller(int a, int b) { return a < b ? a : b; }

  template <class M, class T>
  static void gather(const RuleContext<M>& ctx, const T* x, T* y) {
    const Grid& gx = ctx.op.x;
    ctx.m.pixels(ctx.op.y, ctx.n, [&](int sample, long out, int oy, int ox) {
      const Cell c = cell(ctx.op, oy, ox);
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        auto sum = M::broadcast(0);
        for (int iy = c.y0; iy < c.y1; ++iy)
          for (int ix = c.x0; ix < c.x1; ++ix) sum += M::load(x + M::pixel(gx, sample, iy, ix) + ch);
        M::store(y + out + ch, sum * T(c.scale));
      }
    });
  }

  template <class M, class T>
  static void scatter(const RuleContext<M>& ctx, const T* g, T* g_x) {
    const Grid& gx = ctx.op.x;
    if (!ctx.op.add[0]) {
      const auto zero = M::broadcast(0);
      ctx.m.each(static_cast<long>(ctx.pixels(gx)) * gx.ld, [=](long i) { M::store(g_x + i, zero); });
    }
    ctx.m.pixels(ctx.op.y, ctx.n, [&](int sample, long out, int oy, int ox) {
      const Cell c = cell(ctx.op, oy, ox);
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        const auto value = M::load(g + out + ch) * T(c.scale);
        for (int iy = c.y0; iy < c.y1; ++iy)
          for (int ix = c.x0; ix < c.x1; ++ix) M::put(g_x + M::pixel(gx, sample, iy, ix) + ch, value, true);
      }
    });
  }
};

// The mean pooling to a grid of given size.
struct AdaptiveAvgPool2d {
  // Options: height and width of the output.
  template <class Node>
  static void make(Node& node, Op& op) {
    op.adaptive = true;
    node.read(op.y.h, op.y.w);
  }
};

}  // namespace METAFAST_NAMESPACE
