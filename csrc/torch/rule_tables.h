// From the rule and the hyper-parameters that Python gives to a StepRule, and its gradients back.
#pragma once
#include <memory>

#include "../core/job.h"
#include "../core/plan/plan.h"
#include "../cpu/lane_groups.h"
#include "facts.h"
#include "tensors.h"

namespace metafast {

// Reads the argument `loop` of operators.
inline LoopSettings loop_settings(const std::vector<int64_t>& numbers) {
  LoopSettings loop{};
  if (numbers.size() != sizeof loop / sizeof(int64_t)) fail("loop has the wrong number of settings");
  std::copy(numbers.begin(), numbers.end(), &loop.steps);
  return loop;
}

// The sets of support samples, of which a batch has one for each step where each has its own.
inline int64_t sets(const std::vector<int64_t>& loop) {
  const LoopSettings settings = loop_settings(loop);
  return settings.each_step ? std::max<int64_t>(settings.steps, 1) : 1;
}

// Reads a rule: its kind, its option, the number of its states, whether it scales down the norm and whether it clamps
// values, and what each state begins with. Nothing: steps are plain.
template <class T>
void read_rule(const std::vector<double>& numbers, StepRule<T>& rule) {
  rule.max_norm = rule.max_value = -1;
  if (numbers.empty()) return;
  rule.kind = static_cast<StepKind>(numbers.at(0));
  switch (rule.kind) {
#define METAFAST_STEP(kind, formula, own, decay) \
  case StepKind::kind:                           \
    rule.names = own;                            \
    rule.decay_at = decay;                       \
    break;
    METAFAST_STEP_RULES(METAFAST_STEP)
#undef METAFAST_STEP
    default:
      fail("there is no rule of steps with the number " + std::to_string(numbers[0]));
  }
  rule.option = numbers.at(1) != 0;
  rule.states = static_cast<int32_t>(numbers.at(2));
  if (numbers.at(3) != 0) rule.max_norm = rule.names++;
  if (numbers.at(4) != 0) rule.max_value = rule.names++;
  if (rule.states > max_states || static_cast<int64_t>(numbers.size()) != 5 + rule.states) {
    fail("a rule has " + std::to_string(rule.states) + " states");
  }
  std::copy(numbers.begin() + 5, numbers.end(), rule.start);
}

// Holds what a Job's StepRule points to.
template <class T>
class RuleTables {
 public:
  // `hyper`: float64 [H, 1 or S, 1 or P]. Where a hyper-parameter has a number for each parameter, it is the learning
  // rate or weight decay, or all of these are alike.
  RuleTables(const std::vector<double>& rule, const Tensor& hyper, const Plan& plan, Job<T>& job)
      : plan_(plan), count_(hyper.sizes()[0]), rows_(hyper.sizes()[1]), width_(hyper.sizes()[2]) {
    expect<double>(hyper, count_ * rows_ * (width_ == 1 ? 1 : job.n_params), "rates");
    StepRule<T>& to = job.rule;
    read_rule(rule, to);
    if (to.names != count_) {
      fail("rates have " + std::to_string(count_) + " hyper-parameters, and the rule has " + std::to_string(to.names));
    }
    given_ = data<const double>(hyper);
    numbers_.resize(rows_ * count_);
    for (int64_t h = 0; h < count_; ++h) {
      for (int64_t r = 0; r < rows_; ++r) numbers_[r * count_ + h] = row(h, r)[0];
    }
    to.numbers = numbers_.data();
    moved_ = zeros<T>(job.program->size);
    for (int64_t i = 0; i < job.program->size; ++i) moved_[i] = plan.moved()[i];
    to.moved = moved_.get();
    to.of_each = width_ > 1;
    job.rate_rows = static_cast<int32_t>(rows_);
    if (!to.of_each) return;
    to.rates = vectors(0, job, rates_);
    to.decay = vectors(to.decay_at, job, decay_);
  }

  // Makes room for the sums of so many chunks, where they are numbers.
  void sum_up(Job<T>& job, int64_t chunks) {
    job.rate_sum_rows = static_cast<int32_t>(width_ > 1 ? count_ * rows_ : 0);
    job.number_stride = rows_ * count_;
    chunks_ = chunks;
    if (width_ > 1) return;
    sums_ = zeros<double>(chunks * job.number_stride);
    job.number_sums = sums_.get();
  }

  // Returns the gradient of the hyper-parameters, of their shape.
  Tensor gradient(const Tensor& hyper, const Job<T>& job, double scale) const {
    Tensor out = empty(hyper, {job.learns_rates ? count_ : 0, rows_, width_});
    double* to = data<double>(out);
    for (int64_t h = 0; to && h < count_; ++h) {
      for (int64_t r = 0; r < rows_; ++r, to += width_) {
        if (width_ == 1) {
          for (int64_t k = 0; k < chunks_; ++k) to[0] = (k ? to[0] : 0) + sums_[(k * rows_ + r) * count_ + h];
          to[0] *= scale;
        }
        const T* const sums = job.rate_sums + (h * rows_ + r) * job.program->size;
        for (int64_t i = 0; width_ > 1 && i < width_; ++i) {
          to[i] = plan_.adapted()[i] ? static_cast<double>(sums[job.inner[i]]) * scale : 0;
        }
      }
    }
    return out;
  }

 private:
  const double* row(int64_t h, int64_t r) const { return given_ + (h * rows_ + r) * width_; }

  const T* vectors(int64_t h, const Job<T>& job, std::unique_ptr<T[]>& to) const {
    to = zeros<T>(rows_ * job.program->size);
    for (int64_t r = 0; r < rows_; ++r) {
      T* const of_row = to.get() + r * job.program->size;
      for (int64_t i = 0; i < job.n_params; ++i) of_row[job.inner[i]] = static_cast<T>(row(h, r)[i]);
    }
    return to.get();
  }

  const Plan& plan_;
  const int64_t count_, rows_, width_;
  const double* given_ = nullptr;
  std::vector<double> numbers_;
  std::unique_ptr<T[]> moved_, rates_, decay_;
  std::unique_ptr<double[]> sums_;
  int64_t chunks_ = 0;
};

}  // namespace metafast
