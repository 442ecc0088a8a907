// Batch norm, ReLU and 2x2 max-pooling in one: the value between them is never stored. A pooled element remembers which
// of its four pixels won and the standardised value there, so sums over adjoints run over the pooled image only: an
// adjoint is zero at every other pixel. The formulas are those of batch_norm.h.
#pragma once
#include "batch_norm.h"

namespace METAFAST_NAMESPACE {

struct NormReluPool {
  using BN = BatchNorm;

  template <class M>
  static void forward(const Frame<M>& f) {
    BN::statistics(f);
    const auto* x = f.x[0];
    auto *y = f.y, *xh = standard(f);
    auto* winners = winner(f);
    f.m.quads(f.op, f.n, [=](int ch) {
      const auto centre = BN::at(f, BN::mean, ch), r = BN::at(f, BN::r, ch);
      const auto scale = r * BN::coefficient(f, f.op.weight, f.theta, ch, 1);
      const auto shift = BN::coefficient(f, f.op.bias, f.theta, ch, 0);
      return [=](long out, const long* in) {
        auto best = (M::load(x + in[0]) - centre) * scale + shift, at_best = M::load(x + in[0]);
        auto which = M::no_winner();
        for (int tap = 1; tap < 4; ++tap) {
          const auto pixel = M::load(x + in[tap]), value = (pixel - centre) * scale + shift;
          const auto better = (value > best) | (value != value);
          best = M::select(better, value, best);
          at_best = M::select(better, pixel, at_best);
          which = M::choose(better, tap, which);
        }
        const auto on = (best > 0) | (best != best);
        M::store(y + out, M::select(on, best, M::broadcast(0)));
        M::store(xh + out, (at_best - centre) * r);
        M::store_winner(winners + out, M::choose(~on, none, which));
      };
    });
  }

  template <class M>
  static void backward(const Frame<M>& f) {
    const auto *x = f.x[0], *g = f.g_y, *xh = standard(f);
    const auto* winners = winner(f);
    auto *g_x = f.g_x[0], *sums = BN::at(f, BN::sum_g);
    f.m.template reduce<2>(f.pixels(f.op.y), f.op.y.ld, sums, false, [=](int) {
      return [=](long i, auto* sum) {
        const auto gy = M::select(M::load_winner(winners + i) != none, M::load(g + i), M::broadcast(0));
        sum[0] += gy;
        sum[1] += gy * M::load(xh + i);
      };
    });
    BN::add_adjoints(f, BN::at(f, BN::sum_gxh), sums);
    if (!g_x) return;
    const bool add = f.op.add[0];
    f.m.quads(f.op, f.n, [=](int ch) {
      const BN::Channel<M> at_ch(f, ch);
      const auto scale = at_ch.r * BN::coefficient(f, f.op.weight, f.theta, ch, 1);
      return [=](long out, const long* in) {
        const auto which = M::load_winner(winners + out);
        const auto gy = M::load(g + out);
        for (int tap = 0; tap < 4; ++tap) {
          const auto mine = M::select(which == tap, gy, M::broadcast(0));
          M::put(g_x + in[tap], scale * at_ch.project(mine, at_ch.standard(x + in[tap])), add);
        }
      };
    });
    f.m.leftovers(f.op, f.n, [=](int ch) {
      const BN::Channel<M> at_ch(f, ch);
      const auto scale = at_ch.r * BN::coefficient(f, f.op.weight, f.theta, ch, 1);
      return [=](long i) { M::put(g_x + i, scale * at_ch.project(M::broadcast(0), at_ch.standard(x + i)), add); };
    });
  }

