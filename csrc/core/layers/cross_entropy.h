// L = -mean log p[label], p = softmax y: g = (p - onehot) / n, gd = p (yd - sum_k p_k yd_k) / n.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct CrossEntropy {
  template <class M>
  METAFAST_DEVICE static double forward(const LossFrame<M>& f) {
    using T = typename M::Real;
    return f.m.sum_rows(f.n, [&](int s) {
      const T* y = f.y + s * f.grid.ld;
      T* p = f.saved + s * f.grid.ld;
      T top = y[0], sum = 0;
      for (int k = 1; k < f.grid.c; ++k) top = y[k] > top ? y[k] : top;
      for (int k = 0; k < f.grid.c; ++k) sum += p[k] = M::exp(y[k] - top);
      for (int k = 0; k < f.grid.c; ++k) p[k] /= sum;
      return M::log(sum) + top - y[f.labels[s]];
    }) / f.n;
  }

  template <class M>
  METAFAST_DEVICE static void backward(const LossFrame<M>& f) {
    f.m.rows(f.n, [&](int s) {
      const long row = static_cast<long>(s) * f.grid.ld;
      for (int k = 0; k < f.grid.ld; ++k) {
        f.g[row + k] = k < f.grid.c ? (f.saved[row + k] - (k == f.labels[s])) / f.n : 0;
      }
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const LossFrame<M>& f) {
    using T = typename M::Real;
    f.m.rows(f.n, [&](int s) {
      const long row = static_cast<long>(s) * f.grid.ld;
      T mean = 0;
      for (int k = 0; k < f.grid.c; ++k) mean += f.saved[row + k] * f.yd[row + k];
      for (int k = 0; k < f.grid.ld; ++k) {
        f.gd[row + k] = k < f.grid.c ? f.saved[row + k] * (f.yd[row + k] - mean) / f.n : 0;
      }
    });
  }
};

}  // namespace METAFAST_NAMESPACE
