// The inner loop of tasks on one core, or of one task on several. Built once for each instruction set.
#include "isa.h"
#include "task.h"

namespace METAFAST_NAMESPACE {
namespace {

template <class T>
int64_t memory(const Job<T>& job) {
  return TaskMemory<T>(job, nullptr).size;
}

// Chunk k of tasks, one after another.
template <class T>
void run_chunk(Task<T>& task, const Job<T>& job, int64_t chunk, int64_t k) {
  const int64_t end = (k + 1) * chunk < job.tasks ? (k + 1) * chunk : job.tasks, size = job.program->size;
  T* const sums = job.sums ? job.sums + k * size : nullptr;
  T* const lr_sums = job.lr_sums ? job.lr_sums + k * job.lr_rows * size : nullptr;
  task.clear_sums(sums, lr_sums);
  for (int64_t t = k * chunk; t < end; ++t) task.run(t, sums, lr_sums);
}

template <class T>
void run(const Job<T>& job, int64_t chunk, int64_t* next, T* base, Trace* trace) {
  Task<T> task(job, base, nullptr, {}, trace);
  // Not std::atomic: its inline functions, compiled for these instructions, might be linked into code for others.
  const auto take = [=] { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); };
  for (int64_t k = take(); k * chunk < job.tasks; k = take()) run_chunk(task, job, chunk, k);
}

template <class T>
void run_together(const Job<T>& job, int64_t chunk, int64_t k, T* base, T* own, Member member, Trace* trace) {
  Task<T> task(job, base, own, member, trace);
  run_chunk(task, job, chunk, k);
}

template <class T>
int64_t team_workspace(const Job<T>& job, int64_t least) {
  const Program& p = *job.program;
  const double n = job.support.n > job.query.n ? job.support.n : job.query.n;
  double products = 0, wanted = 0;
  for (int k = 0; k < p.n_ops; ++k) {
    const Op& op = p.ops[k];
    if (op.kind != Kind::conv2d) continue;
    products += n * op.y.h * op.y.w * op.y.ld * op.window.kh * op.window.kw * op.x.ld;
    wanted += least;
  }
  return products > 0 && products >= wanted ? Core<T>::workspace_size(p) : 0;
}

template <class T>
constexpr Isa<T> build() {
  return {{Simd<T>::lanes, Direct<T>::panel}, memory<T>, run<T>, team_workspace<T>, run_together<T>};
}

}  // namespace

Isa<float> float_isa() { return build<float>(); }
Isa<double> double_isa() { return build<double>(); }

}  // namespace METAFAST_NAMESPACE
