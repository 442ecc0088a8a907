// What is done with one task: the inner loop, the query, and the way back.
#pragma once
#include "../core/job.h"
#include "../core/sweep.h"
#include "contract.h"
#include "machine.h"
#include "transfer.h"

namespace METAFAST_NAMESPACE {

// Where a task keeps things in the memory of its thread. Made from a null base it gives the size.
template <class T>
struct TaskMemory {
  T *workspace, *support_x, *support_y, *query_x, *query_y, *theta, *g, *v, *u, *product, *tapes, *rest;
  int64_t size;

  TaskMemory(const Job<T>& job, T* base) : size(0) {
    const Program& p = *job.program;
    const bool forth = job.goal == Goal::adapt || job.goal == Goal::meta_gradient;
    const bool back = job.goal == Goal::adapt_vjp || job.goal == Goal::meta_gradient;
    const auto take = [&](int64_t elements) {
      T* at = base ? base + size : nullptr;
      size += (elements + 15) / 16 * 16;
      return at;
    };
    const auto elements = [](const Grid& g, int n) { return static_cast<int64_t>(n) * g.h * g.w * g.ld; };
    workspace = take(Core<T>::workspace_size(p));
    support_x = take(elements(p.input, job.support.n));
    support_y = take(job.support.targets ? elements(p.out, job.support.n) : 0);
    query_x = take(elements(p.input, job.query.n));
    query_y = take(job.query.targets ? elements(p.out, job.query.n) : 0);
    theta = take((forth ? job.steps + 1 : 1) * p.size);
    g = take((job.goal == Goal::meta_gradient && job.needs_lr ? job.steps : 1) * p.size);
    v = take(p.size);
    u = take(p.size);
    product = take(p.size);
    const int64_t scratch = back ? job.taped->scratch : 0;
    tapes = take(job.taped ? (job.keep ? job.steps : 1) * job.taped->tape : 0);
    rest = take(job.plain && job.plain->tape > scratch ? job.plain->tape : scratch);  // never alive together
  }
};

template <class T>
class Task {
  using M = Core<T>;

 public:
  Task(const Job<T>& job, T* base, Trace* trace)
      : job(job),
        program(*job.program),
        mem(job, base),
        machine(program, mem.workspace),
        sweep(machine, program, job.constants),
        support{},
        query{} {
    machine.trace = trace;
  }

  void run(int64_t task, T* sums, T* lr_sums) {
    t = task;
    if (machine.trace) machine.trace->task = static_cast<int32_t>(t);
    machine.begin(What::load, 0);
    support = import_batch(job.support, mem.support_x, mem.support_y);
    query = import_batch(job.query, mem.query_x, mem.query_y);
    machine.end();
    switch (job.goal) {
      case Goal::predict:
        return predict();
      case Goal::loss_and_grad:
        return loss_and_grad();
      case Goal::adapt:
        return adapt();
      case Goal::adapt_vjp:
        return adapt_vjp(lr_sums);
      case Goal::meta_gradient:
        return meta_gradient(sums, lr_sums);
    }
  }

 private:
  void predict() {
    load_params(job.params, mem.theta);
    const Tape<T> tape{job.plain, mem.rest, nullptr};
    machine.begin(What::query, job.step);
    sweep.forward(tape, query, mem.theta, job.step);
    export_outputs(tape);
    machine.end();
  }

  void loss_and_grad() {
    load_params(job.params, mem.theta);
    clear(mem.v);
    job.losses[t] = static_cast<T>(query_pass(mem.theta, job.step, mem.v, true));
    export_params(mem.v, job.inner, job.n_params, job.grads + t * job.n_params);
  }

  void adapt() {
    load_params(job.params, mem.theta);
    inner_loop();
    for (int s = 0; s <= job.steps; ++s) {
      export_params(theta(s), job.inner, job.n_params, job.trajectory + (s * job.tasks + t) * job.n_params);
    }
  }

  void adapt_vjp(T* lr_sums) {
    import_user(job.v, job.v_everywhere ? job.steps : 0, mem.v);
    for (int s = job.steps - 1; s >= 0; --s) {
      machine.begin(What::reverse_step, s);
      import_user(job.trajectory, s, mem.theta);
      if (!job.first_order || job.needs_lr) {
        clear(mem.g);
        support_pass(mem.tapes, mem.theta, s, mem.g);
      }
      reverse_step(s, mem.tapes, mem.theta, mem.g, lr_sums);
      machine.end();
      if (!job.v_everywhere) continue;
      import_user(job.v, s, mem.u);
      add(mem.v, 1, mem.u);
    }
    export_params(mem.v, job.inner, job.n_params, job.grads + t * job.n_params);
  }

