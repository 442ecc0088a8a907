// The passes over a Program: forward, backward, and the tangent pair that multiplies by the Hessian. Written once, for
// any Machine; what a layer does is in layers/.
#pragma once
#include "kinds.h"
#include "trace.h"

namespace METAFAST_NAMESPACE {

// One task's samples, as the machine holds them.
template <class T>
struct LoadedSamples {
  const T* x;                    // [n, h, w, ld] of Program::input
  const int64_t* labels;         // [n], or null
  const T *targets, *d_targets;  // [n, h, w, ld] of Program::out, or null
  int64_t label_stride = 0;      // from the labels of a task to those of the next one that runs at once
};

// The memory of one pass.
template <class T>
struct Tape {
  const PassLayout* layout;
  T* base;     // values, adjoints and what rules save
  T* scratch;  // tangents
};

template <class M>
class Pass {
 public:
  using T = typename M::Real;

  METAFAST_DEVICE Pass(M& machine, const Program& program, const T* constants)
      : m(machine), program(program), constants(constants) {}

  METAFAST_DEVICE void forward(const Tape<T>& tape, const LoadedSamples<T>& samples, const T* theta, int step) const {
    for (int k = 0; k < program.n_ops; ++k) {
      const RuleContext<M> ctx = context(tape, samples, k, {theta, nullptr, nullptr, step, false});
      m.begin(SpanKind::forward, ctx.op.node);
      with_rules<M>(ctx.op.kind, [&](auto rules) { rules.forward(ctx); });
      m.end();
    }
  }

  METAFAST_DEVICE typename M::Loss loss(const Tape<T>& tape, const LoadedSamples<T>& samples) const {
    typename M::Loss value{};
    m.begin(SpanKind::forward, -1);
    with_loss<M>(program.loss, [&](auto rules) { value = rules.forward(loss_context(tape, samples)); });
    m.end();
    return value;
  }

  // Adds the gradient to `grad`: of the adapted parameters, or of all. No `grad`: leaves the adjoints on the tape.
  METAFAST_DEVICE void backward(const Tape<T>& tape, const LoadedSamples<T>& samples, const T* theta, int step, T* grad,
                                bool all) const {
    if (tape.layout->adjoint[program.output] < 0) return;
    m.begin(SpanKind::backward, -1);
    with_loss<M>(program.loss, [&](auto rules) { rules.backward(loss_context(tape, samples)); });
    m.end();
    for (int k = program.n_ops - 1; k >= 0; --k) {
      const RuleContext<M> ctx = context(tape, samples, k, {theta, nullptr, grad, step, all});
      if (!ctx.g_y) continue;
      m.begin(SpanKind::backward, ctx.op.node);
      with_rules<M>(ctx.op.kind, [&](auto rules) { rules.backward(ctx); });
      m.end();
    }
  }

  // The tangent of the outputs of the pass on the tape along u, which is zero where a parameter is not adapted. Null:
  // they do not move.
  METAFAST_DEVICE const T* jvp(const Tape<T>& tape, const LoadedSamples<T>& samples, const T* theta, const T* u,
                               int step) const {
    for (int k = 0; k < program.n_ops; ++k) {
      const RuleContext<M> ctx = context(tape, samples, k, {theta, u, nullptr, step, true});
      if (!ctx.yd) continue;
      m.begin(SpanKind::tangent_forward, ctx.op.node);
      with_rules<M>(ctx.op.kind, [&](auto rules) { rules.tangent_forward(ctx); });
      m.end();
    }
    return at(tape.scratch, tape.layout->tangent, program.output);
  }

  // The tangent along u of the loss of the pass on the tape, right behind its jvp.
  METAFAST_DEVICE typename M::Loss loss_tangent(const Tape<T>& tape) const {
    const T* const g = at(tape.base, tape.layout->adjoint, program.output);
    const T* const yd = at(tape.scratch, tape.layout->tangent, program.output);
    const Grid& out = program.out;
    if (!g || !yd) return {};
    const long size = static_cast<long>(tape.layout->n) * out.h * out.w * out.ld;
    return m.total(size, out.ld, [=](long i) { return M::load(g + i) * M::load(yd + i); });
  }

