// What rules of layers and losses see. METAFAST_NAMESPACE, inside namespace metafast, keeps the builds for several
// instruction sets from being linked into one another.
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

// A contraction is a sum of products: of activations a [n, h, w, ld] and weights, or (for weight gradients) of
// activations x and adjoints g.
template <class T>
struct Term {
  const T *a, *weights;
  T* transposed = nullptr;  // where the weights' transpose may be kept for the rest of the pass
  bool kept = false;        // it is there already
};

template <class T>
struct Pair {
  const T *x, *g;
};

// What a rule sees of the pass that it belongs to. A pointer is null where a thing is not wanted (an adjoint) or zero
// (a tangent). Values, adjoints and tangents are [n, h, w, ld] of their Grid; vectors of parameters are inner [size].
template <class M>
struct RuleContext {
  using T = typename M::Real;
  M& m;
  const Op& op;
  int n;                  // samples
  int step;               // the inner step that the pass belongs to
  const T* theta;         // parameters
  const T* u;             // the direction of a jvp or hvp, zero where a parameter is not adapted
  const T* constants;     // as Op::constants points into them
  T* grad;                // takes the adjoints of the parameters, or their tangents; rules add to it
  bool all_params;        // adjoints of all parameters are wanted, not only of the adapted ones
  T* saved;               // what forward leaves for the other rules, `saved_elements` of it
  const T *x[2], *xd[2];  // inputs and their tangents
  T *y, *yd;              // the output and its tangent
  const T *g_y, *gd_y;    // the adjoint of the output and its tangent
  T *g_x[2], *gd_x[2];    // the adjoints of the inputs and their tangents

  METAFAST_DEVICE bool wants(const Slot& slot) const { return grad && slot.at >= 0 && (all_params || slot.adapted); }
  METAFAST_DEVICE bool moves(const Slot& slot) const { return slot.at >= 0 && slot.adapted; }
  METAFAST_DEVICE int pixels(const Grid& grid) const { return n * grid.h * grid.w; }
  // The element where the row of this step begins.
  METAFAST_DEVICE long row(const Slot& slot) const {
    return slot.at + static_cast<long>(step < slot.rows ? step : slot.rows - 1) * slot.stride;
  }
};

// What the rules of a loss see: outputs y, their adjoint g, the tangents yd and gd of both, all [n, h, w, ld].
template <class M>
struct LossContext {
  using T = typename M::Real;
  M& m;
  Grid grid;
  int n;                  // samples
  const int64_t* labels;  // [n], of the first of the tasks that run at once
  int64_t label_stride;   // from there to those of the next task
  const T* targets;       // like y: what y shall be, or (external) the gradient of the loss in y
  T* saved;               // what forward leaves for the other rules
  const T* y;
  T* g;
  const T* yd;
  T* gd;
  const T* d_targets;  // external: the tangent of that gradient

  METAFAST_DEVICE int64_t label(int sample, int task) const {
    return M::load_one(labels + task * label_stride + sample);
  }
  METAFAST_DEVICE long size() const { return static_cast<long>(n) * grid.h * grid.w * grid.ld; }
};

}  // namespace METAFAST_NAMESPACE
