// The run of one task's inner loop, or of as many tasks as a machine runs at once: the steps that adapt, the query
// pass, and the steps in reverse. cuda/inner_loop.cuh does the same with another structure; csrc/README.md says why.
#pragma once
#include "../core/pass.h"
#include "../core/steps/rule_step.h"
#include "task_memory.h"
#include "user_memory.h"

namespace METAFAST_NAMESPACE {

template <class M>
class InnerLoopRun {
  using T = typename M::Real;
  using Loss = typename M::Loss;

 public:
  // Where what a chunk sums up goes; null: it is not wanted.
  struct ChunkSums {
    T *sums, *rate_sums;
    double* number_sums;  // of the first task of those that run at once
  };

  // `own` is the workspace of a member that is not the first.
  InnerLoopRun(const Job<T>& job, T* base, T* own, Member member, Trace* trace)
      : job(job),
        program(*job.program),
        mem(job, base),
        machine(program, member.rank == 0 ? mem.workspace : own, mem.workspace, member),
        user(job, machine),
        pass(machine, program, job.constants),
        rule_step(machine, job.rule, program.size, job.rate_rows, mem.blocks),
        support{},
        query{},
        is_simple(job.rate_numbers && program.used_once && runs_in_lanes(program)) {
    machine.trace = trace;
    machine.barrier();
  }

  // To be called before the first task of a chunk.
  void clear_rate_sums(T* rate_sums) const {
    machine.once([&] {
      if (rate_sums) std::memset(rate_sums, 0, job.rate_sum_rows * program.size * sizeof(T));
    });
  }

  // The adjoint of theta_0, of the task that ran last.
  const T* adjoint() const { return v; }

  // The adjoint of the `first` task of a chunk is computed where the sum is to be, and the others are added to it.
  void run(int64_t task, const ChunkSums& to, bool first) {
    t = user.t = task;
    chunk = to;
    v = to.sums && first ? to.sums : mem.v;
    if (machine.trace) {
      machine.trace->task = static_cast<int32_t>(t);
      machine.trace->tasks = M::tasks;
    }
    query_layout = job.query_layouts.of ? job.query_layouts.of[t] : nullptr;
    machine.begin(SpanKind::load, 0);
    query = user.load_samples(job.query, t, mem.query_x, mem.query_y, nullptr);
    loaded = -1;
    if (!job.support.each_step) load_row(t);
    machine.barrier();
    machine.end();
    switch (job.goal) {
      case Goal::predict:
        return predict();
      case Goal::loss_and_grad:
        return loss_and_grad();
      case Goal::adapt:
        return adapt();
      case Goal::adapt_vjp:
        return adapt_vjp();
      case Goal::meta_gradient:
        return meta_gradient();
      case Goal::jvp:
        return jvp();
      case Goal::hvp:
        return hvp();
    }
  }

 private:
  void predict() {
    user.load_params(job.params, mem.starts);
    machine.begin(SpanKind::query, job.step);
    const Tape<T> tape = query_tape();
    pass.forward(tape, query, mem.starts, job.step);
    user.export_outputs(pass.outputs(tape, query), job.query, job.outputs);
    machine.end();
  }

  void jvp() {
    user.load_params(job.params, mem.starts);
    user.import_user(job.v, 0, mem.u);
    fence_tape(program, *support_layout, mem.tapes);
    fence_scratch(program, *support_layout, mem.rest);
    const Tape<T> tape{support_layout, mem.tapes, mem.rest};
    pass.forward(tape, support, mem.starts, job.step);
    user.export_outputs(pass.outputs(tape, support), job.support, job.outputs);
    user.export_outputs(pass.jvp(tape, support, mem.starts, mem.u, job.step), job.support, job.tangents);
  }

  void hvp() {
    user.load_params(job.params, mem.starts);
    user.import_user(job.v, 0, mem.u);
    if (job.grads) {
      from_zero(mem.g, [&] { support_pass(mem.tapes, mem.starts, job.step, mem.g); });
      user.export_user(mem.g, job.grads, 0);
    } else {
      support_pass(mem.tapes, mem.starts, job.step, nullptr);
    }
    clear(mem.product);
    add_hvp(mem.tapes, mem.starts, mem.u, job.step, mem.product);
    user.export_user(mem.product, job.products, 0);
  }

  void loss_and_grad() {
    user.load_params(job.params, mem.starts);
    from_zero(v, [&] { set_loss(query_pass(mem.starts, job.step, v, true)); });
    user.export_user(v, job.grads, 0);
  }

