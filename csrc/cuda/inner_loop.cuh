// One task's whole way through a block: S inner steps, then back from theta_S to theta_0. At each theta on the way back
// its own loss on the query set joins the adjoint v, and the step before it is taken in reverse. Where steps are those
// of a rule, z is theta and the K vectors of the state behind it, and w has the adjoints of these. A single product
// with a Hessian is the way back through one step whose direction is given.
#pragma once
#include "../core/pass.h"
#include "contract.cuh"
#include "parameter_machine.cuh"

// In a kernel by rules, which a compiler would leave in parts, a call would put the run into local memory.
#ifdef __CUDACC__
#define METAFAST_INLINED __forceinline__
#else
#define METAFAST_INLINED
#endif

namespace METAFAST_NAMESPACE {

template <class T, class Cluster, bool by_rule>
class InnerLoopRun {
  using M = BlockMachine<T, Cluster>;
  enum class Stage { adapt, query, reverse };

 public:
  METAFAST_DEVICE InnerLoopRun(const BlockJob<T>& job, const Cluster& cluster, int threads, T* base, int64_t block)
      : job(job),
        program(program_of(job.tables)),
        cluster(cluster),
        base(base),
        machine(cluster, job.precision, threads, base + job.memory.partials, base + job.memory.common),
        outer(job.tables.outer + cluster.rank() * program.size),
        block(block),
        sums(job.sums ? job.sums + block * program.size : nullptr),
        history(job.history ? job.history + block * job.steps * job.memory.record : nullptr) {}

  // The tasks of this block, in turns: each sums the same ones on every run.
  METAFAST_INLINED METAFAST_DEVICE void run(int64_t blocks) {
    if (sums) machine.each(program.size, [&](long i) { sums[i] = 0; });
    for (int s = 0; job.rate_sums && s < job.rate_rows; ++s) {
      machine.each(job.rate_width > 1 ? program.size : 1, [&](long i) { rate_sums(s)[i] = 0; });
    }
    if (by_rule && job.number_sums) {
      machine.each(job.rate_rows * job.rule.names, [&](long i) { number_sums()[i] = 0; });
    }
    for (int64_t task = block / cluster.size(); task < job.tasks; task += blocks / cluster.size()) run_task(task);
  }

 private:
  METAFAST_INLINED METAFAST_DEVICE void run_task(int64_t task) {
    t = task;
    start();
    const int S = job.steps;
    const bool adapts = job.goal == Goal::adapt || job.goal == Goal::meta_gradient;
    const int end = job.goal == Goal::adapt ? S : 3 * S + 1;
    for (int k = adapts ? 0 : S + (job.goal == Goal::hvp); k < end; ++k) {
      const int down = k - S;
      const Stage stage = down < 0 ? Stage::adapt : down % 2 ? Stage::reverse : Stage::query;
      const int s = down < 0 ? k : S - (down + 1) / 2;
      const T weight = stage == Stage::query && job.weights ? static_cast<T>(job.weights[s]) : T(1);
      if (stage == Stage::reverse) fetch(s);
      if (stage != Stage::query) load_support(s);
      if (has_pass(stage, s, weight)) {
        const double value = run_pass(stage, s);
        if (stage == Stage::query) loss += weight * static_cast<T>(value);
      }
      if (stage == Stage::adapt) {
        adapt_step(s);
      } else if (stage == Stage::query) {
        join_adjoint(s, weight);
      } else {
        reverse_step(s);
      }
    }
    finish();
  }

  METAFAST_DEVICE void start() {
    const BlockMemory& m = job.memory;
    loaded = -1;
    query = load_samples(job.query, t, m.query_x, m.query_y, m.query_labels);
    loss = 0;
    if (job.goal != Goal::adapt && job.goal != Goal::predict) {
      clear(at(m.v));
      for (int k = 0; k < states(); ++k) clear(at(m.w) + k * program.size);
    }
    if (job.goal == Goal::adapt_vjp) return;
    load_start();
    if (job.goal == Goal::adapt) store_z(0);
    if (job.goal == Goal::hvp) {
      load_params(job.v + t * job.n_params, at(m.u));
      machine.each(program.size, [&](long i) {
        if (outer[i] < 0) M::store(at(m.u) + i, 0);
      });
    }
  }

