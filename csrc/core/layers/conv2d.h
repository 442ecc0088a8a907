// y = W * x + b. Bilinear: each rule is one contraction, of one term in forward and backward and of two in the
// tangent rules. A linear layer is the convolution whose window is its whole input.
#pragma once
#include <utility>

#include "context.h"

namespace METAFAST_NAMESPACE {

struct Conv2d {
  // Of a node with these options, y and x.
  template <class Options>
  static std::pair<int, int> padding(const Options& options) {
    return {static_cast<int>(options[6]), static_cast<int>(options[7])};
  }

  // Options: outputs, inputs, kernel, stride, padding, dilation (y and x of each).
  template <class Node>
  static void make(Node& node, Op& op) {
    if (node.is_vector() && op.x.h * op.x.w > 1) node.refuse("a convolution of flattened images");
    const int outputs = node.integer();
    if (node.integer() != op.x.c) node.refuse("convolution in groups");
    Window& w = op.window;
    node.read(w.kh, w.kw, w.sy, w.sx, w.py, w.px, w.dy, w.dx);
    if (node.has_border()) w.py = w.px = 0;
    const int down = op.x.h + 2 * w.py - w.dy * (w.kh - 1) - 1, across = op.x.w + 2 * w.px - w.dx * (w.kw - 1) - 1;
    if (down < 0 || across < 0) node.refuse("a convolution whose window is larger than its padded input");
    op.weight = node.weight(op.x, outputs, w.kh, w.kw);
    op.y = node.product(down / w.sy + 1, across / w.sx + 1, outputs);
    op.bias = node.by_output(op.y);
    node.makes_vector(false);
  }

  // The transposed weights of a layer of vectors, whose tangents use them again: there they cost as much as a few
  // samples do, so where these are many it is memory that is spared. Machines without tables need none.
  static int64_t saved_elements(const Op& op, const PlannedPass& pass) {
    constexpr int many = 32;
    const bool vectors = op.x.h * op.x.w * op.window.kh * op.window.kw == 1 && op.backward && pass.n < many;
    return vectors && pass.kind == PassKind::gradient_and_tangent ? static_cast<int64_t>(op.y.ld) * op.x.ld : 0;
  }

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

// The convolution whose window is its whole input.
struct Linear {
  // Options: outputs, inputs.
  template <class Node>
  static void make(Node& node, Op& op) {
    if (!node.is_vector()) node.refuse("a linear layer on values that are not [n, features]");
    const Grid x = op.x;
    const int outputs = node.integer();
    if (node.integer() != x.c * x.h * x.w) node.refuse("a linear layer of another number of features");
    op.window = {1, 1, 1, 1, 0, 0, 1, 1};
    op.weight = node.weight(x, outputs, x.h, x.w);
    if (x.ld >= x.c) op.x = node.as_vector(x);
    op.y = node.product(1, 1, outputs);
    op.bias = node.by_output(op.y);
    node.makes_vector(true);
  }
};

}  // namespace METAFAST_NAMESPACE
