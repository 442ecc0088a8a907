// The run of one task's inner loop, or of as many tasks as a machine runs at once: the steps that adapt, the query
// pass, and the steps in reverse. cuda/inner_loop.cuh does the same with another structure; csrc/README.md says why.
#pragma once
#include "../core/asan.h"
#include "../core/job.h"
#include "../core/pass.h"
#include "contract/contract.h"
#include "lane_machine.h"
#include "transfer.h"

namespace METAFAST_NAMESPACE {

// Where a task keeps things in the memory of its thread, or of its team. Made from a null base it gives the size.
template <class M>
struct TaskMemory {
  using T = typename M::Real;
  T *workspace, *support_x, *support_y, *support_yd, *query_x, *query_y, *theta, *g, *v, *u, *product, *tapes, *rest;
  int64_t size;

  TaskMemory(const Job<T>& job, T* base) : size(0) {
    const Program& p = *job.program;
    const bool adapts = job.goal == Goal::adapt || job.goal == Goal::meta_gradient;
    const auto take = [&](int64_t elements) {
      T* at = base ? base + size : nullptr;
      const int64_t whole = (elements + 15) / 16 * 16;
      if (base) {
        allow(at, whole * sizeof(T));
        forbid(at + whole, gap * sizeof(T));
      }
      size += whole + gap;
      return at;
    };
    const auto elements = [](const Grid& g, int n) { return static_cast<int64_t>(n) * g.h * g.w * g.ld; };
    workspace = take(M::workspace_size(p));
    support_x = take(elements(p.input, job.support.n));
    support_y = take(job.support.targets ? elements(p.out, job.support.n) : 0);
    support_yd = take(job.support.d_targets ? elements(p.out, job.support.n) : 0);
    query_x = take(elements(p.input, job.query.n));
    query_y = take(job.query.targets ? elements(p.out, job.query.n) : 0);
    theta = take((adapts ? job.steps + 1 : 1) * p.size);
    g = take((job.goal == Goal::meta_gradient && job.learns_rates ? job.steps : 1) * p.size);
    v = take(p.size);
    u = take(p.size);
    product = take(p.size);
    const int64_t scratch = job.goal == Goal::adapt ? 0 : job.support_layouts.scratch;
    tapes = take((job.keeps_tapes ? job.steps : 1) * job.support_layouts.tape);
    rest =
        take(job.query_layouts.tape > scratch ? job.query_layouts.tape : scratch);  // the two are never alive together
  }
};

template <class M>
class InnerLoopRun {
  using T = typename M::Real;
  using Loss = typename M::Loss;

 public:
  // `own` is the workspace of a member that is not the first.
  InnerLoopRun(const Job<T>& job, T* base, T* own, Member member, Trace* trace)
      : job(job),
        program(*job.program),
        mem(job, base),
        machine(program, member.rank == 0 ? mem.workspace : own, mem.workspace, member),
        pass(machine, program, job.constants),
        support{},
        query{} {
    machine.trace = trace;
    machine.barrier();
  }

  // To be called before the first task of a chunk.
  void clear_rate_sums(T* rate_sums) const {
    machine.once([&] {
      if (rate_sums) std::memset(rate_sums, 0, job.rate_rows * program.size * sizeof(T));
    });
  }

  // The adjoint of theta_0, of the task that ran last.
  const T* adjoint() const { return v; }

  // The adjoint of the `first` task of a chunk is computed where the sum is to be, and the others are added to it.
  void run(int64_t task, T* sums, T* rate_sums, bool first) {
    t = task;
    v = sums && first ? sums : mem.v;
    if (machine.trace) {
      machine.trace->task = static_cast<int32_t>(t);
      machine.trace->tasks = M::tasks;
    }
    support_layout = job.support_layouts.of ? job.support_layouts.of[t] : nullptr;
    query_layout = job.query_layouts.of ? job.query_layouts.of[t] : nullptr;
    machine.begin(SpanKind::load, 0);
    support = load_samples(job.support, mem.support_x, mem.support_y, mem.support_yd);
    query = load_samples(job.query, mem.query_x, mem.query_y, nullptr);
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
        return adapt_vjp(rate_sums);
      case Goal::meta_gradient:
        return meta_gradient(sums, rate_sums);
      case Goal::jvp:
        return jvp();
      case Goal::hvp:
        return hvp();
    }
  }

 private:
  void predict() {
    load_params(job.params, mem.theta);
    machine.begin(SpanKind::query, job.step);
    const Tape<T> tape = query_tape();
    pass.forward(tape, query, mem.theta, job.step);
    export_outputs(pass.outputs(tape, query), job.query, job.outputs);
    machine.end();
  }