  // theta_0, with the state as it begins, or z_0.
  METAFAST_DEVICE void load_start() {
    const bool has_states = by_rule && job.params_per_task;
    const int64_t row = job.params_per_task ? t : 0, parts = has_states ? 1 + states() : 1;
    for (int k = 0; k < parts; ++k) load_params(job.params + (row * parts + k) * job.n_params, part(theta(0), k));
    for (int k = 0; k < states() && !has_states; ++k) {
      machine.each(program.size,
                   [&](long i) { M::store(part(theta(0), k + 1) + i, static_cast<T>(job.rule.start[k])); });
    }
  }

  // The support samples of step s, where they are not there.
  METAFAST_DEVICE void load_support(int s) {
    const int64_t row = (by_rule && job.support.each_step ? s * job.tasks : 0) + t;
    if (row == loaded) return;
    const BlockMemory& m = job.memory;
    support = load_samples(job.support, row, m.support_x, m.support_y, m.support_labels);
    loaded = row;
  }

  // Their pointers lead into the job, which a GPU has in its constant bank; by value, to stay in registers.
  static METAFAST_DEVICE Program program_of(const BlockTables& tables) {
    Program program = tables.program;
    program.ops = tables.ops;
    return program;
  }
  static METAFAST_DEVICE PassLayout layout_of(const PassTables& t) {
    return {t.n, t.value, t.adjoint, t.saved, t.tangent, t.d_adjoint, t.tape, t.scratch};
  }

  METAFAST_DEVICE bool has_pass(Stage stage, int s, T weight) const {
    const bool vjp = job.goal == Goal::adapt_vjp;
    if (stage == Stage::query) return !vjp && (weight != 0 || s == job.steps);
    if (stage == Stage::reverse) return job.goal == Goal::hvp || (vjp && (!job.first_order || job.needs_gradient));
    return true;
  }

  // The loss and its gradient, on the query set in that stage and on the support set in the others; only outputs where
  // these are the goal.
  METAFAST_DEVICE double run_pass(Stage stage, int s) {
    const BlockMemory& m = job.memory;
    const bool is_query = stage == Stage::query;
    const LoadedSamples<T> samples{is_query ? query.x : support.x, is_query ? query.labels : support.labels,
                                   is_query ? query.targets : support.targets};
    const Pass<M> pass(machine, program, nullptr);
    const PassLayout layout = layout_of(is_query ? job.tables.query_layout : job.tables.support_layout);
    const Tape<T> tape{&layout, is_query ? at(m.rest) : tape_of(s), nullptr};
    const int step = number(s);
    const bool predicts = job.goal == Goal::predict;
    T* grad = is_query ? at(m.u) : stage == Stage::reverse && !job.needs_gradient ? nullptr : gradient(s);
    if (grad && !predicts) machine.ahead([&] { clear(grad); });
    pass.forward(tape, samples, theta(s), step);
    if (is_query && s == job.steps && cluster.rank() == 0) store_outputs(pass.outputs(tape, samples));
    if (predicts) return 0;
    // Of the support set only what the loss leaves for its gradient is wanted.
    const double value = is_query || saves(program.loss) ? pass.loss(tape, samples) : 0;
    pass.backward(tape, samples, theta(s), step, grad, is_query);
    return value;
  }

  // theta_{s+1} = theta_s - alpha_s g_s
  METAFAST_DEVICE void adapt_step(int s) {
    if (history) keep(s);
    const T *from = theta(s), *g = gradient(s);
    T* to = theta(s + 1);
    if constexpr (by_rule) {
      const auto parameters = this->parameters();
      steps_of(parameters).advance(number(s), from, g, to);
    } else {
      step_along(s, from, g, to);
    }
    if (job.goal == Goal::adapt) store_z(s + 1);
  }

