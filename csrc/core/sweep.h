// The passes over a Program: forward, backward, and the tangent pair that multiplies by the Hessian. Written once, for
// any Machine; what a layer does is in layers/.
#pragma once
#include "layers/rules.h"
#include "trace.h"

namespace METAFAST_NAMESPACE {

// One task's samples, as the machine holds them.
template <class T>
struct Batch {
  const T* x;
  const int64_t* labels;
  const T *targets, *d_targets;
  int64_t next_labels = 0;  // to those of the next task that runs at once
};

// The memory of one pass.
template <class T>
struct Tape {
  const Pass* pass;
  T* base;
  T* scratch;  // tangents
};

template <class M>
class Sweep {
 public:
  using T = typename M::Real;

  METAFAST_DEVICE Sweep(M& machine, const Program& program, const T* constants)
      : m(machine), program(program), constants(constants) {}

  METAFAST_DEVICE void forward(const Tape<T>& tape, const Batch<T>& batch, const T* theta, int step) const {
    for (int k = 0; k < program.n_ops; ++k) {
      const Frame<M> f = frame(tape, batch, k, {theta, nullptr, nullptr, step, false});
      m.begin(What::forward, f.op.node);
      with_rules<M>(f.op.kind, [&](auto rules) { rules.forward(f); });
      m.end();
    }
  }

  METAFAST_DEVICE typename M::Loss loss(const Tape<T>& tape, const Batch<T>& batch) const {
    typename M::Loss value{};
    m.begin(What::forward, -1);
    with_loss(program.loss, [&](auto rules) { value = rules.forward(loss_frame(tape, batch)); });
    m.end();
    return value;
  }

  // Adds the gradient to `grad`: of the adapted parameters, or of all. No `grad`: leaves the adjoints on the tape.
  METAFAST_DEVICE void backward(const Tape<T>& tape, const Batch<T>& batch, const T* theta, int step, T* grad,
                                bool all) const {
    if (tape.pass->adjoint[program.output] < 0) return;
    m.begin(What::backward, -1);
    with_loss(program.loss, [&](auto rules) { rules.backward(loss_frame(tape, batch)); });
    m.end();
    for (int k = program.n_ops - 1; k >= 0; --k) {
      const Frame<M> f = frame(tape, batch, k, {theta, nullptr, grad, step, all});
      if (!f.g_y) continue;
      m.begin(What::backward, f.op.node);
      with_rules<M>(f.op.kind, [&](auto rules) { rules.backward(f); });
      m.end();
    }
  }

  // The tangent of the outputs of the pass on the tape along u, which is zero where a parameter is not adapted. Null:
  // they do not move.
  METAFAST_DEVICE const T* tangent_forward(const Tape<T>& tape, const Batch<T>& batch, const T* theta, const T* u,
                                           int step) const {
    for (int k = 0; k < program.n_ops; ++k) {
      const Frame<M> f = frame(tape, batch, k, {theta, u, nullptr, step, true});
      if (!f.yd) continue;
      m.begin(What::tangent_forward, f.op.node);
      with_rules<M>(f.op.kind, [&](auto rules) { rules.tangent_forward(f); });
      m.end();
    }
    return at(tape.scratch, tape.pass->tangent, program.output);
  }

  // Adds to `product` the Hessian of the loss of the pass on the tape times u, for all parameters; u is zero where a
  // parameter is not adapted.
  METAFAST_DEVICE void hessian_times(const Tape<T>& tape, const Batch<T>& batch, const T* theta, const T* u, int step,
                                     T* product) const {
    if (!tangent_forward(tape, batch, theta, u, step)) return;
    m.begin(What::tangent_backward, -1);
    with_loss(program.loss, [&](auto rules) { rules.tangent_backward(loss_frame(tape, batch)); });
    m.end();
    for (int k = program.n_ops - 1; k >= 0; --k) {
      const Frame<M> f = frame(tape, batch, k, {theta, u, product, step, true});
      if (!f.gd_y) continue;
      m.begin(What::tangent_backward, f.op.node);
      with_rules<M>(f.op.kind, [&](auto rules) { rules.tangent_backward(f); });
      m.end();
    }
  }

  METAFAST_DEVICE const T* outputs(const Tape<T>& tape, const Batch<T>& batch) const {
    return value(tape, batch, program.output);
  }

 private:
  struct With {
    const T *theta, *u;
    T* grad;
    int step;
    bool all;
  };

  METAFAST_DEVICE static T* at(T* base, const int64_t* offsets, int index) {
    return base && index >= 0 && offsets[index] >= 0 ? base + offsets[index] : nullptr;
  }

  METAFAST_DEVICE static const T* value(const Tape<T>& tape, const Batch<T>& batch, int v) {
    return v == 0 ? batch.x : at(tape.base, tape.pass->value, v);
  }

  METAFAST_DEVICE Frame<M> frame(const Tape<T>& tape, const Batch<T>& batch, int k, const With& with) const {
    const Op& op = program.ops[k];
    const Pass& pass = *tape.pass;
    T* const scratch = with.u ? tape.scratch : nullptr;
    const int in[2] = {op.input[0], op.input[1]}, out = op.output;
    return {m,
            op,
            pass.n,
            with.step,
            with.theta,
            with.u,
            constants,
            with.grad,
            with.all,
            at(tape.base, pass.saved, k),
            {value(tape, batch, in[0]), value(tape, batch, in[1])},
            {at(scratch, pass.tangent, in[0]), at(scratch, pass.tangent, in[1])},
            at(tape.base, pass.value, out),
            at(scratch, pass.tangent, out),
            at(tape.base, pass.adjoint, out),
            at(scratch, pass.d_adjoint, out),
            {at(tape.base, pass.adjoint, in[0]), at(tape.base, pass.adjoint, in[1])},
            {at(scratch, pass.d_adjoint, in[0]), at(scratch, pass.d_adjoint, in[1])}};
  }

  METAFAST_DEVICE LossFrame<M> loss_frame(const Tape<T>& tape, const Batch<T>& batch) const {
    const Pass& pass = *tape.pass;
    const int out = program.output;
    return {m,
            program.out,
            pass.n,
            batch.labels,
            batch.next_labels,
            batch.targets,
            at(tape.base, pass.saved, program.n_ops),
            value(tape, batch, out),
            at(tape.base, pass.adjoint, out),
            at(tape.scratch, pass.tangent, out),
            at(tape.scratch, pass.d_adjoint, out),
            batch.d_targets};
  }

  M& m;
  const Program& program;
  const T* constants;
};

}  // namespace METAFAST_NAMESPACE