  // Adds to `product` the Hessian of the loss of the pass on the tape times u, for all parameters; u is zero where a
  // parameter is not adapted.
  METAFAST_DEVICE void hvp(const Tape<T>& tape, const LoadedSamples<T>& samples, const T* theta, const T* u, int step,
                           T* product) const {
    if (jvp(tape, samples, theta, u, step)) tangent_backward(tape, samples, theta, u, step, product);
  }

  // The second half of it, behind a jvp along which the outputs move.
  METAFAST_DEVICE void tangent_backward(const Tape<T>& tape, const LoadedSamples<T>& samples, const T* theta,
                                        const T* u, int step, T* product) const {
    m.begin(SpanKind::tangent_backward, -1);
    with_loss<M>(program.loss, [&](auto rules) { rules.tangent_backward(loss_context(tape, samples)); });
    m.end();
    for (int k = program.n_ops - 1; k >= 0; --k) {
      const RuleContext<M> ctx = context(tape, samples, k, {theta, u, product, step, true});
      if (!ctx.gd_y) continue;
      m.begin(SpanKind::tangent_backward, ctx.op.node);
      with_rules<M>(ctx.op.kind, [&](auto rules) { rules.tangent_backward(ctx); });
      m.end();
    }
  }

  METAFAST_DEVICE const T* outputs(const Tape<T>& tape, const LoadedSamples<T>& samples) const {
    return value(tape, samples, program.output);
  }

 private:
  struct Operands {
    const T *theta, *u;
    T* grad;
    int step;
    bool all;
  };

  METAFAST_DEVICE static T* at(T* base, const int64_t* offsets, int index) {
    return base && index >= 0 && offsets[index] >= 0 ? base + offsets[index] : nullptr;
  }

  METAFAST_DEVICE static const T* value(const Tape<T>& tape, const LoadedSamples<T>& samples, int v) {
    return v == 0 ? samples.x : at(tape.base, tape.layout->value, v);
  }

  METAFAST_DEVICE RuleContext<M> context(const Tape<T>& tape, const LoadedSamples<T>& samples, int k,
                                         const Operands& with) const {
    const Op& op = program.ops[k];
    const PassLayout& layout = *tape.layout;
    T* const scratch = with.u ? tape.scratch : nullptr;
    const int in[2] = {op.input[0], op.input[1]}, out = op.output;
    return {m,
            op,
            layout.n,
            with.step,
            with.theta,
            with.u,
            constants,
            with.grad,
            with.all,
            at(tape.base, layout.saved, k),
            {value(tape, samples, in[0]), value(tape, samples, in[1])},
            {at(scratch, layout.tangent, in[0]), at(scratch, layout.tangent, in[1])},
            at(tape.base, layout.value, out),
            at(scratch, layout.tangent, out),
            at(tape.base, layout.adjoint, out),
            at(scratch, layout.d_adjoint, out),
            {at(tape.base, layout.adjoint, in[0]), at(tape.base, layout.adjoint, in[1])},
            {at(scratch, layout.d_adjoint, in[0]), at(scratch, layout.d_adjoint, in[1])}};
  }

  METAFAST_DEVICE LossContext<M> loss_context(const Tape<T>& tape, const LoadedSamples<T>& samples) const {
    const PassLayout& layout = *tape.layout;
    const int out = program.output;
    return {m,
            program.out,
            layout.n,
            samples.labels,
            samples.label_stride,
            samples.targets,
            at(tape.base, layout.saved, program.n_ops),
            value(tape, samples, out),
            at(tape.base, layout.adjoint, out),
            at(tape.scratch, layout.tangent, out),
            at(tape.scratch, layout.d_adjoint, out),
            samples.d_targets};
  }

  M& m;
  const Program& program;
  const T* constants;
};

}  // namespace METAFAST_NAMESPACE
