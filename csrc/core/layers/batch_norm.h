// y = gamma xh + beta, xh = r (x - mean x), r = (var x + eps)^-1/2, means over the m pixels of a channel.
// P(u) = r (u - mean u - xh mean(xh u)) is symmetric; with gh = gamma g:
//   g_x  = P(gh)                                 g_gamma  = sum g xh             g_beta  = sum g
//   yd   = gamma P(xd) + gammad xh + betad       xhd = P(xd), c = mean(xh xd)
//   gd_x = -r c g_x + r (ghd - mean ghd - xh mean(ghd xh + gh xhd) - xhd mean(gh xh)),  ghd = gamma gd + gammad g
//   gd_gamma = sum(gd xh + g xhd)                gd_beta = sum gd
// Statistics that are given are the same formulas with every mean zero.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

struct BatchNorm {
  // Options: eps, fixed statistics, rows of gamma and beta (one for each inner step, or one).
  template <class Node>
  static void make(Node& node, Op& op) {
    if (node.is_vector() && op.x.h * op.x.w > 1) node.refuse("batch norm of flattened images");
    op.eps = node.real();
    if (op.eps <= 0) node.refuse("batch norm with eps = 0");
    op.fixed_statistics = node.flag();
    if (op.fixed_statistics) op.constants = node.constants();
    const int rows = node.integer();
    op.weight = node.by_channel(0, rows);
    op.bias = node.by_channel(1, rows);
  }

  static int64_t saved_elements(const Op& op, const PlannedPass&) { return int64_t{saved} * op.x.ld; }

  // The per-channel vectors that a pass remembers, each `ld` long.
  enum Saved { mean, r, sum_g, sum_gxh, mean_xd, c, sum_gd, sum_gdxh, saved };

  template <class M>
  static void statistics(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    const int rows = ctx.pixels(ctx.op.x), ld = ctx.op.x.ld;
    T *mu = at(ctx, mean), *rr = at(ctx, r);
    const T *x = ctx.x[0], one_over_m = T(1) / rows, eps = T(ctx.op.eps);
    if (ctx.op.fixed_statistics) {
      const T* given = ctx.constants + ctx.op.constants;
      ctx.m.each(ld, [=](long i) {
        M::store(mu + i, M::load(given + i));
        M::store(rr + i, M::rsqrt(M::load(given + ld + i) + eps));
      });
      return;
    }
    ctx.m.template reduce<1>(rows, ld, mu, false,
                             [=](int) { return [=](long i, auto* sum) { sum[0] += M::load(x + i); }; });
    ctx.m.each(ld, [=](long i) { M::store(mu + i, M::load(mu + i) * one_over_m); });
    ctx.m.template reduce<1>(rows, ld, rr, false, [=](int ch) {
      return [=, centre = M::load(mu + ch)](long i, auto* sum) {
        const auto d = M::load(x + i) - centre;
        sum[0] += d * d;
      };
    });
    ctx.m.each(ld, [=](long i) { M::store(rr + i, M::rsqrt(M::load(rr + i) * one_over_m + eps)); });
  }

  template <class M>
  static void forward(const RuleContext<M>& ctx) {
    statistics(ctx);
    const auto* x = ctx.x[0];
    auto* y = ctx.y;
    ctx.m.channels(ctx.pixels(ctx.op.x), ctx.op.x.ld, [=](int ch) {
      const auto scale = at(ctx, r, ch) * coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      const auto centre = at(ctx, mean, ch), shift = coefficient(ctx, ctx.op.bias, ctx.theta, ch, 0);
      return [=](long i) { M::store(y + i, (M::load(x + i) - centre) * scale + shift); };
    });
  }

