// y = W * x + b. Bilinear: each rule is one contraction, of one term in forward and backward and of two in the
// tangent rules. A linear layer is the convolution whose window is its whole input.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

struct Conv2d {
  template <class M>
  METAFAST_DEVICE static void forward(const RuleContext<M>& ctx) {
    const typename M::Term term{ctx.x[0], ctx.theta + ctx.op.weight.at};
    ctx.m.correlate(ctx.op, ctx.n, &term, 1, bias(ctx, ctx.theta), ctx.y);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const RuleContext<M>& ctx) {
    ctx.m.together([&] {
      if (ctx.g_x[0]) {
        const typename M::Term term{ctx.g_y, ctx.theta + ctx.op.weight.at, ctx.saved};
        ctx.m.correlate_transposed(ctx.op, ctx.n, &term, 1, ctx.g_x[0], ctx.op.add[0]);
      }
      if (ctx.wants(ctx.op.weight)) {
        const typename M::Pair pair{ctx.x[0], ctx.g_y};
        ctx.m.outer(ctx.op, ctx.n, &pair, 1, ctx.grad + ctx.op.weight.at);
      }
      bias_adjoint(ctx, ctx.g_y);
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const RuleContext<M>& ctx) {
    const bool input_moves = ctx.xd[0], weight_moves = ctx.moves(ctx.op.weight);
    typename M::Term terms[2] = {{ctx.xd[0], ctx.theta + ctx.op.weight.at}, {ctx.x[0], ctx.u + ctx.op.weight.at}};
    if (!input_moves) terms[0] = terms[1];
    const int count = input_moves + weight_moves;
    ctx.m.correlate(ctx.op, ctx.n, terms, count, ctx.moves(ctx.op.bias) ? bias(ctx, ctx.u) : nullptr, ctx.yd);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const RuleContext<M>& ctx) {
    ctx.m.together([&] {
      if (ctx.gd_x[0]) {
        const bool kept = ctx.saved && ctx.g_x[0];  // by backward
        const typename M::Term terms[2] = {{ctx.gd_y, ctx.theta + ctx.op.weight.at, ctx.saved, kept},
                                           {ctx.g_y, ctx.u + ctx.op.weight.at}};
        const int count = ctx.g_y && ctx.moves(ctx.op.weight) ? 2 : 1;
        ctx.m.correlate_transposed(ctx.op, ctx.n, terms, count, ctx.gd_x[0], ctx.op.add[0]);
      }
      if (ctx.wants(ctx.op.weight)) {
        const typename M::Pair pairs[2] = {{ctx.x[0], ctx.gd_y}, {ctx.xd[0], ctx.g_y}};
        ctx.m.outer(ctx.op, ctx.n, pairs, ctx.xd[0] ? 2 : 1, ctx.grad + ctx.op.weight.at);
      }
      bias_adjoint(ctx, ctx.gd_y);
    });
  }

 private:
  template <class M>
  METAFAST_DEVICE static const typename M::Real* bias(const RuleContext<M>& ctx, const typename M::Real* params) {
    return ctx.op.bias.at < 0 ? nullptr : params + ctx.op.bias.at;
  }

  template <class M>
  METAFAST_DEVICE static void bias_adjoint(const RuleContext<M>& ctx, const typename M::Real* g) {
    if (!ctx.wants(ctx.op.bias)) return;
    ctx.m.template reduce<1>(ctx.pixels(ctx.op.y), ctx.op.y.ld, ctx.grad + ctx.op.bias.at, true,
                             [=](int) { return [=](long i, auto* sum) { sum[0] += M::load(g + i); }; });
  }
};

}  // namespace METAFAST_NAMESPACE
