// The two ways to run a job: on a device, and on the CPU by the same code (the twin).
#pragma once
#include "block_job.h"

namespace metafast {

// Where a device's work goes, as torch holds it.
struct Queue {
  int32_t device;
  int64_t stream;
};

// out[r][j] = scale * sum over `count` parts of part[r * columns + (index ? index[j] : j)], parts `stride` apart: for
// the sums that blocks hold, in a fixed order.
template <class T>
struct Sum {
  const T* parts;
  int64_t count, stride, rows, columns;
  const int32_t* index;
  int64_t width;  // of a row of `out`
  T scale;
  T* out;
};

// Are its steps those of a rule? They have a kernel of their own.
template <class T>
bool takes_a_rule(const BlockJob<T>& job) {
  return job.rule.kind != StepKind::plain;
}

// Each throws std::runtime_error with the launch's name and shape where the device reports an error.
void cuda_upload(void* to, const void* from, int64_t bytes, Queue queue);
void cuda_run(const BlockJob<float>& job, const BlockShape& shape, Queue queue);
void cuda_sum(const Sum<float>& sum, Queue queue);

template <class T>
void twin_run(const BlockJob<T>& job, const BlockShape& shape);
template <class T>
void twin_sum(const Sum<T>& sum);

}  // namespace metafast
