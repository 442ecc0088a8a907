// L = -mean log p[label], p = softmax y: g = (p - onehot) / n, gd = p (yd - sum_k p_k yd_k) / n.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

// f(sample, task) with the elements of a class `tasks` apart: a machine may run several tasks at once.
struct CrossEntropy {
  template <class M>
  METAFAST_DEVICE static typename M::Loss forward(const LossFrame<M>& f) {
    using T = typename M::Real;
    return f.m.sum_rows(f.n, [&](int s, int task) {
      const T* y = f.y + s * f.grid.ld + task;
      T* p = f.saved + s * f.grid.ld + task;
      T top = M::load_one(y), sum = 0;
      for (int k = 1; k < f.grid.c; ++k) {
        const T value = M::load_one(y + k * M::tasks);
        top = value > top ? value : top;
      }
      for (int k = 0; k < f.grid.c; ++k) {
        const T power = M::exp(M::load_one(y + k * M::tasks) - top);
        M::store_one(p + k * M::tasks, power);
        sum += power;
      }
      for (int k = 0; k < f.grid.c; ++k) M::store_one(p + k * M::tasks, M::load_one(p + k * M::tasks) / sum);
      return M::log(sum) + top - M::load_one(y + f.label(s, task) * M::tasks);
    }) / f.n;
  }

  template <class M>
  METAFAST_DEVICE static void backward(const LossFrame<M>& f) {
    using T = typename M::Real;
    f.m.rows(f.n, [&](int s, int task) {
      const long row = static_cast<long>(s) * f.grid.ld + task;
      for (int k = 0; k * M::tasks < f.grid.ld; ++k) {
        const long i = row + k * M::tasks;
        const T g = k < f.grid.c ? (M::load_one(f.saved + i) - (k == f.label(s, task))) / f.n : 0;
        M::store_one(f.g + i, g);
      }
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const LossFrame<M>& f) {
    using T = typename M::Real;
    f.m.rows(f.n, [&](int s, int task) {
      const long row = static_cast<long>(s) * f.grid.ld + task;
      T mean = 0;
      // Products are stored before they are added: rounded, whatever the compiler makes of the loop.
      for (int k = 0; k < f.grid.c; ++k) {
        const long i = row + k * M::tasks;
        const T product = M::load_one(f.saved + i) * M::load_one(f.yd + i);
        M::store_one(f.gd + i, product);
        mean += product;
      }
      for (int k = 0; k * M::tasks < f.grid.ld; ++k) {
        const long i = row + k * M::tasks;
        const T gd = k < f.grid.c ? M::load_one(f.saved + i) * (M::load_one(f.yd + i) - mean) / f.n : 0;
        M::store_one(f.gd + i, gd);
      }
    });
  }
};

}  // namespace METAFAST_NAMESPACE