  void adapt() {
    user.load_start(mem.start(0));
    user.export_z(mem.start(0), job.trajectory, 0);
    for (int s = 0; s < job.steps; ++s) {
      adapt_step(s, mem.start(s % 2), mem.start((s + 1) % 2), mem.g, mem.tapes);
      user.export_z(mem.start((s + 1) % 2), job.trajectory, s + 1);
    }
  }

  void adapt_vjp() {
    user.import_adjoint(job.v_everywhere ? job.steps : 0, v, mem.w);
    for (int s = job.steps - 1; s >= 0; --s) {
      machine.begin(SpanKind::reverse_step, s);
      user.import_z(job.trajectory, s, mem.starts);
      load_support(s);
      if (job.needs_gradient) {
        from_zero(mem.g, [&] { support_pass(mem.tapes, mem.starts, number(s), mem.g); });
      } else if (!job.first_order) {
        support_pass(mem.tapes, mem.starts, number(s), nullptr);
      }
      reverse_step(s, mem.tapes, mem.starts, mem.g);
      machine.end();
      if (!job.v_everywhere) continue;
      user.import_adjoint(s, mem.u, mem.starts);
      add(v, 1, mem.u);
      for (int k = 0; k < job.rule.states; ++k) add(mem.w + k * program.size, 1, mem.starts + k * program.size);
    }
    user.export_user(v, job.grads, 0, 0);
    for (int k = 0; k < job.rule.states; ++k) user.export_user(mem.w + k * program.size, job.grads, 0, k + 1);
  }

  void meta_gradient() {
    const int segments = mem.segments();
    Loss loss{};
    adapt_before(loss);
    for (int j = 0; j < segments; ++j) adapt_segment(j, j == segments - 1);
    if (job.weights[job.steps] != 1) clear(v);
    if (job.rule.states > 0) machine.once([&] { std::memset(mem.w, 0, job.rule.states * program.size * sizeof(T)); });
    query_after(job.steps, mem.start(segments), loss);
    for (int j = segments - 1; j >= 0; --j) {
      if (j < segments - 1) adapt_segment(j, true);
      for (int s = mem.first_of(j + 1) - 1; s >= mem.first_of(j); --s) {
        const int i = s - mem.first_of(j);
        const T* const z = mem.kept_z(s, j);
        T* const tape = mem.tape(i);
        machine.begin(SpanKind::reverse_step, s);
        load_support(s);
        const bool stale = !job.keeps_tapes && s < job.steps - 1;
        if (stale && !job.first_order) support_pass(tape, z, number(s), nullptr);
        reverse_step(s, tape, z, mem.gradient(i));
        machine.end();
        query_after(s, z, loss);
      }
    }
    if (job.judges_before) add(v, 1, mem.before);
    set_loss(loss);
    if (chunk.sums && v != chunk.sums) add(chunk.sums, 1, v);
  }

  // Takes the steps that the way back does not go through, and keeps nothing of them but what query losses that are
  // judged there make of theta_0: to them theta_s is theta_0 and a constant.
  void adapt_before(Loss& loss) {
    user.load_start(mem.start(job.begin % 2));
    if (job.judges_before) clear(mem.before);
    for (int s = 0; s < job.begin; ++s) {
      T* const z = mem.start((job.begin - s) % 2);
      if (job.weights[s] != 0) add_query(s, z, mem.before, loss, false);
      adapt_step(s, z, mem.start((job.begin - s - 1) % 2), mem.g, mem.tapes);
    }
  }

  // Takes the steps of segment j, from the z at its start to that at the start of the next.
  void adapt_segment(int j, bool keeps) {
    const int first = mem.first_of(j);
    for (int s = first; s < mem.first_of(j + 1); ++s) {
      const int i = keeps ? s - first : 0;
      adapt_step(s, mem.place(s, j, keeps), mem.place(s + 1, j, keeps), mem.gradient(i), mem.tape(i));
      if (keeps && job.kept_from > 0 && s + 1 < mem.first_of(j + 1)) keep_part(mem.place(s + 1, j, true), mem.part(i));
    }
  }

  // Keeps of z what the way back reads.
  void keep_part(const T* z, T* to) const {
    const int64_t from = job.kept_from;
    machine.each(program.size - from, [=](long i) { M::store(to + i, M::load(z + from + i)); });
  }