  void jvp() {
    load_params(job.params, mem.theta);
    import_user(job.v, 0, mem.u);
    fence_tape(program, *support_layout, mem.tapes);
    fence_scratch(program, *support_layout, mem.rest);
    const Tape<T> tape{support_layout, mem.tapes, mem.rest};
    pass.forward(tape, support, mem.theta, job.step);
    export_outputs(pass.outputs(tape, support), job.support, job.outputs);
    export_outputs(pass.jvp(tape, support, mem.theta, mem.u, job.step), job.support, job.tangents);
  }

  void hvp() {
    load_params(job.params, mem.theta);
    import_user(job.v, 0, mem.u);
    from_zero(mem.g, [&] { support_pass(mem.tapes, mem.theta, job.step, mem.g); });
    clear(mem.product);
    add_hvp(mem.tapes, mem.theta, mem.u, job.step, mem.product);
    export_user(mem.g, job.grads, 0);
    export_user(mem.product, job.products, 0);
  }

  void loss_and_grad() {
    load_params(job.params, mem.theta);
    from_zero(v, [&] { set_loss(query_pass(mem.theta, job.step, v, true)); });
    export_user(v, job.grads, 0);
  }

  void adapt() {
    load_params(job.params, mem.theta);
    adapt_steps();
    for (int s = 0; s <= job.steps; ++s) export_user(theta(s), job.trajectory, s);
  }

  void adapt_vjp(T* rate_sums) {
    import_user(job.v, job.v_everywhere ? job.steps : 0, v);
    for (int s = job.steps - 1; s >= 0; --s) {
      machine.begin(SpanKind::reverse_step, s);
      import_user(job.trajectory, s, mem.theta);
      if (!job.first_order || job.learns_rates) {
        from_zero(mem.g, [&] { support_pass(mem.tapes, mem.theta, s, mem.g); });
      }
      reverse_step(s, mem.tapes, mem.theta, mem.g, rate_sums);
      machine.end();
      if (!job.v_everywhere) continue;
      import_user(job.v, s, mem.u);
      add(v, 1, mem.u);
    }
    export_user(v, job.grads, 0);
  }

  void meta_gradient(T* sums, T* rate_sums) {
    load_params(job.params, mem.theta);
    adapt_steps();
    const bool whole = job.weights[job.steps] == 1;
    if (!whole) clear(v);
    Loss loss{};
    for (int s = job.steps; s >= 0; --s) {
      if (whole && s == job.steps) {
        from_zero(v, [&] { loss += query_pass(theta(s), s, v, true); });
      } else if (job.weights[s] != 0 || s == job.steps) {
        from_zero(mem.product,
                  [&] { M::add_weighted(loss, job.weights[s], query_pass(theta(s), s, mem.product, s == job.steps)); });
        add(v, static_cast<T>(job.weights[s]), mem.product);
      }
      if (s == 0) break;
      const int step = s - 1;
      machine.begin(SpanKind::reverse_step, step);
      const bool stale = !job.keeps_tapes && s < job.steps;
      if (stale && !job.first_order) support_pass(tape(step), theta(step), step, nullptr);
      reverse_step(step, tape(step), theta(step), gradient(step), rate_sums);
      machine.end();
    }
    set_loss(loss);
    if (sums && v != sums) add(sums, 1, v);
  }

  void adapt_steps() {
    for (int s = 0; s < job.steps; ++s) adapt_step(s);
  }

  // theta_{s+1} = theta_s - alpha_s g_s
  void adapt_step(int s) {
    machine.begin(SpanKind::inner_step, s);
    T *g = gradient(s), *to = theta(s + 1);
    const T *alpha = rate(s), *from = theta(s);
    const auto add_gradient = [&] { support_pass(tape(s), theta(s), s, g); };
    if (job.learns_rates || !redirected(add_gradient, g, to, from, alpha)) {
      from_zero(g, add_gradient);
      machine.each(program.size,
                   [=](long i) { M::store(to + i, M::load(from + i) - M::load_shared(alpha, i) * M::load(g + i)); });
    }
    machine.end();
  }