  METAFAST_DEVICE void step_along(int s, const T* from, const T* g, T* to) const {
    machine.each4(program.size, [&](long i) {
      const Quad<T> alpha = rates(s, i), step = M::load4(g + i);
      Quad<T> theta = M::load4(from + i);
      for (int j = 0; j < 4; ++j) theta.of[j] -= alpha.of[j] * step.of[j];
      M::store4(to + i, theta);
    });
  }

  // What reaches theta_s other than through the steps behind it.
  METAFAST_DEVICE void join_adjoint(int s, T weight) {
    T* v = at(job.memory.v);
    if (job.goal == Goal::adapt_vjp) {
      if (s < job.steps && !job.v_everywhere) return;
      const int64_t row = (job.v_everywhere ? s : 0) * job.tasks + t;
      for (int k = 0; k <= states(); ++k) {
        const T* given = job.v + (row * (1 + states()) + k) * job.n_params;
        T* to = k == 0 ? v : at(job.memory.w) + (k - 1) * program.size;
        machine.each(job.n_params, [&](long i) {
          const int64_t place = place_of(i);
          if (place >= 0) M::put(to + place, given[i], true);
        });
      }
    } else if (has_pass(Stage::query, s, weight) && job.goal != Goal::predict) {
      const T* grad = at(job.memory.u);
      machine.each4(program.size, [&](long i) {
        Quad<T> sum = M::load4(v + i);
        sum.add(weight, M::load4(grad + i));
        M::store4(v + i, sum);
      });
    }
  }

  // d alpha_s = -g_s v;  v <- v + H_s u,  u = -alpha_s v: what the rules add goes straight into v.
  METAFAST_DEVICE void reverse_step(int s) {
    const BlockMemory& m = job.memory;
    T *v = at(m.v), *u = at(m.u);
    if (job.goal != Goal::hvp) {
      if constexpr (by_rule) {
        const auto parameters = this->parameters();
        T* const sums = nullptr;
        steps_of(parameters).back(number(s), theta(s), gradient(s), v, at(m.w), u, {number_sums(), sums, 0});
      } else {
        if (job.learns_rates) add_rate_adjoint(s, gradient(s), v);
        if (!job.first_order) turn_around(s, v, u);
      }
    }
    if (job.first_order) return;
    const PassLayout layout = layout_of(job.tables.support_layout);
    Pass<M>(machine, program, nullptr).hvp({&layout, tape_of(s), at(m.rest)}, support, theta(s), u, number(s), v);
  }

  // u = -alpha_s v
  METAFAST_DEVICE void turn_around(int s, const T* v, T* u) const {
    machine.each4(program.size, [&](long i) {
      Quad<T> step = rates(s, i);
      const Quad<T> adjoint = M::load4(v + i);
      for (int j = 0; j < 4; ++j) step.of[j] *= -adjoint.of[j];
      M::store4(u + i, step);
    });
  }

  // The block as a Machine for rules, and what takes steps on it.
  METAFAST_DEVICE ParameterMachine<T, Cluster> parameters() const {
    return {machine, program.size, program.common, base + job.memory.partials};
  }
  METAFAST_DEVICE RuleStep<ParameterMachine<T, Cluster>> steps_of(const ParameterMachine<T, Cluster>& on) const {
    return {on, job.rule, program.size, job.rate_rows, nullptr};
  }

  METAFAST_DEVICE void add_rate_adjoint(int s, const T* g, const T* v) const {
    T* out = rate_sums(s);
    if (job.rate_width > 1) {
      machine.each(program.size, [&](long i) { out[i] -= M::load(g + i) * M::load(v + i); });
      return;
    }
    const int64_t first = owned_from();
    const T sum =
        machine.total(program.size - first, [&](long i) { return M::load(g + first + i) * M::load(v + first + i); });
    machine.each(1, [&](long) { *out -= sum; });
  }

