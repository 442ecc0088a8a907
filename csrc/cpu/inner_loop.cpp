// The inner loop of tasks on one core, or of one task on several. Built once for each instruction set.
#include "isa.h"
#include "inner_loop.h"

namespace METAFAST_NAMESPACE {
namespace {

template <class T>
int64_t memory(const Job<T>& job) {
  return TaskMemory<CoreMachine<T>>(job, nullptr).size;
}

// Not std::atomic: its inline functions, compiled for these instructions, might be linked into code for others.
int64_t take(int64_t* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

// Runs the tasks of chunk k one after another.
template <class T>
void run_chunk(InnerLoopRun<CoreMachine<T>>& task, const Job<T>& job, int64_t chunk, int64_t k) {
  const int64_t end = (k + 1) * chunk < job.tasks ? (k + 1) * chunk : job.tasks, size = job.program->size;
  T* const sums = job.sums ? job.sums + k * size : nullptr;
  T* const rate_sums = job.rate_sums ? job.rate_sums + k * job.rate_sum_rows * size : nullptr;
  double* const number_sums = job.number_sums ? job.number_sums + k * job.number_stride : nullptr;
  task.clear_rate_sums(rate_sums);
  for (int64_t t = k * chunk; t < end; ++t) task.run(t, {sums, rate_sums, number_sums}, t == k * chunk);
}

template <class T>
void run(const Job<T>& job, int64_t chunk, int64_t* next, T* base, Trace* trace) {
  InnerLoopRun<CoreMachine<T>> task(job, base, nullptr, {}, trace);
  for (int64_t k = take(next); k * chunk < job.tasks; k = take(next)) run_chunk(task, job, chunk, k);
}

bool runs_lanes(const Program& program) { return runs_in_lanes(program); }

// The sums of a group lie behind its memory. Where a lane has one task only, its adjoint is the sum.
template <class T>
bool sums_up(const Job<T>& job) {
  return job.sums && job.task_stride > 1;
}

template <class T>
int64_t lanes_memory(const Job<T>& job) {
  const int64_t sums = (sums_up(job) ? 1 : 0) + (job.rate_sums ? job.rate_sum_rows : 0);
  return TaskMemory<LaneMachine<T>>(job, nullptr).size + sums * job.program->size;
}

// out[i] = the sum over the lanes of pack i, in their order.
template <class T>
void fold(const T* packs, int64_t size, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t i = 0; i < size; i += lanes * lanes) {
    typename Simd<T>::Pack columns[lanes];
    Simd<T>::transposed([=](int j) { return packs + i + j * lanes; }, columns);
    for (int j = 1; j < lanes; ++j) columns[0] += columns[j];
    Simd<T>::store(out + i / lanes, columns[0]);
  }
}

template <class T>
void run_lanes(const Job<T>& job, const Groups& groups, T* base, Trace* trace) {
  constexpr int lanes = LaneMachine<T>::tasks;
  const int64_t size = job.program->size;
  InnerLoopRun<LaneMachine<T>> task(job, base, nullptr, {}, trace);
  T* const behind = base + TaskMemory<LaneMachine<T>>(job, nullptr).size;
  T* const sums = sums_up(job) ? behind : nullptr;
  T* const rate_sums = job.rate_sums ? behind + (sums ? size : 0) : nullptr;
  for (int64_t k = take(groups.next); k < groups.count; k = take(groups.next)) {
    double* const number_sums = job.number_sums ? job.number_sums + k * lanes * job.number_stride : nullptr;
    task.clear_rate_sums(rate_sums);
    for (int64_t i = 0; i < job.task_stride; ++i) {
      task.run(k * lanes * job.task_stride + i, {sums, rate_sums, number_sums}, i == 0);
    }
    if (job.sums) fold(sums ? sums : task.adjoint(), size, job.sums + k * groups.stride);
    for (int r = 0; rate_sums && r < job.rate_sum_rows; ++r) {
      fold(rate_sums + r * size, size, job.rate_sums + (k * job.rate_sum_rows + r) * groups.stride);
    }
  }
}

template <class T>
void run_as_team(const Job<T>& job, int64_t chunk, int64_t k, T* base, T* own, Member member, Trace* trace) {
  InnerLoopRun<CoreMachine<T>> task(job, base, own, member, trace);
  run_chunk(task, job, chunk, k);
}

template <class T>
int64_t team_workspace(const Job<T>& job, int64_t least) {
  const Program& p = *job.program;
  const double n = job.support.n > job.query.n ? job.support.n : job.query.n;
  double products = 0, wanted = 0;
  for (int k = 0; k < p.n_ops; ++k) {
    const Op& op = p.ops[k];
    if (!makes_products(op)) continue;
    products += n * op.y.h * op.y.w * op.y.ld * op.window.kh * op.window.kw * op.x.ld;
    wanted += least;
  }
  return products > 0 && products >= wanted ? CoreMachine<T>::workspace_size(p) : 0;
}

template <class T>
constexpr Isa<T> build() {
  constexpr int lanes = Simd<T>::lanes;
  return {{lanes, Direct<T>::panel},
          {lanes, 1, false, 1, true},
          memory<T>,
          run<T>,
          runs_lanes,
          lanes_memory<T>,
          run_lanes<T>,
          team_workspace<T>,
          run_as_team<T>};
}

}  // namespace

Isa<float> float_isa() { return build<float>(); }
Isa<double> double_isa() { return build<double>(); }

}  // namespace METAFAST_NAMESPACE
