// What a meta-gradient keeps of its inner loop for the way back, and which steps it takes again instead.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/job.h"

namespace metafast {

// Does the way back read what the passes of the inner loop leave?
template <class T>
bool needs_tapes(const Job<T>& job) {
  return job.goal == Goal::meta_gradient && !job.first_order;
}

// Does the way back through a step read the gradient that the step took?
template <class T>
bool needs_gradient(const Job<T>& job) {
  const StepRule<T>& rule = job.rule;
  if (job.learns_rates) return true;
  return rule.kind != StepKind::plain && (rule.kind != StepKind::sgd || rule.max_norm >= 0 || rule.max_value >= 0);
}

// Does anything change on the way back through a step?
template <class T>
bool goes_back(const Job<T>& job) {
  const bool judged = std::any_of(job.weights, job.weights + job.steps, [](double weight) { return weight != 0; });
  return !job.first_order || job.learns_rates || job.rule.kind != StepKind::plain || judged;
}

// Elements of one task that are kept.
struct Kept {
  double z, step;  // of z; of all that the way back through a step reads
  int64_t steps;   // that the way back goes through

  double all() const { return static_cast<double>(steps) * step; }
  // With segments of so many steps: z where each begins and where the last one ends, and the steps of one of them.
  double in_segments(int64_t length) const {
    return static_cast<double>((steps + length - 1) / length + 1) * z + static_cast<double>(length) * step;
  }
  int64_t best_length() const {
    const int64_t near = static_cast<int64_t>(std::sqrt(static_cast<double>(steps) * z / step)) + 1;
    int64_t best = 1;
    for (int64_t length = std::max<int64_t>(near / 2, 1); length <= std::min(2 * near, steps); ++length) {
      if (in_segments(length) < in_segments(best)) best = length;
    }
    return best;
  }
};

template <class T>
Kept kept_of(const Job<T>& job) {
  const double size = static_cast<double>(job.program->size), z = size * (1 + job.rule.states);
  const double tape = needs_tapes(job) ? static_cast<double>(job.support_layouts.tape) : 0;
  return {z, z + (job.needs_gradient ? size : 0) + tape, job.steps - job.begin};
}

// Chooses what to keep within so many elements for each task: everything; z and gradients of all steps; or all of some
// steps, if that is much less or if it has to be, for `bounded` says that the user gave the limit. The least that is
// kept then is z alone of some steps. Returns how many elements are kept.
template <class T>
double plan_loop(Job<T>& job, int64_t truncate, double limit, bool bounded) {
  const int64_t back = truncate < 0 ? job.steps : std::min<int64_t>(truncate, job.steps);
  job.begin = static_cast<int32_t>(job.steps - (goes_back(job) ? back : 0));
  job.judges_before = std::any_of(job.weights, job.weights + job.begin, [](double weight) { return weight != 0; });
  job.needs_gradient = needs_gradient(job);
  const Kept kept = kept_of(job);
  const double tapes = needs_tapes(job) ? static_cast<double>(kept.steps * job.support_layouts.tape) : 0;
  const double states = kept.all() - tapes;
  job.segment = static_cast<int32_t>(kept.steps);
  job.keeps_tapes = needs_tapes(job);
  if (kept.steps == 0 || kept.all() <= limit) return kept.all();
  const int64_t length = kept.best_length();
  const double cut = kept.in_segments(length);
  if (states <= limit || (!bounded && 2 * cut > states)) {
    job.keeps_tapes = job.keeps_tapes && !bounded && 2 * cut > states && tapes <= limit;
    return job.keeps_tapes ? kept.all() : states;
  }
  job.segment = static_cast<int32_t>(length);
  if (!bounded || cut <= limit) return cut;
  const double z = static_cast<double>((1 + job.rule.states) * job.n_params);
  const Kept least{z, z, kept.steps};
  const int64_t shortest = least.best_length();
  const bool cuts = least.in_segments(shortest) < least.all();
  job.segment = static_cast<int32_t>(cuts ? shortest : kept.steps);
  job.keeps_tapes = false;
  return cuts ? least.in_segments(shortest) : least.all();
}

}  // namespace metafast
