// The largest of each window, the first of equals. Linear once the winners are known: tangents gather, adjoints
// scatter.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct MaxPool2d {
  // Winners are kept as the index of the tap inside the window, a byte an output element.
  using Winner = uint8_t;

  template <class M>
  static void forward(const Frame<M>& f) {
    auto* winners = reinterpret_cast<Winner*>(f.saved);
    const Grid& gx = f.op.x;
    f.m.windows(f.op, f.n, [&](int sample, long out, int top, int left) {
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        auto best = M::lowest();
        auto winner = M::no_winner();
        for_each_tap(f.op, top, left, [&](int tap, int iy, int ix) {
          const auto x = M::load(f.x[0] + M::pixel(gx, sample, iy, ix) + ch);
          const auto better = (x > best) | (x != x);
          best = M::select(better, x, best);
          winner = M::choose(better, tap, winner);
        });
        M::store(f.y + out + ch, best);
        M::store_winner(winners + out + ch, winner);
      }
    });
  }

  template <class M>
  static void backward(const Frame<M>& f) {
    if (f.g_x[0]) scatter(f, f.g_y, f.g_x[0]);
  }

  template <class M>
  static void tangent_forward(const Frame<M>& f) {
    const auto* winners = reinterpret_cast<const Winner*>(f.saved);
    const Grid& gx = f.op.x;
    f.m.windows(f.op, f.n, [&](int sample, long out, int top, int left) {
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        const auto winner = M::load_winner(winners + out + ch);
        auto yd = M::broadcast(0);
        for_each_tap(f.op, top, left, [&](int tap, int iy, int ix) {
          yd = M::select(winner == tap, M::load(f.xd[0] + M::pixel(gx, sample, iy, ix) + ch), yd);
        });
        M::store(f.yd + out + ch, yd);
      }
    });
  }

  template <class M>
  static void tangent_backward(const Frame<M>& f) {
    if (f.gd_x[0]) scatter(f, f.gd_y, f.gd_x[0]);
  }

 private:
  template <class M, class T>
  static void scatter(const Frame<M>& f, const T* g, T* g_x) {
    const auto* winners = reinterpret_cast<const Winner*>(f.saved);
    const Grid& gx = f.op.x;
    if (!f.op.add[0]) {
      const auto zero = M::broadcast(0);
      f.m.each(static_cast<long>(f.pixels(gx)) * gx.ld, [=](long i) { M::store(g_x + i, zero); });
    }
    f.m.windows(f.op, f.n, [&](int sample, long out, int top, int left) {
      for (int ch = 0; ch < gx.ld; ch += M::lanes) {
        const auto winner = M::load_winner(winners + out + ch);
        const auto value = M::load(g + out + ch);
        for_each_tap(f.op, top, left, [&](int tap, int iy, int ix) {
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
