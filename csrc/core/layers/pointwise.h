// y = f(x): g_x = f' g, yd = f' xd, gd_x = f' gd + f'' xd g. An activation gives value, slope and curve of x and y.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

template <class Activation>
struct Pointwise {
  template <class M>
  METAFAST_DEVICE static void forward(const Frame<M>& f) {
    const auto* x = f.x[0];
    auto* y = f.y;
    const Activation a{f.op.slope};
    f.m.each(size(f), [=](long i) { M::store(y + i, a.template value<M>(M::load(x + i))); });
    if (!Activation::keeps_zero) f.m.clear_padding(f.op.y, f.n, y);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const Frame<M>& f) {
    if (f.g_x[0]) multiply_by_slope(f, f.g_y, f.g_x[0], f.op.add[0]);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const Frame<M>& f) {
    multiply_by_slope(f, f.xd[0], f.yd, false);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const Frame<M>& f) {
    if (!f.gd_x[0]) return;
    multiply_by_slope(f, f.gd_y, f.gd_x[0], f.op.add[0]);
    if (!Activation::curved || !f.xd[0]) return;
    const auto *x = f.x[0], *y = f.y, *xd = f.xd[0], *g = f.g_y;
    auto* gd_x = f.gd_x[0];
    const Activation a{f.op.slope};
    f.m.each(size(f), [=](long i) {
      const auto bent = a.template curve<M>(M::load(x + i), M::load(y + i)) * M::load(xd + i) * M::load(g + i);
      M::put(gd_x + i, bent, true);
    });
  }

 private:
  template <class M>
  METAFAST_DEVICE static long size(const Frame<M>& f) {
    return static_cast<long>(f.pixels(f.op.x)) * f.op.x.ld;
  }

  template <class M>
  METAFAST_DEVICE static void multiply_by_slope(const Frame<M>& f, const typename M::Real* in, typename M::Real* out,
                                                bool add) {
    const auto *x = f.x[0], *y = f.y;
    const Activation a{f.op.slope};
    f.m.each(size(f), [=](long i) {
      M::put(out + i, a.template times_slope<M>(M::load(in + i), M::load(x + i), M::load(y + i)), add);
    });
  }
};

}  // namespace METAFAST_NAMESPACE
