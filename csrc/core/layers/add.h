// y = a + b.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

struct Add {
  template <class Node>
  static void make(Node& node, Op& op) {
    const Grid &a = op.x, &b = node.other();
    if (a.h != b.h || a.w != b.w || a.c != b.c || a.ld != b.ld || node.is_vector() != node.other_is_vector())
      node.refuse("a sum of values of different shapes");
  }

  static int64_t saved_elements(const Op&, const PlannedPass&) { return 0; }

  template <class M>
  METAFAST_DEVICE static void forward(const RuleContext<M>& ctx) {
    sum(ctx, ctx.x[0], ctx.x[1], ctx.y);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const RuleContext<M>& ctx) {
    for (int k = 0; k < 2; ++k) pass_on(ctx, ctx.g_y, ctx.g_x[k], ctx.op.add[k]);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const RuleContext<M>& ctx) {
    sum(ctx, ctx.xd[0], ctx.xd[1], ctx.yd);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const RuleContext<M>& ctx) {
    for (int k = 0; k < 2; ++k) pass_on(ctx, ctx.gd_y, ctx.gd_x[k], ctx.op.add[k]);
  }

 private:
  template <class M>
  METAFAST_DEVICE static long size(const RuleContext<M>& ctx) {
    return static_cast<long>(ctx.pixels(ctx.op.y)) * ctx.op.y.ld;
  }

  template <class M, class T>
  METAFAST_DEVICE static void sum(const RuleContext<M>& ctx, const T* a, const T* b, T* y) {
    if (!a) {
      a = b;
      b = nullptr;
    }
    ctx.m.each(size(ctx), [=](long i) { M::store(y + i, b ? M::load(a + i) + M::load(b + i) : M::load(a + i)); });
  }

  template <class M, class T>
  METAFAST_DEVICE static void pass_on(const RuleContext<M>& ctx, const T* g, T* g_x, bool add) {
    if (g_x) ctx.m.each(size(ctx), [=](long i) { M::put(g_x + i, M::load(g + i), add); });
  }
};

}  // namespace METAFAST_NAMESPACE
