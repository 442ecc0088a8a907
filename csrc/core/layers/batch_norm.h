// y = gamma xh + beta, xh = r (x - mean x), r = (var x + eps)^-1/2, means over the m pixels of a channel.
// P(u) = r (u - mean u - xh mean(xh u)) is symmetric; with gh = gamma g:
//   g_x  = P(gh)                                 g_gamma  = sum g xh             g_beta  = sum g
//   yd   = gamma P(xd) + gammad xh + betad       xhd = P(xd), c = mean(xh xd)
//   gd_x = -r c g_x + r (ghd - mean ghd - xh mean(ghd xh + gh xhd) - xhd mean(gh xh)),  ghd = gamma gd + gammad g
//   gd_gamma = sum(gd xh + g xhd)                gd_beta = sum gd
// Statistics that are given are the same formulas with every mean zero.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct BatchNorm {
  // The per-channel vectors that a pass remembers, each `ld` long.
  enum Saved { mean, r, sum_g, sum_gxh, mean_xd, c, sum_gd, sum_gdxh, saved };

  template <class M>
  static void statistics(const Frame<M>& f) {
    using T = typename M::Real;
    const int rows = f.pixels(f.op.x), ld = f.op.x.ld;
    T *mu = at(f, mean), *rr = at(f, r);
    const T *x = f.x[0], one_over_m = T(1) / rows, eps = T(f.op.eps);
    if (f.op.given) {
      const T* given = f.constants + f.op.constants;
      f.m.each(ld, [=](long i) {
        M::store(mu + i, M::load(given + i));
        M::store(rr + i, M::rsqrt(M::load(given + ld + i) + eps));
      });
      return;
    }
    f.m.template reduce<1>(rows, ld, mu, false,
                           [=](int) { return [=](long i, auto* sum) { sum[0] += M::load(x + i); }; });
    f.m.each(ld, [=](long i) { M::store(mu + i, M::load(mu + i) * one_over_m); });
    f.m.template reduce<1>(rows, ld, rr, false, [=](int ch) {
      return [=, centre = M::load(mu + ch)](long i, auto* sum) {
        const auto d = M::load(x + i) - centre;
        sum[0] += d * d;
      };
    });
    f.m.each(ld, [=](long i) { M::store(rr + i, M::rsqrt(M::load(rr + i) * one_over_m + eps)); });
  }

  template <class M>
  static void forward(const Frame<M>& f) {
    statistics(f);
    const auto* x = f.x[0];
    auto* y = f.y;
    f.m.channels(f.pixels(f.op.x), f.op.x.ld, [=](int ch) {
      const auto scale = at(f, r, ch) * coefficient(f, f.op.weight, f.theta, ch, 1);
      const auto centre = at(f, mean, ch), shift = coefficient(f, f.op.bias, f.theta, ch, 0);
      return [=](long i) { M::store(y + i, (M::load(x + i) - centre) * scale + shift); };
    });
  }

  template <class M>
  static void backward(const Frame<M>& f) {
    using T = typename M::Real;
    const int rows = f.pixels(f.op.x), ld = f.op.x.ld;
    const T *x = f.x[0], *g = f.g_y;
    T *g_x = f.g_x[0], *sums = at(f, sum_g);
    f.m.template reduce<2>(rows, ld, sums, false, [=](int ch) {
      const Channel<M> at_ch(f, ch);
      return [=](long i, auto* sum) {
        const auto gy = M::load(g + i);
        sum[0] += gy;
        sum[1] += gy * at_ch.standard(x + i);
      };
    });
    add_adjoints(f, at(f, sum_gxh), sums);
    if (!g_x) return;
    const bool add = f.op.add[0];
    f.m.channels(rows, ld, [=](int ch) {
      const Channel<M> at_ch(f, ch);
      const auto scale = at_ch.r * coefficient(f, f.op.weight, f.theta, ch, 1);
      return [=](long i) { M::put(g_x + i, scale * at_ch.project(M::load(g + i), at_ch.standard(x + i)), add); };
    });
  }

  // mean xd and c = mean(xh xd), which turn xd into xhd.
  template <class M>
  static void tangent_statistics(const Frame<M>& f) {
    using T = typename M::Real;
    const T *x = f.x[0], *xd = f.xd[0];
    T *means = at(f, mean_xd), inv = share(f);
    f.m.template reduce<2>(f.pixels(f.op.x), f.op.x.ld, means, false, [=](int ch) {
      const Channel<M> at_ch(f, ch);
      return [=](long i, auto* sum) {
        const auto d = M::load(xd + i);
        sum[0] += d;
        sum[1] += d * at_ch.standard(x + i);
      };
    });
    f.m.each(2 * f.op.x.ld, [=](long i) { M::store(means + i, M::load(means + i) * inv); });
  }

  template <class M>
  static void tangent_forward(const Frame<M>& f) {
    using T = typename M::Real;
    const T *x = f.x[0], *xd = f.xd[0];
    T* yd = f.yd;
    if (xd) tangent_statistics(f);
    f.m.channels(f.pixels(f.op.x), f.op.x.ld, [=](int ch) {
      const Channel<M> at_ch(f, ch);
      const auto gamma = coefficient(f, f.op.weight, f.theta, ch, 1);
      const auto gammad = direction(f, f.op.weight, ch), betad = direction(f, f.op.bias, ch);
      return [=](long i) {
        const auto xh = at_ch.standard(x + i);
        auto value = gammad * xh + betad;
        if (xd) value += gamma * at_ch.tangent(M::load(xd + i), xh);
        M::store(yd + i, value);
      };
    });
  }

  template <class M>
  static void tangent_backward(const Frame<M>& f) {
    using T = typename M::Real;
    const int rows = f.pixels(f.op.x), ld = f.op.x.ld;
    const T *x = f.x[0], *xd = f.xd[0], *g = f.g_y, *gd = f.gd_y;
    T *sums = at(f, sum_gd), *gd_x = f.gd_x[0];
    f.m.template reduce<2>(rows, ld, sums, false, [=](int ch) {
      const Channel<M> at_ch(f, ch);
      return [=](long i, auto* sum) {
        const auto xh = at_ch.standard(x + i), gdy = M::load(gd + i);
        sum[0] += gdy;
        sum[1] += gdy * xh;
        if (xd) sum[1] += M::load(g + i) * at_ch.tangent(M::load(xd + i), xh);
      };
    });
    add_adjoints(f, at(f, sum_gdxh), sums);
    if (!gd_x) return;
    const bool add = f.op.add[0];
    f.m.channels(rows, ld, [=](int ch) {
      const Channel<M> at_ch(f, ch);
      const Bend<M> bend(f, ch);
      return [=](long i) {
        const auto xh = at_ch.standard(x + i);
        auto inner = bend.start(M::load(gd + i), xh);
        if (g) inner += bend.turn(at_ch.project(M::load(g + i), xh));
        if (xd) inner -= bend.b * at_ch.tangent(M::load(xd + i), xh);
        M::put(gd_x + i, at_ch.r * inner, add);
      };
    });
  }

  // The coefficients of one pack of channels.
  template <class M>
  struct Channel {
    typename M::Pack mean, r, mean_g, mean_gxh, mean_xd, c;
    Channel(const Frame<M>& f, int ch)
        : mean(at(f, Saved::mean, ch)),
          r(at(f, Saved::r, ch)),
          mean_g(at(f, sum_g, ch) * share(f)),
          mean_gxh(at(f, sum_gxh, ch) * share(f)),
          mean_xd(at(f, Saved::mean_xd, ch)),
          c(at(f, Saved::c, ch)) {}
    auto standard(const typename M::Real* x) const { return (M::load(x) - mean) * r; }
    auto project(typename M::Pack g, typename M::Pack xh) const { return g - mean_g - xh * mean_gxh; }
    auto tangent(typename M::Pack xd, typename M::Pack xh) const { return r * (xd - mean_xd - xh * c); }
  };

  // What tangent_backward adds up, without the factor r: `start` is the part of P(gamma gd), `turn` that of
  // P(gammad g) - c g_x, and b = mean(gh xh).
  template <class M>
  struct Bend {
    typename M::Pack gamma, mean_gd, mean_gdxh, b, turning;
    Bend(const Frame<M>& f, int ch)
        : gamma(coefficient(f, f.op.weight, f.theta, ch, 1)),
          mean_gd(at(f, sum_gd, ch) * share(f)),
          mean_gdxh(at(f, sum_gdxh, ch) * share(f)),
          b(gamma * at(f, sum_gxh, ch) * share(f)),
          turning(direction(f, f.op.weight, ch)) {
      if (f.xd[0]) turning -= gamma * at(f, r, ch) * at(f, c, ch);
    }
    auto start(typename M::Pack gd, typename M::Pack xh) const { return gamma * (gd - mean_gd - xh * mean_gdxh); }
    auto turn(typename M::Pack projected) const { return turning * projected; }
  };

  template <class M>
  static typename M::Real* at(const Frame<M>& f, Saved which) {
    return f.saved + static_cast<long>(which) * f.op.x.ld;
  }

  template <class M>
  static typename M::Pack at(const Frame<M>& f, Saved which, int ch) {
    return M::load(at(f, which) + ch);
  }

  // 1 / m, or zero where the statistics do not depend on x.
  template <class M>
  static typename M::Real share(const Frame<M>& f) {
    using T = typename M::Real;
    return f.op.given ? T(0) : T(1) / f.pixels(f.op.x);
  }

  // The parameter of a pack of channels, or what stands in for one that the layer does not have.
  template <class M>
  static typename M::Pack coefficient(const Frame<M>& f, const Slot& slot, const typename M::Real* params, int ch,
                                      int otherwise) {
    return slot.at < 0 ? M::broadcast(otherwise) : M::load(params + f.row(slot) + ch);
  }

  template <class M>
  static typename M::Pack direction(const Frame<M>& f, const Slot& slot, int ch) {
    return f.moves(slot) ? M::load(f.u + f.row(slot) + ch) : M::broadcast(0);
  }

  template <class M>
  static void add_adjoints(const Frame<M>& f, const typename M::Real* gamma, const typename M::Real* beta) {
    add_adjoint(f, f.op.weight, gamma);
    add_adjoint(f, f.op.bias, beta);
  }

 private:
  template <class M>
  static void add_adjoint(const Frame<M>& f, const Slot& slot, const typename M::Real* sums) {
    if (!f.wants(slot)) return;
    auto* out = f.grad + f.row(slot);
    f.m.each(f.op.x.ld, [=](long i) { M::put(out + i, M::load(sums + i), true); });
  }
};

}  // namespace METAFAST_NAMESPACE
