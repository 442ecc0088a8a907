// An image as the vector that its user makes of it: y[c, h, w] = x[h, w, c]. Products read flattened images as they lie
// in memory, with their weights in the same order; this is for what must know which feature is which.
#pragma once
#include "linear_map.h"

namespace METAFAST_NAMESPACE {

struct Vector : LinearMap<Vector> {
 private:
  friend LinearMap<Vector>;

  template <class M, class T>
  static void gather(const RuleContext<M>& ctx, const T* x, T* y) {
    const Grid &image = ctx.op.x, &vector = ctx.op.y;
    ctx.m.pixels(image, ctx.n, [&](int sample, long pixel, int row, int column) {
      T* const to = y + M::pixel(vector, sample, 0, 0) + row * image.w + column;
      for (int c = 0; c < image.c; ++c) to[static_cast<long>(c) * image.h * image.w] = x[pixel + c];
    });
    ctx.m.clear_padding(vector, ctx.n, y);
  }

  template <class M, class T>
  static void scatter(const RuleContext<M>& ctx, const T* g, T* g_x) {
    const Grid &image = ctx.op.x, &vector = ctx.op.y;
    const bool add = ctx.op.add[0];
    ctx.m.pixels(image, ctx.n, [&](int sample, long pixel, int row, int column) {
      const T* const from = g + M::pixel(vector, sample, 0, 0) + row * image.w + column;
      for (int c = 0; c < image.ld; ++c) {
        const T value = c < image.c ? from[static_cast<long>(c) * image.h * image.w] : T(0);
        g_x[pixel + c] = add ? g_x[pixel + c] + value : value;
      }
    });
  }
};

}  // namespace METAFAST_NAMESPACE
