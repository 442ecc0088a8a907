// Between the user's layout (samples [n, C, H, W], the flat parameter vector) and the inner one (channels last,
// panels).
#pragma once
#include "../core/job.h"
#include "simd.h"

namespace METAFAST_NAMESPACE {

// x [n, C, H, W] into grids with a border of zeros.
template <class T>
void import_images(const T* x, int n, const Grid& g, int border_y, int border_x, T* out) {
  const long image = static_cast<long>(g.h) * g.w * g.ld;
  std::memset(out, 0, n * image * sizeof(T));
  const int h = g.h - 2 * border_y, w = g.w - 2 * border_x;
  for (int s = 0; s < n; ++s) {
    for (int c = 0; c < g.c; ++c) {
      for (int y = 0; y < h; ++y) {
        const T* from = x + ((static_cast<long>(s) * g.c + c) * h + y) * w;
        T* to = out + s * image + (static_cast<long>(y + border_y) * g.w + border_x) * g.ld + c;
        for (int k = 0; k < w; ++k) to[static_cast<long>(k) * g.ld] = from[k];
      }
    }
  }
}

template <class T>
void export_images(const T* in, int n, const Grid& g, T* out) {
  const long image = static_cast<long>(g.h) * g.w * g.ld, pixels = static_cast<long>(g.h) * g.w;
  for (int s = 0; s < n; ++s) {
    for (long p = 0; p < pixels; ++p) {
      for (int c = 0; c < g.c; ++c) out[(static_cast<long>(s) * g.c + c) * pixels + p] = in[s * image + p * g.ld + c];
    }
  }
}

template <class T>
void import_params(const T* flat, const int32_t* inner, int64_t count, int64_t size, T* out) {
  std::memset(out, 0, size * sizeof(T));
  for (int64_t i = 0; i < count; ++i) out[inner[i]] = flat[i];
}

template <class T>
void export_params(const T* in, const int32_t* inner, int64_t count, T* flat) {
  for (int64_t i = 0; i < count; ++i) flat[i] = in[inner[i]];
}

}  // namespace METAFAST_NAMESPACE