  template <class M>
  static void backward(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    const int rows = ctx.pixels(ctx.op.x), ld = ctx.op.x.ld;
    const T *x = ctx.x[0], *g = ctx.g_y;
    T *g_x = ctx.g_x[0], *sums = at(ctx, sum_g);
    ctx.m.template reduce<2>(rows, ld, sums, false, [=](int ch) {
      const Channel<M> at_ch(ctx, ch);
      return [=](long i, auto* sum) {
        const auto gy = M::load(g + i);
        sum[0] += gy;
        sum[1] += gy * at_ch.standard(x + i);
      };
    });
    add_adjoints(ctx, at(ctx, sum_gxh), sums);
    if (!g_x) return;
    const bool add = ctx.op.add[0];
    ctx.m.channels(rows, ld, [=](int ch) {
      const Channel<M> at_ch(ctx, ch);
      const auto scale = at_ch.r * coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      return [=](long i) { M::put(g_x + i, scale * at_ch.project(M::load(g + i), at_ch.standard(x + i)), add); };
    });
  }

  // mean xd and c = mean(xh xd), which turn xd into xhd.
  template <class M>
  static void tangent_statistics(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    const T *x = ctx.x[0], *xd = ctx.xd[0];
    T *means = at(ctx, mean_xd), inv = share(ctx);
    ctx.m.template reduce<2>(ctx.pixels(ctx.op.x), ctx.op.x.ld, means, false, [=](int ch) {
      const Channel<M> at_ch(ctx, ch);
      return [=](long i, auto* sum) {
        const auto d = M::load(xd + i);
        sum[0] += d;
        sum[1] += d * at_ch.standard(x + i);
      };
    });
    ctx.m.each(2 * ctx.op.x.ld, [=](long i) { M::store(means + i, M::load(means + i) * inv); });
  }

