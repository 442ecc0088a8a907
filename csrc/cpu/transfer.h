// Between the user's layout (samples [n, C, H, W], the flat parameter vector) and the inner one (channels last,
// panels), of L tasks at once whose memory lies `stride` apart: neighbours in the inner layout are theirs in turn.
#pragma once
#include "../core/job.h"
#include "simd.h"

namespace METAFAST_NAMESPACE {

// x [n, C, H, W] into grids with a border of zeros.
template <int L, class T>
void import_images(const T* x, int64_t stride, int n, const Grid& g, int border_y, int border_x, T* out) {
  const long image = static_cast<long>(g.h) * g.w * g.ld;
  if (L == 1 && g.h * g.w == 1) {
    for (int s = 0; s < n; ++s) {
      std::memcpy(out + s * image, x + static_cast<long>(s) * g.c, g.c * sizeof(T));
      std::memset(out + s * image + g.c, 0, (image - g.c) * sizeof(T));
    }
    return;
  }
  std::memset(out, 0, n * image * sizeof(T));
  const int h = g.h - 2 * border_y, w = g.w - 2 * border_x;
  for (int s = 0; s < n; ++s) {
    for (int c = 0; c < g.c; ++c) {
      for (int y = 0; y < h; ++y) {
        const T* from = x + ((static_cast<long>(s) * g.c + c) * h + y) * w;
        T* to = out + s * image + (static_cast<long>(y + border_y) * g.w + border_x) * g.ld + c * L;
        for (int k = 0; k < w; ++k) {
          for (int j = 0; j < L; ++j) to[static_cast<long>(k) * g.ld + j] = from[j * stride + k];
        }
      }
    }
  }
}

template <int L, class T>
void export_images(const T* in, int n, const Grid& g, T* out, int64_t stride) {
  const long image = static_cast<long>(g.h) * g.w * g.ld, pixels = static_cast<long>(g.h) * g.w;
  for (int s = 0; s < n; ++s) {
    for (long p = 0; p < pixels; ++p) {
      for (int c = 0; c < g.c; ++c) {
        T* to = out + (static_cast<long>(s) * g.c + c) * pixels + p;
        for (int j = 0; j < L; ++j) to[j * stride] = in[s * image + p * g.ld + c * L + j];
      }
    }
  }
}

template <int L, class T>
void import_params(const T* flat, int64_t stride, const int32_t* inner, int64_t count, int64_t size, T* out) {
  std::memset(out, 0, size * sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < L; ++j) out[inner[i] + j] = flat[j * stride + i];
  }
}

template <int L, class T>
void export_params(const T* in, const int32_t* inner, int64_t count, T* flat, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < L; ++j) flat[j * stride + i] = in[inner[i] + j];
  }
}

}  // namespace METAFAST_NAMESPACE
