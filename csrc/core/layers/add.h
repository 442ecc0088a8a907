// y = a + b.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct Add {
  template <class M>
  METAFAST_DEVICE static void forward(const Frame<M>& f) {
    sum(f, f.x[0], f.x[1], f.y);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const Frame<M>& f) {
    for (int k = 0; k < 2; ++k) pass_on(f, f.g_y, f.g_x[k], f.op.add[k]);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const Frame<M>& f) {
    sum(f, f.xd[0], f.xd[1], f.yd);
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const Frame<M>& f) {
    for (int k = 0; k < 2; ++k) pass_on(f, f.gd_y, f.gd_x[k], f.op.add[k]);
  }

 private:
  template <class M>
  METAFAST_DEVICE static long size(const Frame<M>& f) {
    return static_cast<long>(f.pixels(f.op.y)) * f.op.y.ld;
  }

  template <class M, class T>
  METAFAST_DEVICE static void sum(const Frame<M>& f, const T* a, const T* b, T* y) {
    if (!a) a = b, b = nullptr;
    f.m.each(size(f), [=](long i) { M::store(y + i, b ? M::load(a + i) + M::load(b + i) : M::load(a + i)); });
  }

  template <class M, class T>
  METAFAST_DEVICE static void pass_on(const Frame<M>& f, const T* g, T* g_x, bool add) {
    if (g_x) f.m.each(size(f), [=](long i) { M::put(g_x + i, M::load(g + i), add); });
  }
};

}  // namespace METAFAST_NAMESPACE
