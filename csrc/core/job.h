// One call of an executor function for a batch of tasks: where everything lies. Data only, as program.h.
#pragma once
#include "program.h"
#include "steps/step_rule.h"

namespace metafast {

enum class Goal : int32_t { predict, loss_and_grad, adapt, adapt_vjp, meta_gradient, jvp, hvp };

// Samples of all T tasks as the user holds them. Where a task has fewer than n of them, its own come first. Where each
// inner step has samples of its own, T stands for S T below: those of all tasks for a step, then for the next.
template <class T>
struct Samples {
  int32_t n;              // samples of a task at most
  const T* x;             // [T, n, C, H, W]; null: there are none
  const int64_t* labels;  // [T, n], or null
  const T* targets;       // [T, n, ...] like the outputs, or null: targets, or the gradient of an external loss
  const T* d_targets;     // likewise: the tangent of that gradient
  const int64_t* counts;  // [T]: samples of each task; null: n
  bool each_step;         // each inner step has its own
};

// Where the passes of all tasks keep things, each by its number of samples.
struct TaskPassLayouts {
  const PassLayout* const* of;  // [T] like the samples; null: there is no such pass
  int64_t tape, scratch, kept;  // elements that the largest one takes
};

// `size` below is Program::size, P the number of parameters, S that of steps. "Inner" vectors [size] are in the layout
// of the Machine, "user's" ones [P] as Python has them.
template <class T>
struct Job {
  Goal goal;
  const Program* program;
  TaskPassLayouts support_layouts;  // of passes over the support set, which tangents may follow
  TaskPassLayouts query_layouts;    // of passes over the query set, which end with their gradient
  const int32_t* inner;             // [P]: where an element of the user's vector lies in the inner one
  int64_t n_params;                 // P
  int64_t tasks;                    // T
  int32_t steps;                    // S
  int64_t first;                    // the number of the first step: rows of rates, and what a pass is told
  int32_t rate_rows;                // rows of learning rates, one a step; later steps use the last one
  int64_t task_stride;              // from a task to the next of those that run at once in lanes
  int32_t step;                     // of a single pass: the inner step that it belongs to
  bool first_order;                 // the way back leaves the Hessian out
  bool learns_rates;                // the gradient of the learning rates is wanted
  bool one_rate;                    // and each plain step has one for all parameters
  bool needs_gradient;              // the way back reads the gradient of each step
  int32_t begin;                    // the first step that the way back goes through
  bool judges_before;               // query losses count that are judged before that
  int32_t segment;                  // steps of which z is kept for the way back; earlier ones are taken again
  int64_t kept_from;                // the first element of z that is kept of these; all of it where a segment begins
  bool keeps_tapes;                 // each of these has a tape of its own; else its pass runs again
  const T* constants;               // running means and variances, as Op::constants points into them
  const T* params;                  // one vector as the Machine loads it, or (params_per_task) the user's [T, P]
  bool params_per_task;
  const T* alpha;         // inner [rate_rows, size]: rates of plain steps, zero where a parameter is not adapted
  const T* rate_numbers;  // [rate_rows]: the rates, where each step has one; null: each parameter has one
  StepRule<T> rule;       // of other steps; z is theta and the K vectors of its state
  const double* weights;  // [S + 1]: of the query loss at each theta_s
  Samples<T> support, query;
  T* losses;      // [T]
  T* outputs;     // [T, n, ...] of the query set, or of the support set of a jvp
  T* tangents;    // likewise: of the outputs along v
  T* trajectory;  // user's [S + 1, T, (1 + K) P]
  const T*
      v;  // user's: the adjoint [S + 1, T, (1 + K) P] (v_everywhere) or that of z_S; of a single pass, the direction
  bool v_everywhere;
  T* grads;      // user's [T, (1 + K) P]; null: they are not wanted
  T* products;   // user's [T, P]: Hessians times v
  T* sums;       // inner, a vector [size] for each chunk of tasks: the sum of its gradients, which the run writes
  T* rate_sums;  // inner, [rate_sum_rows, size] for each chunk: likewise of the rates, or of all hyper-parameters
  int32_t rate_sum_rows;
  double* number_sums;    // [rate_rows, H or 1] for each chunk: or the sums over all parameters, which the run adds to
  int64_t number_stride;  // from those of a task to the next of those that run at once in lanes
};

}  // namespace metafast