  METAFAST_DEVICE void finish() const {
    const T* v = at(job.memory.v);
    machine.together([&] {
      if (job.losses && cluster.rank() == 0) machine.each(1, [&](long) { job.losses[t] = loss; });
      for (int k = 0; job.grads && k <= states(); ++k) {
        const T* from = k == 0 ? v : at(job.memory.w) + (k - 1) * program.size;
        store_params(from, job.grads + (t * (1 + states()) + k) * job.n_params);
      }
      if (sums) machine.each(program.size, [&](long i) { sums[i] += M::load(v + i); });
    });
  }

  METAFAST_DEVICE void keep(int s) const {
    T* to = history + static_cast<int64_t>(s) * job.memory.record;
    const T* from = at(job.memory.record_at);
    machine.each4(job.memory.record, [&](long i) { *global4(to + i) = M::load4(from + i); });
  }

  // theta_s, with its tape and its gradient where they are not here for all steps.
  METAFAST_DEVICE void fetch(int s) {
    if (job.goal == Goal::adapt_vjp) {
      for (int k = 0; k <= states(); ++k) load_params(job.trajectory + of_user(s, k), part(theta(s), k));
    } else if (history) {
      const T* from = history + static_cast<int64_t>(s) * job.memory.record;
      T* to = at(job.memory.record_at);
      machine.each4(job.memory.record, [&](long i) { M::store4(to + i, *global4(from + i)); });
    }
  }

  // [n, C, H, W] as [n, H, W, features padded to quads]. A label outside the classes makes its sample NaN, and with it
  // the loss and the gradients of its task.
  METAFAST_DEVICE LoadedSamples<T> load_samples(const Samples<T>& samples, int64_t row, int x_at, int y_at,
                                                int labels_at) const {
    if (!samples.x) return {};
    T *x = at(x_at), *y = samples.targets ? at(y_at) : nullptr;
    load_grid(samples.x, row, samples.n, program.input, x);
    if (y) load_grid(samples.targets, row, samples.n, program.out, y);
    if (!samples.labels) return {x, nullptr, y};
    auto* labels = reinterpret_cast<int64_t*>(at(labels_at));
    const int64_t* given = samples.labels + row * samples.n;
    const long sample = static_cast<long>(program.input.h) * program.input.w * program.input.ld;
    machine.each(samples.n, [&](long s) {
      const bool known = given[s] >= 0 && given[s] < program.out.c;
      M::store_one(labels + s, known ? given[s] : int64_t{0});
      if (!known) M::store(x + s * sample, NAN);
    });
    return {x, labels, nullptr};
  }

  METAFAST_DEVICE void load_grid(const T* from, int64_t row, int n, const Grid& g, T* to) const {
    const int pixels = g.h * g.w;
    const T* mine = from + row * n * g.c * pixels;
    machine.each(static_cast<long>(n) * pixels * g.ld, [&](long i) {
      const int channel = static_cast<int>(i) % g.ld, pixel = static_cast<int>(i) / g.ld;
      const int source = (pixel / pixels * g.c + channel) * pixels + pixel % pixels;
      M::store(to + i, channel < g.c ? mine[source] : T(0));
    });
  }

  METAFAST_DEVICE void store_outputs(const T* from) const {
    const Grid& g = program.out;
    const int pixels = g.h * g.w, size = job.query.n * g.c * pixels;
    T* to = job.outputs + t * size;
    machine.each(size, [&](long i) {
      const int pixel = static_cast<int>(i) % pixels, channel = static_cast<int>(i) / pixels % g.c;
      to[i] = M::load(from + (static_cast<int>(i) / pixels / g.c * pixels + pixel) * g.ld + channel);
    });
  }

