// L = mean (y - target)^2 over samples and elements: g = 2 (y - target) / M, gd = 2 yd / M.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

struct MSE {
  template <class M>
  METAFAST_DEVICE static typename M::Loss forward(const LossContext<M>& ctx) {
    const auto *y = ctx.y, *t = ctx.targets;
    return ctx.m.total(ctx.size(), ctx.grid.ld, [=](long i) {
      const auto e = M::load(y + i) - M::load(t + i);
      return e * e;
    }) / elements(ctx);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const LossContext<M>& ctx) {
    const auto *y = ctx.y, *t = ctx.targets;
    auto* g = ctx.g;
    const auto scale = 2 / elements(ctx);
    ctx.m.each(ctx.size(), [=](long i) { M::store(g + i, (M::load(y + i) - M::load(t + i)) * scale); });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const LossContext<M>& ctx) {
    const auto* yd = ctx.yd;
    auto* gd = ctx.gd;
    const auto scale = 2 / elements(ctx);
    ctx.m.each(ctx.size(), [=](long i) { M::store(gd + i, M::load(yd + i) * scale); });
  }

 private:
  template <class M>
  METAFAST_DEVICE static typename M::Real elements(const LossContext<M>& ctx) {
    return static_cast<typename M::Real>(static_cast<long>(ctx.n) * ctx.grid.h * ctx.grid.w * ctx.grid.c);
  }
};

}  // namespace METAFAST_NAMESPACE
