// The formulas of batch_norm.h with means over the features of each sample, and parameters a feature.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

struct LayerNorm {
  // Options: eps, axes that it normalises over.
  template <class Node>
  static void make(Node& node, Op& op) {
    op.eps = node.real();
    if (node.integer() != (node.is_vector() ? 1 : 3)) node.refuse("layer norm over a part of a sample");
    op.weight = node.by_feature(0);
    op.bias = node.by_feature(1);
  }

  static int64_t saved_elements(const Op&, const PlannedPass& pass) { return int64_t{saved} * pass.n; }

  enum Saved { mean, r, mean_gh, mean_ghxh, mean_xd, c, mean_ghd, mean_ghdxh, saved };

  template <class M>
  METAFAST_DEVICE static void forward(const RuleContext<M>& ctx) {
    using T = typename M::Real;
    ctx.m.samples(ctx.n, [&](const auto& machine, int s) {
      const T* x = ctx.x[0] + s * width(ctx);
      T sum = machine.total(width(ctx), [=](long i) { return M::load(x + i); });
      const T mu = sum / features(ctx);
      sum = machine.total(width(ctx), [&](long i) {
        const auto d = real(ctx, M::load(x + i) - mu, i);
        return d * d;
      });
      machine.set(place(ctx, s, mean), mu);
      machine.set(place(ctx, s, r), M::rsqrt(sum / features(ctx) + T(ctx.op.eps)));
      T* y = ctx.y + s * width(ctx);
      machine.each(width(ctx), [&](long i) {
        const auto value = value_of(ctx, ctx.op.weight, ctx.theta, i, 1) * standard(ctx, s, i);
        M::store(y + i, real(ctx, value + value_of(ctx, ctx.op.bias, ctx.theta, i, 0), i));
      });
    });
  }