  template <class M>
  static void tangent_forward(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    const T *x = ctx.x[0], *xd = ctx.xd[0];
    T* yd = ctx.yd;
    if (xd) tangent_statistics(ctx);
    ctx.m.channels(ctx.pixels(ctx.op.x), ctx.op.x.ld, [=](int ch) {
      const Channel<M> at_ch(ctx, ch);
      const auto gamma = coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1);
      const auto gammad = direction(ctx, ctx.op.weight, ch), betad = direction(ctx, ctx.op.bias, ch);
      return [=](long i) {
        const auto xh = at_ch.standard(x + i);
        auto value = gammad * xh + betad;
        if (xd) value += gamma * at_ch.tangent(M::load(xd + i), xh);
        M::store(yd + i, value);
      };
    });
  }

  template <class M>
  static void tangent_backward(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    const int rows = ctx.pixels(ctx.op.x), ld = ctx.op.x.ld;
    const T *x = ctx.x[0], *xd = ctx.xd[0], *g = ctx.g_y, *gd = ctx.gd_y;
    T *sums = at(ctx, sum_gd), *gd_x = ctx.gd_x[0];
    ctx.m.template reduce<2>(rows, ld, sums, false, [=](int ch) {
      const Channel<M> at_ch(ctx, ch);
      return [=](long i, auto* sum) {
        const auto xh = at_ch.standard(x + i), gdy = M::load(gd + i);
        sum[0] += gdy;
        sum[1] += gdy * xh;
        if (xd) sum[1] += M::load(g + i) * at_ch.tangent(M::load(xd + i), xh);
      };
    });
    add_adjoints(ctx, at(ctx, sum_gdxh), sums);
    if (!gd_x) return;
    const bool add = ctx.op.add[0];
    ctx.m.channels(rows, ld, [=](int ch) {
      const Channel<M> at_ch(ctx, ch);
      const AdjointTangent<M> tangent(ctx, ch);
      return [=](long i) {
        const auto xh = at_ch.standard(x + i);
        auto inner = tangent.from_gd(M::load(gd + i), xh);
        if (g) inner += tangent.from_g(at_ch.project(M::load(g + i), xh));
        if (xd) inner -= tangent.mean_ghxh * at_ch.tangent(M::load(xd + i), xh);
        M::put(gd_x + i, at_ch.r * inner, add);
      };
    });
  }

  // The coefficients of one pack of channels.
  template <class M>
  struct Channel {
    typename M::Pack mean, r, mean_g, mean_gxh, mean_xd, c;
    Channel(const RuleContext<M>& ctx, int ch)
        : mean(at(ctx, Saved::mean, ch)),
          r(at(ctx, Saved::r, ch)),
          mean_g(at(ctx, sum_g, ch) * share(ctx)),
          mean_gxh(at(ctx, sum_gxh, ch) * share(ctx)),
          mean_xd(at(ctx, Saved::mean_xd, ch)),
          c(at(ctx, Saved::c, ch)) {}
    auto standard(const typename M::Real* x) const { return (M::load(x) - mean) * r; }
    auto project(typename M::Pack g, typename M::Pack xh) const { return g - mean_g - xh * mean_gxh; }
    auto tangent(typename M::Pack xd, typename M::Pack xh) const { return r * (xd - mean_xd - xh * c); }
  };

  // What tangent_backward adds up, without the factor r: `start` is the part of P(gamma gd), `turn` that of
  // P(gammad g) - c g_x, and b = mean(gh xh).
  template <class M>
  struct AdjointTangent {
    typename M::Pack gamma, mean_gd, mean_gdxh, mean_ghxh, of_projected;
    AdjointTangent(const RuleContext<M>& ctx, int ch)
        : gamma(coefficient(ctx, ctx.op.weight, ctx.theta, ch, 1)),
          mean_gd(at(ctx, sum_gd, ch) * share(ctx)),
          mean_gdxh(at(ctx, sum_gdxh, ch) * share(ctx)),
          mean_ghxh(gamma * at(ctx, sum_gxh, ch) * share(ctx)),
          of_projected(direction(ctx, ctx.op.weight, ch)) {
      if (ctx.xd[0]) of_projected -= gamma * at(ctx, r, ch) * at(ctx, c, ch);
    }
    auto from_gd(typename M::Pack gd, typename M::Pack xh) const { return gamma * (gd - mean_gd - xh * mean_gdxh); }
    auto from_g(typename M::Pack projected) const { return of_projected * projected; }
  };

  template <class M>
  static typename M::Real* at(const RuleContext<M>& ctx, Saved which) {
    return ctx.saved + static_cast<long>(which) * ctx.op.x.ld;
  }

  template <class M>
  static typename M::Pack at(const RuleContext<M>& ctx, Saved which, int ch) {
    return M::load(at(ctx, which) + ch);
  }

  // 1 / m, or zero where the statistics do not depend on x.
  template <class M>
  static typename M::Real share(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    return ctx.op.fixed_statistics ? T(0) : T(1) / ctx.pixels(ctx.op.x);
  }

  // The parameter of a pack of channels, or what stands in for one that the layer does not have.
  template <class M>
  static typename M::Pack coefficient(const RuleContext<M>& ctx, const Slot& slot, const typename M::Real* params,
                                      int ch, int otherwise) {
    return slot.at < 0 ? M::broadcast(otherwise) : M::load(params + ctx.row(slot) + ch);
  }

  template <class M>
  static typename M::Pack direction(const RuleContext<M>& ctx, const Slot& slot, int ch) {
    return ctx.moves(slot) ? M::load(ctx.u + ctx.row(slot) + ch) : M::broadcast(0);
  }

  template <class M>
  static void add_adjoints(const RuleContext<M>& ctx, const typename M::Real* gamma, const typename M::Real* beta) {
    add_adjoint(ctx, ctx.op.weight, gamma);
    add_adjoint(ctx, ctx.op.bias, beta);
  }

 private:
  template <class M>
  static void add_adjoint(const RuleContext<M>& ctx, const Slot& slot, const typename M::Real* sums) {
    if (!ctx.wants(slot)) return;
    auto* out = ctx.grad + ctx.row(slot);
    ctx.m.each(ctx.op.x.ld, [=](long i) { M::put(out + i, M::load(sums + i), true); });
  }
};

}  // namespace METAFAST_NAMESPACE
