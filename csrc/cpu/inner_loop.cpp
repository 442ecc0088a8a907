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
void run(const Job<T>& job, int64_t chunk, int64_t begin, int64_t end, T* base, Trace* trace) {
  const int64_t size = job.program->size;
  Task<T> task(job, base, trace);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t k = t / chunk;
    task.run(t, job.sums ? job.sums + k * size : nullptr, job.lr_sums ? job.lr_sums + k * job.lr_rows * size : nullptr);
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
