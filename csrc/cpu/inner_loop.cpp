// The inner loop of a range of tasks on one core. Built once for each instruction set.
#include "isa.h"
#include "task.h"

namespace METAFAST_NAMESPACE {
namespace {

template <class T>
int64_t memory(const Job<T>& job) {
  return TaskMemory<T>(job, nullptr).size;
}

template <class T>
void run(const Job<T>& job, int64_t chunk, int64_t* next, T* base, Trace* trace) {
  const int64_t size = job.program->size;
  Task<T> task(job, base, trace);
  // Not std::atomic: its inline functions, compiled for these instructions, might be linked into code for others.
  const auto take = [=] { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); };
  for (int64_t k = take(); k * chunk < job.tasks; k = take()) {
    const int64_t end = (k + 1) * chunk < job.tasks ? (k + 1) * chunk : job.tasks;
    T* const sums = job.sums ? job.sums + k * size : nullptr;
    T* const lr_sums = job.lr_sums ? job.lr_sums + k * job.lr_rows * size : nullptr;
    if (sums) std::memset(sums, 0, size * sizeof(T));
    if (lr_sums) std::memset(lr_sums, 0, job.lr_rows * size * sizeof(T));
    for (int64_t t = k * chunk; t < end; ++t) task.run(t, sums, lr_sums);
  }
}

template <class T>
constexpr Isa<T> build() {
  return {{Simd<T>::lanes, Direct<T>::panel}, memory<T>, run<T>};
}

}  // namespace

Isa<float> float_isa() { return build<float>(); }
Isa<double> double_isa() { return build<double>(); }

}  // namespace METAFAST_NAMESPACE