  void meta_gradient(T* sums, T* lr_sums) {
    load_params(job.params, mem.theta);
    inner_loop();
    clear(mem.v);
    double loss = 0;
    for (int s = job.steps; s >= 0; --s) {
      if (s == job.steps && job.weights[s] == 1) {
        loss += query_pass(theta(s), s, mem.v, true);
      } else if (job.weights[s] != 0 || s == job.steps) {
        clear(mem.product);
        loss += job.weights[s] * query_pass(theta(s), s, mem.product, s == job.steps);
        add(mem.v, static_cast<T>(job.weights[s]), mem.product);
      }
      if (s == 0) break;
      const int step = s - 1;
      machine.begin(What::reverse_step, step);
      const bool stale = !job.keep && s < job.steps;
      if (stale && !job.first_order) support_pass(tape(step), theta(step), step, nullptr);
      reverse_step(step, tape(step), theta(step), gradient(step), lr_sums);
      machine.end();
    }
    job.losses[t] = static_cast<T>(loss);
    add(sums, 1, mem.v);
  }

  // theta_{s+1} = theta_s - alpha_s g_s
  void inner_loop() {
    for (int s = 0; s < job.steps; ++s) {
      machine.begin(What::inner_step, s);
      T* g = gradient(s);
      clear(g);
      support_pass(tape(s), theta(s), s, g);
      const T *alpha = rate(s), *from = theta(s);
      T* to = theta(s + 1);
      machine.each(program.size,
                   [=](long i) { M::store(to + i, M::load(from + i) - M::load(alpha + i) * M::load(g + i)); });
      machine.end();
    }
  }

  // d alpha_s = -g_s v;  v <- v - H_s (alpha_s v)
  void reverse_step(int s, T* tape, const T* at, const T* g, T* lr_sums) {
    const T* alpha = rate(s);
    T *v = mem.v, *u = mem.u;
    if (job.needs_lr) {
      T* out = lr_sums + row(s) * program.size;
      machine.each(program.size,
                   [=](long i) { M::store(out + i, M::load(out + i) - M::load(g + i) * M::load(v + i)); });
    }
    if (job.first_order) return;
    machine.each(program.size, [=](long i) { M::store(u + i, -M::load(alpha + i) * M::load(v + i)); });
    sweep.hessian_times({job.taped, tape, mem.rest}, support, at, u, s, v);
  }

  void support_pass(T* memory, const T* at, int step, T* g) {
    const Tape<T> tape{job.taped, memory, nullptr};
    sweep.forward(tape, support, at, step);
    sweep.loss(tape, support);
    sweep.backward(tape, support, at, step, g, false);
  }

  double query_pass(const T* at, int step, T* g, bool wants_outputs) {
    machine.begin(What::query, step);
    const Tape<T> tape{job.plain, mem.rest, nullptr};
    sweep.forward(tape, query, at, step);
    const double loss = sweep.loss(tape, query);
    if (wants_outputs) export_outputs(tape);
    sweep.backward(tape, query, at, step, g, true);
    machine.end();
    return loss;
  }

  Batch<T> import_batch(const Samples<T>& samples, T* x, T* y) const {
    if (!samples.x) return {};
    const Grid& g = program.input;
    const int h = g.h - 2 * program.border_y, w = g.w - 2 * program.border_x;
    import_images(samples.x + t * samples.n * g.c * h * w, samples.n, g, program.border_y, program.border_x, x);
    if (!samples.targets) return {x, samples.labels ? samples.labels + t * samples.n : nullptr, nullptr};
    const Grid& out = program.out;
    import_images(samples.targets + t * samples.n * out.c * out.h * out.w, samples.n, out, 0, 0, y);
    return {x, nullptr, y};
  }

  void export_outputs(const Tape<T>& tape) const {
    const Grid& out = program.out;
    const int64_t size = static_cast<int64_t>(job.query.n) * out.c * out.h * out.w;
    export_images(sweep.outputs(tape, query), job.query.n, out, job.outputs + t * size);
  }

  void load_params(const T* params, T* to) const {
    if (job.params_per_task) {
      import_params(params + t * job.n_params, job.inner, job.n_params, program.size, to);
    } else {
      std::memcpy(to, params, program.size * sizeof(T));
    }
  }

  void import_user(const T* rows, int s, T* to) const {
    import_params(rows + (s * job.tasks + t) * job.n_params, job.inner, job.n_params, program.size, to);
  }

  void clear(T* x) const { std::memset(x, 0, program.size * sizeof(T)); }
  void add(T* to, T scale, const T* x) const {
    machine.each(program.size, [=](long i) { M::put(to + i, M::load(x + i) * scale, true); });
  }

  int row(int s) const { return s < job.lr_rows ? s : job.lr_rows - 1; }
  const T* rate(int s) const { return job.alpha + row(s) * program.size; }
  T* theta(int s) const { return mem.theta + s * program.size; }
  T* gradient(int s) const { return mem.g + (job.needs_lr && job.goal == Goal::meta_gradient ? s : 0) * program.size; }
  T* tape(int s) const { return mem.tapes + (job.keep ? s : 0) * job.taped->tape; }

  const Job<T>& job;
  const Program& program;
  TaskMemory<T> mem;
  M machine;
  Sweep<M> sweep;
  Batch<T> support, query;
  int64_t t;
};

}  // namespace METAFAST_NAMESPACE
