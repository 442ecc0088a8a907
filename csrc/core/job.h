// One call of an executor function for a batch of tasks: where everything lies. Data only, as program.h.
#pragma once
#include "program.h"

namespace metafast {

enum class Goal : int32_t { predict, loss_and_grad, adapt, adapt_vjp, meta_gradient };

// Samples of all tasks as the user holds them: x [T, n, C, H, W], labels [T, n] or targets [T, n, ...].
template <class T>
struct Samples {
  int32_t n;
  const T* x;
  const int64_t* labels;
  const T* targets;
};

template <class T>
struct Job {
  Goal goal;
  const Program* program;
  const Pass* taped;     // a pass whose tangents follow
  const Pass* plain;     // one that is over when its gradient is there
  const int32_t* inner;  // [P]: where an element of the user's flat vector lies in the inner one
  int64_t n_params, tasks;
  int32_t steps, lr_rows;            // later steps use the last row of learning rates
  int32_t step;                      // predict, loss_and_grad: the inner step that the pass belongs to
  bool first_order, needs_lr, keep;  // keep: every step has a tape of its own
  const T* constants;
  const T* params;  // inner layout: one vector, or (params_per_task) the user's layout [T, P]
  bool params_per_task;
  const T* alpha;         // inner layout [lr_rows, size], zero where a parameter is not adapted
  const double* weights;  // [steps + 1]: of the query loss at each theta_s
  Samples<T> support, query;
  T *losses, *outputs;  // [T]; [T, n, ...] in the user's layout
  T* trajectory;        // [steps + 1, T, P], the user's layout
  const T* v;           // likewise, or [T, P] of the last step only
  bool v_everywhere;
  T* grads;    // [T, P], the user's layout
  T* sums;     // inner layout, one vector for each chunk of tasks
  T* lr_sums;  // inner layout, [lr_rows, size] likewise
};

}  // namespace metafast