  template <class M>
  static void tangent_forward(const Frame<M>& f) {
    if (f.xd[0]) BN::tangent_statistics(f);
    const auto *xd = f.xd[0], *xh = standard(f);
    const auto* winners = winner(f);
    auto *yd = f.yd, *xhd = standard_tangent(f);
    f.m.quads(f.op, f.n, [=](int ch) {
      const BN::Channel<M> at_ch(f, ch);
      const auto gamma = BN::coefficient(f, f.op.weight, f.theta, ch, 1);
      const auto gammad = BN::direction(f, f.op.weight, ch), betad = BN::direction(f, f.op.bias, ch);
      return [=](long out, const long* in) {
        const auto which = M::load_winner(winners + out);
        const auto standard = M::load(xh + out);
        auto value = gammad * standard + betad;
        if (xd) {
          auto d = M::load(xd + in[0]);
          for (int tap = 1; tap < 4; ++tap) d = M::select(which == tap, M::load(xd + in[tap]), d);
          const auto moved = at_ch.tangent(d, standard);
          M::store(xhd + out, moved);
          value += gamma * moved;
        }
        M::store(yd + out, M::select(which != none, value, M::broadcast(0)));
      };
    });
  }

  template <class M>
  static void tangent_backward(const Frame<M>& f) {
    const auto *x = f.x[0], *xd = f.xd[0], *g = f.g_y, *gd = f.gd_y, *xh = standard(f), *xhd = standard_tangent(f);
    const auto* winners = winner(f);
    auto *gd_x = f.gd_x[0], *sums = BN::at(f, BN::sum_gd);
    f.m.template reduce<2>(f.pixels(f.op.y), f.op.y.ld, sums, false, [=](int) {
      return [=](long i, auto* sum) {
        const auto on = M::load_winner(winners + i) != none;
        const auto gdy = M::select(on, M::load(gd + i), M::broadcast(0));
        sum[0] += gdy;
        sum[1] += gdy * M::load(xh + i);
        if (xd) sum[1] += M::select(on, M::load(g + i), M::broadcast(0)) * M::load(xhd + i);
      };
    });
    BN::add_adjoints(f, BN::at(f, BN::sum_gdxh), sums);
    if (!gd_x) return;
    const bool add = f.op.add[0];
    const auto pixels = [=](int ch) {
      const BN::Channel<M> at_ch(f, ch);
      const BN::Bend<M> bend(f, ch);
      return [=](long i, typename M::Pack gdy, typename M::Pack gy) {
        const auto standard = at_ch.standard(x + i);
        auto inner = bend.start(gdy, standard);
        if (g) inner += bend.turn(at_ch.project(gy, standard));
        if (xd) inner -= bend.b * at_ch.tangent(M::load(xd + i), standard);
        M::put(gd_x + i, at_ch.r * inner, add);
      };
    };
    f.m.quads(f.op, f.n, [=](int ch) {
      const auto pixel = pixels(ch);
      return [=](long out, const long* in) {
        const auto zero = M::broadcast(0);
        const auto which = M::load_winner(winners + out);
        const auto gdy = M::load(gd + out), gy = g ? M::load(g + out) : zero;
        for (int tap = 0; tap < 4; ++tap) {
          const auto mine = which == tap;
          pixel(in[tap], M::select(mine, gdy, zero), M::select(mine, gy, zero));
        }
      };
    });
    f.m.leftovers(f.op, f.n, [=](int ch) {
      const auto pixel = pixels(ch);
      return [=](long i) { pixel(i, M::broadcast(0), M::broadcast(0)); };
    });
  }

  // What a pass remembers: the vectors of batch norm, the winners (`none` where ReLU cuts), and at the winners xh and,
  // in a pass whose tangent follows, xhd.
  static constexpr int none = 4;

 private:
  template <class M>
  static long pooled(const Frame<M>& f) {
    return static_cast<long>(f.pixels(f.op.y)) * f.op.y.ld;
  }

  template <class M>
  static typename M::Real* standard(const Frame<M>& f) {
    return f.saved + static_cast<long>(BN::saved) * f.op.x.ld;
  }

  template <class M>
  static uint8_t* winner(const Frame<M>& f) {
    return reinterpret_cast<uint8_t*>(standard(f) + pooled(f));
  }

  template <class M>
  static typename M::Real* standard_tangent(const Frame<M>& f) {
    return standard(f) + pooled(f) + (pooled(f) + sizeof(typename M::Real) - 1) / sizeof(typename M::Real);
  }
};

}  // namespace METAFAST_NAMESPACE
