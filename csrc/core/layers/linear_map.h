// y = A x, where no parameter and no value changes A: gather computes A x, and scatter, on top of what is there or not,
// A' g.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

// The rules of Map, which has gather(ctx, x, y) and scatter(ctx, g, g_x).
template <class Map>
struct LinearMap {
  static int64_t saved_elements(const Op&, const PlannedPass&) { return 0; }

  template <class M>
  static void forward(const RuleContext<M>& ctx) {
    Map::gather(ctx, ctx.x[0], ctx.y);
  }

  template <class M>
  static void backward(const RuleContext<M>& ctx) {
    if (ctx.g_x[0]) Map::scatter(ctx, ctx.g_y, ctx.g_x[0]);
  }

  template <class M>
  static void tangent_forward(const RuleContext<M>& ctx) {
    Map::gather(ctx, ctx.xd[0], ctx.yd);
  }

  template <class M>
  static void tangent_backward(const RuleContext<M>& ctx) {
    if (ctx.gd_x[0]) Map::scatter(ctx, ctx.gd_y, ctx.gd_x[0]);
  }
};

}  // namespace METAFAST_NAMESPACE