  // Adds to v what the query loss after s steps makes of it.
  void query_after(int s, const T* z, Loss& loss) {
    const double weight = job.weights[s];
    const bool last = s == job.steps;
    if (last && weight == 1) {
      from_zero(v, [&] { loss += query_pass(z, number(s), v, true); });
    } else if (last && weight == 0) {
      query_pass(z, number(s), nullptr, true);
    } else if (weight != 0) {
      add_query(s, z, v, loss, last);
    }
  }

  // Adds the weighted query loss after s steps to `loss`, and its gradient to `to`.
  void add_query(int s, const T* z, T* to, Loss& loss, bool wants_outputs) {
    const double weight = job.weights[s];
    from_zero(mem.product,
              [&] { M::add_weighted(loss, weight, query_pass(z, number(s), mem.product, wants_outputs)); });
    add(to, static_cast<T>(weight), mem.product);
  }

  // Takes step s from z to z' = `to`; plain: theta_{s+1} = theta_s - alpha_s g_s.
  void adapt_step(int s, const T* z, T* to, T* g, T* tape) {
    load_support(s);
    machine.begin(SpanKind::inner_step, s);
    const auto add_gradient = [&](T* sum) { support_pass(tape, z, number(s), sum); };
    if (job.rule.kind != StepKind::plain) {
      from_zero(g, [&] { add_gradient(g); });
      rule_step.advance(number(s), z, g, to);
    } else {
      descend(s, z, to, g, add_gradient);
    }
    machine.end();
  }

  // to = from - alpha_s g, g being what add_gradient(g) adds to zero. It is left there where the way back needs it.
  template <class F>
  void descend(int s, const T* from, T* to, T* g, const F& add_gradient) {
    if constexpr (M::tasks > 1) {
      if (!job.needs_gradient && redirected([&] { add_gradient(g); }, g, to, from, rate(s))) return;
    } else if (is_simple && machine.is_shared() && !job.needs_gradient) {
      machine.descent = {g, to, from, *rate_number(s)};
      add_gradient(g);
      machine.descent = {};
      return;
    }
    from_zero(g, [&] { add_gradient(g); });
    const auto subtract = [&](const auto& alpha) {
      machine.each(program.size, [=](long i) { M::store(to + i, M::load(from + i) - alpha(i) * M::load(g + i)); });
    };
    if (is_simple) {
      const auto alpha = M::broadcast(*rate_number(s));
      subtract([=](long) { return alpha; });
    } else {
      const T* const alpha = rate(s);
      subtract([=](long i) { return M::load_shared(alpha, i); });
    }
  }

  // Lets what add_gradient() would add to a g that was zero make to = from - rate * g, or to = g where there is no
  // `from`. Returns false, and does nothing, where parameters get their gradient in several parts.
  template <class F>
  bool redirected(const F& add_gradient, const T* g, T* to, const T* from, const T* rate) {
    if constexpr (M::tasks > 1) {
      if (program.used_once) {
        machine.redirect = {g, to, from, rate};
        add_gradient();
        machine.redirect = {};
        return true;
      }
    }
    return false;
  }

  // Makes g the gradient that add_gradient() adds to it.
  template <class F>
  void from_zero(T* g, const F& add_gradient) {
    if (redirected(add_gradient, g, g, nullptr, nullptr)) return;
    clear(g);
    add_gradient();
  }

  // Plain: d alpha_s = -g_s v;  v <- v - H_s (alpha_s v)
  void reverse_step(int s, T* tape, const T* z, const T* g) {
    T *v = this->v, *u = mem.u;
    if (job.rule.kind != StepKind::plain) {
      rule_step.back(number(s), z, g, v, mem.w, u, {chunk.number_sums, chunk.rate_sums, job.number_stride});
      if (!job.first_order) add_hvp(tape, z, u, number(s), v);
      return;
    }
    if (job.learns_rates && job.needs_gradient) {
      T* out = chunk.rate_sums + row(s) * program.size;
      machine.each(program.size,
                   [=](long i) { M::store(out + i, M::load(out + i) - M::load(g + i) * M::load(v + i)); });
    }
    if (job.first_order) return;
    if (is_simple || (job.learns_rates && !job.needs_gradient)) return reverse_by_one_rate(s, tape, z);
    const T* const alpha = rate(s);
    machine.each(program.size, [=](long i) { M::store(u + i, -M::load_shared(alpha, i) * M::load(v + i)); });
    add_hvp(tape, z, u, number(s), v);
  }

