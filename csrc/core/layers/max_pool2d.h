// The largest of each window, the first of equals. Linear once the winners are known: tangents gather, adjoints
// scatter.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

struct MaxPool2d {
  // Options: kernel, stride, padding, dilation (y and x of each), ceil mode.
  template <class Node>
  static void make(Node& node, Op& op) {
    Window& w = op.window;
    node.read(w.kh, w.kw, w.sy, w.sx, w.py, w.px, w.dy, w.dx);
    const bool ceil = node.flag();
    if (w.kh * w.kw > 255) node.refuse("max pooling over more than 255 pixels");
    op.y = node.pooled(op.x, w, ceil);
  }

  static int64_t saved_elements(const Op& op, const PlannedPass& pass) {
    return pass.elements_for_bytes(pass.elements(op.y));
  }

  // Winners are kept as the index of the tap inside the window, a byte an output element.
  using Winner = uint8_t;

  template <class M>
  static void forward(const RuleContext<M>& ctx) {
    auto* winners = reinterpret_cast<Winner*>(ctx.saved);
    const Grid& gx = ctx.op.x;
    ctx.m.windows(ctx.op, ctx.n, [&](int sample, long out, int top, int left) {
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        auto best = M::lowest();
        auto winner = M::no_winner();
        for_each_tap(ctx.op, top, left, [&](int tap, int iy, int ix) {
          const auto x = M::load(ctx.x[0] + M::pixel(gx, sample, iy, ix) + ch);
          const auto better = (x > best) | (x != x);
          best = M::select(better, x, best);
          winner = M::choose(better, tap, winner);
        });
        M::store(ctx.y + out + ch, best);
        M::store_winner(winners + out + ch, winner);
      }
    });
  }

  template <class M>
  static void backward(const RuleContext<M>& ctx) {
    if (ctx.g_x[0]) scatter(ctx, ctx.g_y, ctx.g_x[0]);
  }

  template <class M>
  static void tangent_forward(const RuleContext<M>& ctx) {
    const auto* winners = reinterpret_cast<const Winner*>(ctx.saved);
    const Grid& gx = ctx.op.x;
    ctx.m.windows(ctx.op, ctx.n, [&](int sample, long out, int top, int left) {
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        const auto winner = M::load_winner(winners + out + ch);
        auto yd = M::broadcast(0);
        for_each_tap(ctx.op, top, left, [&](int tap, int iy, int ix) {
          yd = M::select(winner == tap, M::load(ctx.xd[0] + M::pixel(gx, sample, iy, ix) + ch), yd);
        });
        M::store(ctx.yd + out + ch, yd);
      }
    });
  }

  template <class M>
  static void tangent_backward(const RuleContext<M>& ctx) {
    if (ctx.gd_x[0]) scatter(ctx, ctx.gd_y, ctx.gd_x[0]);
  }

 private:
  template <class M, class T>
  static void scatter(const RuleContext<M>& ctx, const T* g, T* g_x) {
    const auto* winners = reinterpret_cast<const Winner*>(ctx.saved);
    const Grid& gx = ctx.op.x;
    if (!ctx.op.add[0]) {
      const auto zero = M::broadcast(0);
      ctx.m.each(static_cast<long>(ctx.pixels(gx)) * gx.ld, [=](long i) { M::store(g_x + i, zero); });
    }
    ctx.m.windows(ctx.op, ctx.n, [&](int sample, long out, int top, int left) {
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        const auto winner = M::load_winner(winners + out + ch);
        const auto value = M::load(g + out + ch);
        for_each_tap(ctx.op, top, left, [&](int tap, int iy, int ix) {
          const auto mine = M::select(winner == tap, value, M::broadcast(0));
          M::put(g_x + M::pixel(gx, sample, iy, ix) + ch, mine, true);
        });
      }
    });
  }

  template <class F>
  static void for_each_tap(const Op& op, int top, int left, const F& f) {
    const Window& w = op.window;
    for (int ky = 0; ky < w.kh; ++ky) {
      const int iy = top + ky * w.dy;
      if (iy < 0 || iy >= op.x.h) continue;
      for (int kx = 0; kx < w.kw; ++kx) {
        const int ix = left + kx * w.dx;
        if (ix >= 0 && ix < op.x.w) f(ky * w.kw + kx, iy, ix);
      }
    }
  }
};

}  // namespace METAFAST_NAMESPACE