  // Lets what add_gradient() would add to a g that was zero make to = from - rate * g, or to = g where there is no
  // `from`. Returns false, and does nothing, where parameters get their gradient in several parts.
  template <class F>
  bool redirected(const F& add_gradient, const T* g, T* to, const T* from, const T* rate) {
    if constexpr (M::redirects) {
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

  // d alpha_s = -g_s v;  v <- v - H_s (alpha_s v)
  void reverse_step(int s, T* tape, const T* at, const T* g, T* rate_sums) {
    const T* alpha = rate(s);
    T *v = this->v, *u = mem.u;
    if (job.learns_rates) {
      T* out = rate_sums + row(s) * program.size;
      machine.each(program.size,
                   [=](long i) { M::store(out + i, M::load(out + i) - M::load(g + i) * M::load(v + i)); });
    }
    if (job.first_order) return;
    machine.each(program.size, [=](long i) { M::store(u + i, -M::load_shared(alpha, i) * M::load(v + i)); });
    add_hvp(tape, at, u, s, v);
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
    if (wants_outputs) export_outputs(pass.outputs(tape, query), job.query, job.outputs);
    pass.backward(tape, query, at, step, g, true);
    machine.end();
    return loss;
  }

  Tape<T> query_tape() const {
    fence_tape(program, *query_layout, mem.rest);
    return {query_layout, mem.rest, nullptr};
  }

  int64_t count(const Samples<T>& samples) const { return samples.counts ? samples.counts[t] : samples.n; }

  LoadedSamples<T> load_samples(const Samples<T>& samples, T* x, T* y, T* yd) const {
    if (!samples.x) return {};
    const int n = static_cast<int>(count(samples));
    const int64_t first = t * samples.n, next = job.task_stride * samples.n;
    if (machine.leads()) {
      const auto load = [&](const T* from, const Grid& grid, int border_y, int border_x, T* to) {
        const int64_t sample = static_cast<int64_t>(grid.c) * (grid.h - 2 * border_y) * (grid.w - 2 * border_x);
        import_images<M::tasks>(from + first * sample, next * sample, n, grid, border_y, border_x, to);
      };
      load(samples.x, program.input, program.border_y, program.border_x, x);
      if (samples.targets) load(samples.targets, program.out, 0, 0, y);
      if (samples.d_targets) load(samples.d_targets, program.out, 0, 0, yd);
    }
    return {x, samples.labels ? samples.labels + first : nullptr, y, yd, next};
  }

  // Writes zeros behind the samples of a task that has fewer, and where there is nothing to export.
  void export_outputs(const T* from, const Samples<T>& samples, T* to) const {
    const Grid& out = program.out;
    const int64_t size = static_cast<int64_t>(out.c) * out.h * out.w, n = from ? count(samples) : 0;
    to += t * samples.n * size;
    machine.once([&] {
      if (n > 0) export_images<M::tasks>(from, static_cast<int>(n), out, to, job.task_stride * samples.n * size);
      for (int j = 0; j < M::tasks; ++j) {
        T* const mine = to + j * job.task_stride * samples.n * size;
        std::memset(mine + n * size, 0, (samples.n - n) * size * sizeof(T));
      }
    });
  }

  void load_params(const T* params, T* to) const {
    if (job.params_per_task) return import_user(params, 0, to);
    machine.each(program.size, [=](long i) { M::store(to + i, M::load_shared(params, i)); });
  }

  void import_user(const T* rows, int s, T* to) const {
    const T* const from = rows + (s * job.tasks + t) * job.n_params;
    const int64_t next = job.task_stride * job.n_params;
    machine.once([&] { import_params<M::tasks>(from, next, job.inner, job.n_params, program.size, to); });
  }

  void export_user(const T* from, T* rows, int s) const {
    if (!machine.leads()) return;
    T* const to = rows + (s * job.tasks + t) * job.n_params;
    export_params<M::tasks>(from, job.inner, job.n_params, to, job.task_stride * job.n_params);
  }

  void set_loss(const Loss& loss) const {
    if (!machine.leads()) return;
    for (int j = 0; j < M::tasks; ++j) job.losses[t + j * job.task_stride] = static_cast<T>(M::of_task(loss, j));
  }

  void clear(T* x) const {
    machine.once([&] { std::memset(x, 0, program.size * sizeof(T)); });
  }
  void add(T* to, T scale, const T* x) const {
    machine.each(program.size, [=](long i) { M::put(to + i, M::load(x + i) * scale, true); });
  }

  int row(int s) const { return s < job.rate_rows ? s : job.rate_rows - 1; }
  const T* rate(int s) const { return job.alpha + row(s) * program.size / M::tasks; }
  T* theta(int s) const { return mem.theta + s * program.size; }
  T* gradient(int s) const {
    return mem.g + (job.learns_rates && job.goal == Goal::meta_gradient ? s : 0) * program.size;
  }
  T* tape(int s) const { return mem.tapes + (job.keeps_tapes ? s : 0) * job.support_layouts.tape; }

  const Job<T>& job;
  const Program& program;
  TaskMemory<M> mem;
  M machine;
  Pass<M> pass;
  LoadedSamples<T> support, query;
  int64_t t;
  T* v;  // the adjoint of theta_s
  const PassLayout *support_layout, *query_layout;
};

}  // namespace METAFAST_NAMESPACE
