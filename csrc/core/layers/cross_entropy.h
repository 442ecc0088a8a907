// L = -mean log p[label], p = softmax y: g = (p - onehot) / n, gd = p (yd - sum_k p_k yd_k) / n.
#pragma once
#include "context.h"

namespace METAFAST_NAMESPACE {

// f(sample, task) with the elements of a class `tasks` apart: a machine may run several tasks at once.
struct CrossEntropy {
  template <class M>
  METAFAST_DEVICE static typename M::Loss forward(const LossContext<M>& ctx) {
    using T = typename M::Real;
    return ctx.m.sum_rows(ctx.n, [&](int s, int task) {
      const T* y = ctx.y + s * ctx.grid.ld + task;
      T* p = ctx.saved + s * ctx.grid.ld + task;
      T top = M::load_one(y), sum = 0;
      for (int k = 1; k < ctx.grid.c; ++k) {
        const T value = M::load_one(y + k * M::tasks);
        top = value > top ? value : top;
      }
      for (int k = 0; k < ctx.grid.c; ++k) {
        const T power = M::exp(M::load_one(y + k * M::tasks) - top);
        M::store_one(p + k * M::tasks, power);
        sum += power;
      }
      for (int k = 0; k < ctx.grid.c; ++k) M::store_one(p + k * M::tasks, M::load_one(p + k * M::tasks) / sum);
      return M::log(sum) + top - M::load_one(y + ctx.label(s, task) * M::tasks);
    }) / ctx.n;
  }

  template <class M>
  METAFAST_DEVICE static void backward(const LossContext<M>& ctx) {
    using T = typename M::Real;
    ctx.m.rows(ctx.n, [&](int s, int task) {
      const long row = static_cast<long>(s) * ctx.grid.ld + task;
      for (int k = 0; k * M::tasks < ctx.grid.ld; ++k) {
        const long i = row + k * M::tasks;
        const T g = k < ctx.grid.c ? (M::load_one(ctx.saved + i) - (k == ctx.label(s, task))) / ctx.n : 0;
        M::store_one(ctx.g + i, g);
      }
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const LossContext<M>& ctx) {
    using T = typename M::Real;
    ctx.m.rows(ctx.n, [&](int s, int task) {
      const long row = static_cast<long>(s) * ctx.grid.ld + task;
      T mean = 0;
      // Products are stored before they are added: rounded, whatever the compiler makes of the loop.
      for (int k = 0; k < ctx.grid.c; ++k) {
        const long i = row + k * M::tasks;
        const T product = M::load_one(ctx.saved + i) * M::load_one(ctx.yd + i);
        M::store_one(ctx.gd + i, product);
        mean += product;
      }
      for (int k = 0; k * M::tasks < ctx.grid.ld; ++k) {
        const long i = row + k * M::tasks;
        const T gd = k < ctx.grid.c ? M::load_one(ctx.saved + i) * (M::load_one(ctx.yd + i) - mean) / ctx.n : 0;
        M::store_one(ctx.gd + i, gd);
      }
    });
  }
};

}  // namespace METAFAST_NAMESPACE