  // The same by one rate, v <- v - alpha_s H_s v: -d alpha_s is the derivative of the loss along v, as far as that
  // moves.
  void reverse_by_one_rate(int s, T* tape, const T* z) {
    const T *u = this->v, *const moved = job.rule.moved;
    if (!program.used_once) {
      T *const v = this->v, *const to = mem.u;
      machine.each(program.size, [=](long i) { M::store(to + i, M::load_shared(moved, i) * M::load(v + i)); });
      u = mem.u;
    }
    const Tape<T> along{support_layout, tape, mem.rest};
    fence_scratch(program, *support_layout, mem.rest);
    if (!pass.jvp(along, support, z, u, number(s))) return;
    if (job.learns_rates && !job.needs_gradient) subtract_from_rate(s, pass.loss_tangent(along));
    const auto add_product = [&](T* sum) { pass.tangent_backward(along, support, z, u, number(s), sum); };
    if (is_simple) return descend(s, v, v, mem.product, add_product);
    from_zero(mem.product, [&] { add_product(mem.product); });
    add(v, -*rate_number(s), mem.product);
  }

  void subtract_from_rate(int s, const Loss& derivative) const {
    machine.once([&] {
      double* const to = chunk.number_sums + row(s);
      for (int j = 0; j < M::tasks; ++j) to[j * job.number_stride] -= M::of_task(derivative, j);
    });
  }

  void add_hvp(T* tape, const T* at, const T* u, int step, T* product) {
    fence_scratch(program, *support_layout, mem.rest);
    pass.hvp({support_layout, tape, mem.rest}, support, at, u, step, product);
  }

  void support_pass(T* memory, const T* at, int step, T* g) {
    fence_tape(program, *support_layout, memory);
    const Tape<T> tape{support_layout, memory, nullptr};
    pass.forward(tape, support, at, step);
    pass.loss(tape, support);
    pass.backward(tape, support, at, step, g, false);
  }

  Loss query_pass(const T* at, int step, T* g, bool wants_outputs) {
    machine.begin(SpanKind::query, step);
    const Tape<T> tape = query_tape();
    pass.forward(tape, query, at, step);
    const Loss loss = pass.loss(tape, query);
    if (wants_outputs) user.export_outputs(pass.outputs(tape, query), job.query, job.outputs);
    pass.backward(tape, query, at, step, g, true);
    machine.end();
    return loss;
  }

  Tape<T> query_tape() const {
    fence_tape(program, *query_layout, mem.rest);
    return {query_layout, mem.rest, nullptr};
  }

  // Loads the support samples of step s, where it has some of its own and they are not there.
  void load_support(int s) {
    const int64_t row = s * job.tasks + t;
    if (!job.support.each_step || row == loaded) return;
    machine.begin(SpanKind::load, s);
    load_row(row);
    machine.barrier();
    machine.end();
  }

  void load_row(int64_t row) {
    loaded = row;
    support_layout = job.support_layouts.of ? job.support_layouts.of[row] : nullptr;
    support = user.load_samples(job.support, row, mem.support_x, mem.support_y, mem.support_yd);
  }

  void set_loss(const Loss& loss) const {
    if (!machine.leads()) return;
    for (int j = 0; j < M::tasks; ++j) job.losses[t + j * job.task_stride] = static_cast<T>(M::of_task(loss, j));
  }

  void clear(T* x) const {
    machine.each(program.size, [=](long i) { M::store(x + i, M::broadcast(0)); });
  }
  void add(T* to, T scale, const T* x) const {
    machine.each(program.size, [=](long i) { M::put(to + i, M::load(x + i) * scale, true); });
  }

  int number(int s) const { return static_cast<int>(job.first) + s; }
  int row(int s) const { return number(s) < job.rate_rows ? number(s) : job.rate_rows - 1; }
  const T* rate(int s) const { return job.alpha + row(s) * program.size / M::tasks; }
  const T* rate_number(int s) const { return job.rate_numbers ? job.rate_numbers + row(s) : nullptr; }

  const Job<T>& job;
  const Program& program;
  TaskMemory<M> mem;
  M machine;
  UserMemory<M> user;
  Pass<M> pass;
  RuleStep<M> rule_step;
  LoadedSamples<T> support, query;
  ChunkSums chunk;
  int64_t t;
  int64_t loaded;  // the row of samples that `support` holds
  T* v;            // the adjoint of theta_s
  const PassLayout *support_layout, *query_layout;
  // Are steps plain, with one rate, and does the gradient of each parameter come in one piece, however the task is run?
  const bool is_simple;
};

}  // namespace METAFAST_NAMESPACE