  template <class M>
  METAFAST_DEVICE static void backward(const RuleContext<M>& ctx) {
    add_adjoints(ctx, ctx.g_y,
                 [&](int s, long i) { return M::load(ctx.g_y + s * width(ctx) + i) * standard(ctx, s, i); });
    ctx.m.samples(ctx.n, [&](const auto& machine, int s) {
      const auto* g = ctx.g_y + s * width(ctx);
      const auto gh = [&](long i) { return value_of(ctx, ctx.op.weight, ctx.theta, i, 1) * M::load(g + i); };
      machine.set(place(ctx, s, mean_gh), machine.total(width(ctx), gh) / features(ctx));
      machine.set(place(ctx, s, mean_ghxh),
                  machine.total(width(ctx), [&](long i) { return gh(i) * standard(ctx, s, i); }) / features(ctx));
      if (!ctx.g_x[0]) return;
      auto* g_x = ctx.g_x[0] + s * width(ctx);
      machine.each(width(ctx), [&](long i) {
        M::put(g_x + i, at(ctx, s, r) * real(ctx, project(ctx, s, i, gh(i)), i), ctx.op.add[0]);
      });
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const RuleContext<M>& ctx) {
    ctx.m.samples(ctx.n, [&](const auto& machine, int s) {
      if (ctx.xd[0]) {
        const auto* xd = ctx.xd[0] + s * width(ctx);
        machine.set(place(ctx, s, mean_xd),
                    machine.total(width(ctx), [=](long i) { return M::load(xd + i); }) / features(ctx));
        machine.set(place(ctx, s, c), machine.total(width(ctx), [&](long i) {
          return M::load(xd + i) * standard(ctx, s, i);
        }) / features(ctx));
      }
      auto* yd = ctx.yd + s * width(ctx);
      machine.each(width(ctx), [&](long i) {
        auto value = direction(ctx, ctx.op.weight, i) * standard(ctx, s, i) + direction(ctx, ctx.op.bias, i);
        if (ctx.xd[0]) value += value_of(ctx, ctx.op.weight, ctx.theta, i, 1) * tangent(ctx, s, i);
        M::store(yd + i, real(ctx, value, i));
      });
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const RuleContext<M>& ctx) {
    add_adjoints(ctx, ctx.gd_y, [&](int s, long i) {
      const long at = s * width(ctx) + i;
      const auto product = M::load(ctx.gd_y + at) * standard(ctx, s, i);
      return ctx.xd[0] ? product + M::load(ctx.g_y + at) * tangent(ctx, s, i) : product;
    });
    if (!ctx.gd_x[0]) return;
    ctx.m.samples(ctx.n, [&](const auto& machine, int s) {
      const auto* gd = ctx.gd_y + s * width(ctx);
      const auto* g = ctx.g_y ? ctx.g_y + s * width(ctx) : nullptr;
      const auto gh = [&](long i) { return value_of(ctx, ctx.op.weight, ctx.theta, i, 1) * M::load(g + i); };
      const auto ghd = [&](long i) {
        const auto value = value_of(ctx, ctx.op.weight, ctx.theta, i, 1) * M::load(gd + i);
        return g ? value + direction(ctx, ctx.op.weight, i) * M::load(g + i) : value;
      };
      machine.set(place(ctx, s, mean_ghd), machine.total(width(ctx), ghd) / features(ctx));
      machine.set(place(ctx, s, mean_ghdxh), machine.total(width(ctx), [&](long i) {
        const auto product = ghd(i) * standard(ctx, s, i);
        return ctx.xd[0] ? product + gh(i) * tangent(ctx, s, i) : product;
      }) / features(ctx));
      auto* gd_x = ctx.gd_x[0] + s * width(ctx);
      machine.each(width(ctx), [&](long i) {
        auto inner = ghd(i) - at(ctx, s, mean_ghd) - standard(ctx, s, i) * at(ctx, s, mean_ghdxh);
        if (ctx.xd[0]) {
          inner -= tangent(ctx, s, i) * at(ctx, s, mean_ghxh);
          inner -= (at(ctx, s, c) * at(ctx, s, r)) * project(ctx, s, i, gh(i));
        }
        M::put(gd_x + i, at(ctx, s, r) * real(ctx, inner, i), ctx.op.add[0]);
      });
    });
  }

 private:
  template <class M>
  METAFAST_DEVICE static long width(const RuleContext<M>& ctx) {
    return static_cast<long>(ctx.op.x.h) * ctx.op.x.w * ctx.op.x.ld;
  }

  template <class M>
  METAFAST_DEVICE static typename M::Real features(const RuleContext<M>& ctx) {
    return static_cast<typename M::Real>(ctx.op.x.h * ctx.op.x.w * ctx.op.x.c);
  }

  template <class M>
  METAFAST_DEVICE static typename M::Real* place(const RuleContext<M>& ctx, int sample, Saved which) {
    return ctx.saved + static_cast<long>(sample) * saved + which;
  }

  template <class M>
  METAFAST_DEVICE static typename M::Real at(const RuleContext<M>& ctx, int sample, Saved which) {
    return M::load_one(place(ctx, sample, which));
  }

  // A pack with its padding channels set to zero.
  template <class M>
  METAFAST_DEVICE static auto real([[maybe_unused]] const RuleContext<M>& ctx, typename M::Pack pack, long i) {
    return M::first(pack, ctx.op.x.c - static_cast<int>(i % ctx.op.x.ld));
  }

  template <class M>
  METAFAST_DEVICE static auto standard(const RuleContext<M>& ctx, int s, long i) {
    return (M::load(ctx.x[0] + s * width(ctx) + i) - at(ctx, s, mean)) * at(ctx, s, r);
  }

  template <class M>
  METAFAST_DEVICE static auto project(const RuleContext<M>& ctx, int s, long i, typename M::Pack gh) {
    return gh - at(ctx, s, mean_gh) - standard(ctx, s, i) * at(ctx, s, mean_ghxh);
  }

  template <class M>
  METAFAST_DEVICE static auto tangent(const RuleContext<M>& ctx, int s, long i) {
    const auto xd = M::load(ctx.xd[0] + s * width(ctx) + i);
    return at(ctx, s, r) * (xd - at(ctx, s, mean_xd) - standard(ctx, s, i) * at(ctx, s, c));
  }

  template <class M>
  METAFAST_DEVICE static auto value_of(const RuleContext<M>&, const Slot& slot, const typename M::Real* params, long i,
                                       int otherwise) {
    return slot.at < 0 ? M::broadcast(otherwise) : M::load(params + slot.at + i);
  }

  template <class M>
  METAFAST_DEVICE static auto direction(const RuleContext<M>& ctx, const Slot& slot, long i) {
    return ctx.moves(slot) ? M::load(ctx.u + slot.at + i) : M::broadcast(0);
  }

  // Adds g to the adjoint of beta and product(sample, feature) to that of gamma, sample after sample.
  template <class M, class G>
  METAFAST_DEVICE static void add_adjoints(const RuleContext<M>& ctx, const typename M::Real* g, const G& product) {
    if (ctx.wants(ctx.op.weight)) {
      auto* out = ctx.grad + ctx.op.weight.at;
      ctx.m.each(width(ctx), [&](long i) {
        for (int s = 0; s < ctx.n; ++s) M::put(out + i, real(ctx, product(s, i), i), true);
      });
    }
    if (ctx.wants(ctx.op.bias)) {
      auto* out = ctx.grad + ctx.op.bias.at;
      ctx.m.each(width(ctx), [&](long i) {
        for (int s = 0; s < ctx.n; ++s) M::put(out + i, M::load(g + s * width(ctx) + i), true);
      });
    }
  }
};

}  // namespace METAFAST_NAMESPACE
