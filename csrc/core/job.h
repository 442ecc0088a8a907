// One call of an executor function for a batch of tasks: where everything lies. Data only, as program.h.
#pragma once
#include "program.h"

namespace metafast {

enum class Goal : int32_t { predict, loss_and_grad, adapt, adapt_vjp, meta_gradient, jvp, hvp };

// Samples of all tasks as the user holds them: x [T, n, C, H, W], labels [T, n] or targets [T, n, ...]. Where tasks
// have fewer than n samples, `counts` [T] says how many; theirs come first.
template <class T>
struct Samples {
  int32_t n;
  const T* x;
  const int64_t* labels;
  const T *targets, *d_targets;
  const int64_t* counts;
};

// The pass of each task, by its number of samples, and the elements that the largest one takes.
struct TaskPassLayouts {
  const PassLayout* const* of;  // [T]; null: there is no such pass
  int64_t tape, scratch;
};

template <class T>
struct Job {
  Goal goal;
  const Program* program;
  TaskPassLayouts support_layouts;  // of the passes over the support set, whose tangents may follow
  TaskPassLayouts query_layouts;    // of those over the query set, which are over when their gradient is there
  const int32_t* inner;             // [P]: where an element of the user's flat vector lies in the inner one
  int64_t n_params, tasks;
  int32_t steps, lr_rows;                   // later steps use the last row of learning rates
  int64_t task_stride;                      // from a task to the next of those that run at once
  int32_t step;                             // of a single pass: the inner step that it belongs to
  bool first_order, needs_lr, keeps_tapes;  // keeps_tapes: every step has a tape of its own
  const T* constants;
  const T* params;  // one vector as the machine loads it, or (params_per_task) the user's layout [T, P]
  bool params_per_task;
  const T* alpha;         // inner layout [lr_rows, size], zero where a parameter is not adapted
  const double* weights;  // [steps + 1]: of the query loss at each theta_s
  Samples<T> support, query;
  T *losses, *outputs, *tangents;  // [T]; [T, n, ...] in the user's layout
  T* trajectory;                   // [steps + 1, T, P], the user's layout
  const T* v;                      // likewise, or [T, P] of the last step only; of a single pass: the direction
  bool v_everywhere;
  T *grads, *products;  // [T, P], the user's layout
  T* sums;              // inner layout, one vector for each chunk of tasks; the run clears them
  T* lr_sums;           // inner layout, [lr_rows, size] likewise
};

}  // namespace metafast
