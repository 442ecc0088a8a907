// Batch norm, ReLU and 2x2 max-pooling in one: the value between them is never stored. A pooled element remembers which
// of its four pixels won and the standardised value there, so sums over adjoints run over the pooled image only: an
// adjoint is zero at every other pixel. The formulas are those of batch_norm.h.
#pragma once
#include "batch_norm.h"

namespace METAFAST_NAMESPACE {

struct NormReluPool {
  // fusion.cpp makes the operation; winners take a byte each.
  static int64_t saved_elements(const Op& op, const PlannedPass& pass) {
    const int64_t pooled = pass.elements(op.y), tangents = pass.kind == PassKind::gradient_and_tangent ? pooled : 0;
    return BatchNorm::saved_elements(op, pass) + pooled + tangents + pass.elements_for_bytes(pooled);
  }

  using BN = BatchNorm;

  template <class M>
  static void forward(const RuleContext<M>& ctx) {
    BN::statistics(ctx);
    const auto* x = ctx.x[0];
    auto *y = ctx.y, *xh = standard(ctx);
    auto* winners = winner(ctx);
    ctx.m.windows2x2(ctx.op, ctx.n, [=](int ch) {
      const auto centre = BN::at(ctx, BN::mean, ch), r = BN::at(ctx, BN::r, ch);
      const auto scale = r * BN::coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      const auto shift = BN::coefficient(ctx, ctx.op.bias, ctx.theta, ch, 0);
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
  static void backward(const RuleContext<M>& ctx) {
    const auto *x = ctx.x[0], *g = ctx.g_y, *xh = standard(ctx);
    const auto* winners = winner(ctx);
    auto *g_x = ctx.g_x[0], *sums = BN::at(ctx, BN::sum_g);
    ctx.m.template reduce<2>(ctx.pixels(ctx.op.y), ctx.op.y.ld, sums, false, [=](int) {
      return [=](long i, auto* sum) {
        const auto gy = M::select(M::load_winner(winners + i) != none, M::load(g + i), M::broadcast(0));
        sum[0] += gy;
        sum[1] += gy * M::load(xh + i);
      };
    });
    BN::add_adjoints(ctx, BN::at(ctx, BN::sum_gxh), sums);
    if (!g_x) return;
    const bool add = ctx.op.add[0];
    ctx.m.windows2x2(ctx.op, ctx.n, [=](int ch) {
      const BN::Channel<M> at_ch(ctx, ch);
      const auto scale = at_ch.r * BN::coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      return [=](long out, const long* in) {
        const auto which = M::load_winner(winners + out);
        const auto gy = M::load(g + out);
        for (int tap = 0; tap < 4; ++tap) {
          const auto mine = M::select(which == tap, gy, M::broadcast(0));
          M::put(g_x + in[tap], scale * at_ch.project(mine, at_ch.standard(x + in[tap])), add);
        }
      };
    });
    ctx.m.outside_windows2x2(ctx.op, ctx.n, [=](int ch) {
      const BN::Channel<M> at_ch(ctx, ch);
      const auto scale = at_ch.r * BN::coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      return [=](long i) { M::put(g_x + i, scale * at_ch.project(M::broadcast(0), at_ch.standard(x + i)), add); };
    });
  }

  template <class M>
  static void tangent_forward(const RuleContext<M>& ctx) {
    if (ctx.xd[0]) BN::tangent_statistics(ctx);
    const auto *xd = ctx.xd[0], *xh = standard(ctx);
    const auto* winners = winner(ctx);
    auto *yd = ctx.yd, *xhd = standard_tangent(ctx);
    ctx.m.windows2x2(ctx.op, ctx.n, [=](int ch) {
      const BN::Channel<M> at_ch(ctx, ch);
      const auto gamma = BN::coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      const auto gammad = BN::direction(ctx, ctx.op.weight, ch), betad = BN::direction(ctx, ctx.op.bias, ch);
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
  static void tangent_backward(const RuleContext<M>& ctx) {
    const auto *x = ctx.x[0], *xd = ctx.xd[0], *g = ctx.g_y, *gd = ctx.gd_y, *xh = standard(ctx),
               *xhd = standard_tangent(ctx);
    const auto* winners = winner(ctx);
    auto *gd_x = ctx.gd_x[0], *sums = BN::at(ctx, BN::sum_gd);
    ctx.m.template reduce<2>(ctx.pixels(ctx.op.y), ctx.op.y.ld, sums, false, [=](int) {
      return [=](long i, auto* sum) {
        const auto on = M::load_winner(winners + i) != none;
        const auto gdy = M::select(on, M::load(gd + i), M::broadcast(0));
        sum[0] += gdy;
        sum[1] += gdy * M::load(xh + i);
        if (xd) sum[1] += M::select(on, M::load(g + i), M::broadcast(0)) * M::load(xhd + i);
      };
    });
    BN::add_adjoints(ctx, BN::at(ctx, BN::sum_gdxh), sums);
    if (!gd_x) return;
    const bool add = ctx.op.add[0];
    const auto pixels = [=](int ch) {
      const BN::Channel<M> at_ch(ctx, ch);
      const BN::AdjointTangent<M> tangent(ctx, ch);
      return [=](long i, typename M::Pack gdy, typename M::Pack gy) {
        const auto standard = at_ch.standard(x + i);
        auto inner = tangent.from_gd(gdy, standard);
        if (g) inner += tangent.from_g(at_ch.project(gy, standard));
        if (xd) inner -= tangent.mean_ghxh * at_ch.tangent(M::load(xd + i), standard);
        M::put(gd_x + i, at_ch.r * inner, add);
      };
    };
    ctx.m.windows2x2(ctx.op, ctx.n, [=](int ch) {
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
    ctx.m.outside_windows2x2(ctx.op, ctx.n, [=](int ch) {
      const auto pixel = pixels(ch);
      return [=](long i) { pixel(i, M::broadcast(0), M::broadcast(0)); };
    });
  }

  // What a pass remembers: the vectors of batch norm, the winners (`none` where ReLU cuts), and at the winners xh and,
  // in a pass whose tangent follows, xhd.
  static constexpr int none = 4;

 private:
  template <class M>
  static long pooled(const RuleContext<M>& ctx) {
    return static_cast<long>(ctx.pixels(ctx.op.y)) * ctx.op.y.ld;
  }

  template <class M>
  static typename M::Real* standard(const RuleContext<M>& ctx) {
    return ctx.saved + static_cast<long>(BN::saved) * ctx.op.x.ld;
  }

  template <class M>
  static uint8_t* winner(const RuleContext<M>& ctx) {
    return reinterpret_cast<uint8_t*>(standard(ctx) + pooled(ctx));
  }

  template <class M>
  static typename M::Real* standard_tangent(const RuleContext<M>& ctx) {
    return standard(ctx) + pooled(ctx) + (pooled(ctx) + sizeof(typename M::Real) - 1) / sizeof(typename M::Real);
  }
};

}  // namespace METAFAST_NAMESPACE
