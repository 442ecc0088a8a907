// y = W * x + b. Bilinear: each rule is one contraction, of one term in the plain passes and of two in the tangent
// ones. A linear layer is the convolution whose window is its whole input.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct Conv2d {
  template <class M>
  METAFAST_DEVICE static void forward(const Frame<M>& f) {
    const typename M::Term term{f.x[0], f.theta + f.op.weight.at};
    f.m.correlate(f.op, f.n, &term, 1, bias(f, f.theta), f.y);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const Frame<M>& f) {
    f.m.together([&] {
      if (f.g_x[0]) {
        const typename M::Term term{f.g_y, f.theta + f.op.weight.at, f.saved};
        f.m.correlate_transposed(f.op, f.n, &term, 1, f.g_x[0], f.op.add[0]);
      }
      if (f.wants(f.op.weight)) {
        const typename M::Pair pair{f.x[0], f.g_y};
        f.m.outer(f.op, f.n, &pair, 1, f.grad + f.op.weight.at);
      }
      bias_adjoint(f, f.g_y);
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const Frame<M>& f) {
    const bool bends = f.xd[0], moves = f.moves(f.op.weight);
    typename M::Term terms[2] = {{f.xd[0], f.theta + f.op.weight.at}, {f.x[0], f.u + f.op.weight.at}};
    if (!bends) terms[0] = terms[1];
    const int count = bends + moves;
    f.m.correlate(f.op, f.n, terms, count, f.moves(f.op.bias) ? bias(f, f.u) : nullptr, f.yd);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const Frame<M>& f) {
    f.m.together([&] {
      if (f.gd_x[0]) {
        const bool kept = f.saved && f.g_x[0];  // by backward
        const typename M::Term terms[2] = {{f.gd_y, f.theta + f.op.weight.at, f.saved, kept},
                                           {f.g_y, f.u + f.op.weight.at}};
        const int count = f.g_y && f.moves(f.op.weight) ? 2 : 1;
        f.m.correlate_transposed(f.op, f.n, terms, count, f.gd_x[0], f.op.add[0]);
      }
      if (f.wants(f.op.weight)) {
        const typename M::Pair pairs[2] = {{f.x[0], f.gd_y}, {f.xd[0], f.g_y}};
        f.m.outer(f.op, f.n, pairs, f.xd[0] ? 2 : 1, f.grad + f.op.weight.at);
      }
      bias_adjoint(f, f.gd_y);
    });
  }

 private:
  template <class M>
  METAFAST_DEVICE static const typename M::Real* bias(const Frame<M>& f, const typename M::Real* params) {
    return f.op.bias.at < 0 ? nullptr : params + f.op.bias.at;
  }

  template <class M>
  METAFAST_DEVICE static void bias_adjoint(const Frame<M>& f, const typename M::Real* g) {
    if (!f.wants(f.op.bias)) return;
    f.m.template reduce<1>(f.pixels(f.op.y), f.op.y.ld, f.grad + f.op.bias.at, true,
                           [=](int) { return [=](long i, auto* sum) { sum[0] += M::load(g + i); }; });
  }
};

}  // namespace METAFAST_NAMESPACE
