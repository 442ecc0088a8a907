// y = f(x): g_x = f' g, yd = f' xd, gd_x = f' gd + f'' xd g. An activation gives its value, and its two derivatives
// from either x or y (`reads_output`): the other one's place may hold something else by then.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

template <class Activation>
struct Pointwise {
  template <class Node>
  static void make(Node& node, Op& op) {
    Activation::make(node, op);
  }

  static int64_t saved_elements(const Op&, const PlannedPass&) { return 0; }

  template <class M>
  METAFAST_DEVICE static void forward(const RuleContext<M>& ctx) {
    const auto* x = ctx.x[0];
    auto* y = ctx.y;
    const Activation a(ctx.op);
    ctx.m.each(size(ctx), [=](long i) { M::store(y + i, a.template value<M>(M::load(x + i))); });
    if (!Activation::keeps_zero) ctx.m.clear_padding(ctx.op.y, ctx.n, y);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const RuleContext<M>& ctx) {
    if (ctx.g_x[0]) multiply_by_derivative(ctx, ctx.g_y, ctx.g_x[0], ctx.op.add[0]);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const RuleContext<M>& ctx) {
    multiply_by_derivative(ctx, ctx.xd[0], ctx.yd, false);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const RuleContext<M>& ctx) {
    if (!ctx.gd_x[0]) return;
    multiply_by_derivative(ctx, ctx.gd_y, ctx.gd_x[0], ctx.op.add[0]);
    if (!Activation::has_second_derivative || !ctx.xd[0]) return;
    const auto *v = derivative_reads(ctx), *xd = ctx.xd[0], *g = ctx.g_y;
    auto* gd_x = ctx.gd_x[0];
    const Activation a(ctx.op);
    ctx.m.each(size(ctx), [=](long i) {
      const auto product = a.template second_derivative<M>(M::load(v + i)) * M::load(xd + i) * M::load(g + i);
      M::put(gd_x + i, product, true);
    });
  }

 private:
  template <class M>
  METAFAST_DEVICE static long size(const RuleContext<M>& ctx) {
    return static_cast<long>(ctx.pixels(ctx.op.x)) * ctx.op.x.ld;
  }

  template <class M>
  METAFAST_DEVICE static const typename M::Real* derivative_reads(const RuleContext<M>& ctx) {
    return Activation::reads_output ? ctx.y : ctx.x[0];
  }

  template <class M>
  METAFAST_DEVICE static void multiply_by_derivative(const RuleContext<M>& ctx, const typename M::Real* in,
                                                     typename M::Real* out, bool add) {
    const auto* v = derivative_reads(ctx);
    const Activation a(ctx.op);
    ctx.m.each(size(ctx),
               [=](long i) { M::put(out + i, a.template times_derivative<M>(M::load(in + i), M::load(v + i)), add); });
  }
};

}  // namespace METAFAST_NAMESPACE
