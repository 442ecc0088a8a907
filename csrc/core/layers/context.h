// What a rule sees of the pass that it belongs to. METAFAST_NAMESPACE keeps the builds for several instruction sets
// apart, inside namespace metafast.
#pragma once
#include "../primitives.h"
#include "../program.h"

#ifdef __CUDACC__
#define METAFAST_DEVICE __device__
#define METAFAST_HOST_DEVICE __host__ __device__
#else
#define METAFAST_DEVICE
#define METAFAST_HOST_DEVICE
#endif

namespace METAFAST_NAMESPACE {

// A pass whose memory is planned.
struct PlannedPass {
  int n;  // samples
  PassKind kind;
  int element_size;  // bytes

  int64_t elements(const Grid& grid) const { return static_cast<int64_t>(n) * grid.h * grid.w * grid.ld; }
  int64_t elements_for_bytes(int64_t bytes) const { return (bytes + element_size - 1) / element_size; }
};

// A contraction is a sum of products: of activations and weights, or (for weight gradients) of activations and
// adjoints.
template <class T>
struct Term {
  const T *a, *weights;
  T* transposed = nullptr;  // where the weights' transpose may be kept for the rest of the pass
  bool kept = false;        // it is there
};

template <class T>
struct Pair {
  const T *x, *g;
};

// Pointers are null where a thing is not wanted (an adjoint) or zero (a tangent). `grad` takes the adjoints of the
// parameters, or their tangents; rules add to it.
template <class M>
struct RuleContext {
  using T = typename M::Real;
  M& m;
  const Op& op;
  int n, step;
  const T *theta, *u, *constants;
  T* grad;
  bool all_params;  // adjoints of all parameters are wanted, not only of the adapted ones
  T* saved;
  const T *x[2], *xd[2];
  T *y, *yd;
  const T *g_y, *gd_y;
  T *g_x[2], *gd_x[2];

  METAFAST_DEVICE bool wants(const Slot& slot) const { return grad && slot.at >= 0 && (all_params || slot.adapted); }
  METAFAST_DEVICE bool moves(const Slot& slot) const { return slot.at >= 0 && slot.adapted; }
  METAFAST_DEVICE int pixels(const Grid& grid) const { return n * grid.h * grid.w; }
  METAFAST_DEVICE long row(const Slot& slot) const {
    return slot.at + static_cast<long>(step < slot.rows ? step : slot.rows - 1) * slot.stride;
  }
};

template <class M>
struct LossContext {
  using T = typename M::Real;
  M& m;
  Grid grid;
  int n;
  const int64_t* labels;  // cross_entropy: [n], of the first of the tasks that run at once
  int64_t label_stride;   // from there to those of the next one
  const T* targets;       // mse: as y; given: the gradient of the loss in y
  T* saved;
  const T* y;
  T* g;
  const T* yd;
  T* gd;
  const T* d_targets;  // given: the tangent of that gradient

  METAFAST_DEVICE int64_t label(int sample, int task) const {
    return M::load_one(labels + task * label_stride + sample);
  }
  METAFAST_DEVICE long size() const { return static_cast<long>(n) * grid.h * grid.w * grid.ld; }
};

}  // namespace METAFAST_NAMESPACE