  METAFAST_DEVICE void load_params(const T* flat, T* to) const {
    clear(to);
    machine.each(job.n_params, [&](long i) {
      const int64_t place = place_of(i);
      if (place >= 0) M::store(to + place, flat[i]);
    });
  }

  METAFAST_DEVICE void store_z(int s) const {
    for (int k = 0; k <= states(); ++k) store_params(part(theta(s), k), job.trajectory + of_user(s, k));
  }

  METAFAST_DEVICE void store_params(const T* from, T* flat) const {
    machine.each(job.n_params, [&](long i) {
      const int64_t place = place_of(i);
      if (place >= owned_from()) flat[i] = M::load(from + place);
    });
  }

  METAFAST_DEVICE void clear(T* x) const {
    machine.each4(program.size, [&](long i) { M::store4(x + i, {}); });
  }

  // alpha_s, zero where a parameter is not adapted.
  METAFAST_DEVICE Quad<T> rates(int s, long i) const {
    const auto index = *global4(outer + i);
    const T* rates = job.rates + row(s) * job.rate_width;
    Quad<T> alpha;
    for (int j = 0; j < 4; ++j) alpha.of[j] = index.of[j] < 0 ? T(0) : rates[job.rate_width > 1 ? index.of[j] : 0];
    return alpha;
  }

  METAFAST_DEVICE int number(int s) const { return static_cast<int>(job.first) + s; }
  METAFAST_DEVICE int row(int s) const { return number(s) < job.rate_rows ? number(s) : job.rate_rows - 1; }

  // Of a rule's state; the part k of z; where it lies in the user's z of all tasks after s steps.
  METAFAST_DEVICE int states() const { return by_rule ? job.rule.states : 0; }
  METAFAST_DEVICE T* part(T* z, int k) const { return z + k * program.size; }
  METAFAST_DEVICE int64_t of_user(int s, int k) const {
    return ((s * job.tasks + t) * (1 + states()) + k) * job.n_params;
  }

  // Where this block sums the adjoints of a rule's numbers: [rate_rows, H]; null: they are not wanted.
  METAFAST_DEVICE double* number_sums() const {
    return job.number_sums ? job.number_sums + block * job.rate_rows * job.rule.names : nullptr;
  }

  // Where the adjoints of the rates of step s are summed: a row of the inner vectors of all blocks of the cluster, or
  // one element for each block.
  METAFAST_DEVICE T* rate_sums(int s) const {
    if (job.rate_width == 1) return job.rate_sums + block * job.rate_rows + row(s);
    const int64_t rows_before = block / cluster.size() * job.rate_rows + row(s);
    return job.rate_sums + (rows_before * cluster.size() + cluster.rank()) * program.size;
  }

  // Where in this block an element of the user's vector lies; negative: in another one.
  METAFAST_DEVICE int64_t place_of(long i) const {
    const int32_t place = job.tables.inner[i];
    if (Cluster::single || place < program.common) return place;
    const int64_t here = place - cluster.rank() * program.size;
    return here < program.size ? here : -1;
  }

  // What all blocks have alike counts once, where it is added up or stored.
  METAFAST_DEVICE int64_t owned_from() const { return cluster.rank() == 0 ? 0 : program.common; }

  METAFAST_DEVICE T* at(int32_t place) const { return base + place; }
  METAFAST_DEVICE T* theta(int s) const { return at(job.memory.theta + s * job.memory.theta_step); }
  METAFAST_DEVICE T* gradient(int s) const { return at(job.memory.g + s * job.memory.g_step); }
  METAFAST_DEVICE T* tape_of(int s) const { return at(job.memory.tape + s * job.memory.tape_step); }

  const BlockJob<T>& job;
  const Program program;
  Cluster cluster;
  T* base;
  M machine;
  const int32_t* outer;
  int64_t block;
  T *sums, *history;
  LoadedSamples<T> support, query;
  int64_t t, loaded;  // the task, and the row of samples that `support` holds
  T loss;
};

}  // namespace METAFAST_NAMESPACE
