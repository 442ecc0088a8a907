// What an inner step makes of the gradient, as data: a rule of metafast/inner/rules, its options and its
// hyper-parameters. The formulas are in formulas.h. Data only, as program.h.
#pragma once
#include <cstdint>

namespace metafast {

// The rules: their formula, the number of their own hyper-parameters, the learning rate first, and the place of weight
// decay among these. Bounds to clip to follow them.
#define METAFAST_STEP_RULES(ROW) \
  ROW(sgd, Sgd, 4, 3)            \
  ROW(adam, Adam, 5, 4)          \
  ROW(rmsprop, RmsProp, 5, 3)    \
  ROW(adagrad, Adagrad, 4, 2)

enum class StepKind : int32_t {
  plain,  // theta - alpha g, without anything below
#define METAFAST_STEP(kind, ...) kind,
  METAFAST_STEP_RULES(METAFAST_STEP)
#undef METAFAST_STEP
};

constexpr int max_states = 3;
constexpr int max_totals = 5;  // that a step sums up at once

// Inner vectors [size] are in the layout of the Machine; z is theta and the K vectors of the state behind it.
template <class T>
struct StepRule {
  StepKind kind;
  bool option;               // sgd: nesterov; adam: decoupled weight decay; rmsprop: centered
  int32_t states;            // K
  int32_t names;             // H: hyper-parameters
  int32_t decay_at;          // place of weight decay among them
  int32_t max_norm;          // place of the norm that gradients are scaled down to; negative: they are not
  int32_t max_value;         // likewise of the value that their elements are clamped to
  double start[max_states];  // what the elements of each state are before the first step
  const double* numbers;     // [rows, H]: the hyper-parameters of each step
  const T *rates, *decay;    // inner [rows, size]: learning rates and weight decay; null: the numbers
  const T* moved;            // inner [size]: one where the inner loop moves a parameter, else zero; also of plain steps
                             // with one rate
  bool of_each;              // gradients of hyper-parameters are wanted for each parameter; else their sums
  const int32_t* order;      // [order_size]: elements in the order in which tasks that run alone add them up, negative
  int64_t order_size;        // where there is none; null: this is such a task
};

}  // namespace metafast
