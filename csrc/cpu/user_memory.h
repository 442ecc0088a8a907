// What lies in the user's memory of one task, or of those that run at once: samples, outputs, parameters and states.
#pragma once
#include "../core/pass.h"
#include "transfer.h"

namespace METAFAST_NAMESPACE {

template <class M>
class UserMemory {
  using T = typename M::Real;

 public:
  int64_t t = 0;  // the task

  UserMemory(const Job<T>& job, const M& machine) : job(job), program(*job.program), machine(machine) {}

  // Loads a row of sets of samples. A barrier must follow.
  LoadedSamples<T> load_samples(const Samples<T>& samples, int64_t row, T* x, T* y, T* yd) const {
    if (!samples.x) return {};
    const int n = static_cast<int>(count(samples, row));
    const int64_t first = row * samples.n, next = job.task_stride * samples.n;
    const Share mine = machine.share(n);
    const auto load = [&](const T* from, const Grid& grid, int border_y, int border_x, T* to) -> const T* {
      const int64_t sample = static_cast<int64_t>(grid.c) * (grid.h - 2 * border_y) * (grid.w - 2 * border_x);
      from += first * sample;
      // Vectors without padding lie as they are read.
      if (M::tasks == 1 && grid.h * grid.w == 1 && sample == grid.ld) return from;
      const int64_t image = static_cast<int64_t>(grid.h) * grid.w * grid.ld;
      import_images<M::tasks>(from + mine.first * sample, next * sample, static_cast<int>(mine.end - mine.first), grid,
                              border_y, border_x, to + mine.first * image);
      return to;
    };
    LoadedSamples<T> found{};
    found.x = load(samples.x, program.input, program.border_y, program.border_x, x);
    found.labels = samples.labels ? samples.labels + first : nullptr;
    if (samples.targets) found.targets = load(samples.targets, program.out, 0, 0, y);
    if (samples.d_targets) found.d_targets = load(samples.d_targets, program.out, 0, 0, yd);
    found.label_stride = next;
    return found;
  }

  // Writes zeros behind the samples of a task that has fewer, and where there is nothing to export.
  void export_outputs(const T* from, const Samples<T>& samples, T* to) const {
    const Grid& out = program.out;
    const int64_t size = static_cast<int64_t>(out.c) * out.h * out.w, n = from ? count(samples, t) : 0;
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

  // z_0: the state begins with numbers, or is given with the parameters.
  void load_start(T* z) const {
    const int K = job.rule.states;
    if (job.params_per_task && K > 0) return import_z(job.params, 0, z);
    load_params(job.params, z);
    for (int k = 0; k < K; ++k) {
      const auto value = M::broadcast(static_cast<T>(job.rule.start[k]));
      T* const to = z + (k + 1) * program.size;
      machine.each(program.size, [=](long i) { M::store(to + i, value); });
    }
  }

  void import_z(const T* rows, int s, T* z) const {
    for (int k = 0; k <= job.rule.states; ++k) import_user(rows, s, z + k * program.size, k);
  }
  void import_adjoint(int s, T* of_theta, T* of_state) const {
    import_user(job.v, s, of_theta, 0);
    for (int k = 0; k < job.rule.states; ++k) import_user(job.v, s, of_state + k * program.size, k + 1);
  }
  void export_z(const T* z, T* rows, int s) const {
    for (int k = 0; k <= job.rule.states; ++k) export_user(z + k * program.size, rows, s, k);
  }

  void import_user(const T* rows, int s, T* to, int k = 0) const {
    const T* const from = rows + of_user(s, k);
    machine.once([&] { import_params<M::tasks>(from, next_user(), job.inner, job.n_params, program.size, to); });
  }

  void export_user(const T* from, T* rows, int s, int k = 0) const {
    if (machine.leads()) export_params<M::tasks>(from, job.inner, job.n_params, rows + of_user(s, k), next_user());
  }

 private:
  static int64_t count(const Samples<T>& samples, int64_t row) {
    return samples.counts ? samples.counts[row] : samples.n;
  }

  // The part k of a vector (1 + K) P of this task, in a row of such vectors of all tasks.
  int64_t of_user(int s, int k) const { return ((s * job.tasks + t) * (1 + job.rule.states) + k) * job.n_params; }
  int64_t next_user() const { return job.task_stride * (1 + job.rule.states) * job.n_params; }

  const Job<T>& job;
  const Program& program;
  const M& machine;
};

}  // namespace METAFAST_NAMESPACE
