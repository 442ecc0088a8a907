// L = mean (y - target)^2 over samples and elements: g = 2 (y - target) / M, gd = 2 yd / M.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct MSE {
  template <class M>
  METAFAST_DEVICE static typename M::Loss forward(const LossFrame<M>& f) {
    const auto *y = f.y, *t = f.targets;
    return f.m.total(f.size(), f.grid.ld, [=](long i) {
      const auto e = M::load(y + i) - M::load(t + i);
      return e * e;
    }) / elements(f);
  }

  template <class M>
  METAFAST_DEVICE static void backward(const LossFrame<M>& f) {
    const auto *y = f.y, *t = f.targets;
    auto* g = f.g;
    const auto scale = 2 / elements(f);
    f.m.each(f.size(), [=](long i) { M::store(g + i, (M::load(y + i) - M::load(t + i)) * scale); });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const LossFrame<M>& f) {
    const auto* yd = f.yd;
    auto* gd = f.gd;
    const auto scale = 2 / elements(f);
    f.m.each(f.size(), [=](long i) { M::store(gd + i, M::load(yd + i) * scale); });
  }

 private:
  template <class M>
  METAFAST_DEVICE static typename M::Real elements(const LossFrame<M>& f) {
    return static_cast<typename M::Real>(static_cast<long>(f.n) * f.grid.h * f.grid.w * f.grid.c);
  }
};

}  // namespace METAFAST_NAMESPACE
