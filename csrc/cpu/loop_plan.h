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
  // The gradient times the adjoint, which is what one rate gets, is a derivative that the tangent pass finds anyway.
  if (job.learns_rates) return !job.one_rate || job.first_order;
  return rule.kind != StepKind::plain && (rule.kind != StepKind::sgd || rule.max_norm >= 0 || rule.max_value >= 0);
}

// The steps that a segment keeps at the most, in square roots of all: then a loop of 1,000 steps keeps what 71 do, and
// takes few of them again where most of theta is read no more.
constexpr double roots = 2.25;

// Does anything change on the way back through a step?
template <class T>
bool goes_back(const Job<T>& job) {
  const bool judged = std::any_of(job.weights, job.weights + job.steps, [](double weight) { return weight != 0; });
  return !job.first_order || job.learns_rates || job.rule.kind != StepKind::plain || judged;
}

// Do the steps of a segment keep of theta only what tangent rules read? Nothing else may read it on the way back.
template <class T>
bool keeps_part(const Job<T>& job) {
  const bool judged = std::any_of(job.weights + job.begin, job.weights + job.steps, [](double w) { return w != 0; });
  return needs_tapes(job) && job.rule.kind == StepKind::plain && !judged;
}

// Elements of one task that are kept.
struct Kept {
  double z, step;  // of z; of all that the way back through a step reads
  double once;     // of what is there once: the rest of a tape, and room for z where steps keep a part of it
  int64_t steps;   // that the way back goes through

  double all() const { return static_cast<double>(steps) * step + once; }
  // With segments of so many steps: z where each begins and where the last one ends, and the steps of one of them.
  double in_segments(int64_t length) const {
    return static_cast<double>((steps + length - 1) / length + 1) * z + static_cast<double>(length) * step + once;
  }
  // Of the length that keeps the least.
  int64_t best_length() const {
    const int64_t near = static_cast<int64_t>(std::sqrt(static_cast<double>(steps) * z / step)) + 1;
    int64_t best = 1;
    for (int64_t length = std::max<int64_t>(near / 2, 1); length <= std::min(2 * near, steps); ++length) {
      if (in_segments(length) < in_segments(best)) best = length;
    }
    return best;
  }
  // The longest that keeps no more than `room`; 0: there is none.
  int64_t longest(double room) const {
    int64_t length = best_length();
    if (in_segments(length) > room) return 0;
    while (length < steps && in_segments(length + 1) <= room) ++length;
    return length;
  }
};

template <class T>
Kept kept_of(const Job<T>& job) {
  const double size = static_cast<double>(job.program->size), z = size * (1 + job.rule.states);
  const TaskPassLayouts& of = job.support_layouts;
  const double tape = needs_tapes(job) ? static_cast<double>(of.tape) : 0;
  const double kept = needs_tapes(job) ? static_cast<double>(of.kept) : 0;
  const double of_z = z - static_cast<double>(job.kept_from), room = job.kept_from > 0 ? 2 * z : 0;
  return {z, of_z + (job.needs_gradient ? size : 0) + kept, tape - kept + room, job.steps - job.begin};
}

// Chooses what to keep within so many elements for each task: everything; z and gradients of all steps; or all of the
// steps of a segment, if that is much less or if it has to be, for `bounded` says that the user gave the limit. A
// longer segment keeps more and takes fewer steps again; without a bound its length is such that it keeps what some
// sqrt(S) steps do. Where z and gradients of all steps fit, it is to spare a third of the steps, since there their
// passes run again, but no weight gradient. The least that is kept is z alone of some steps. Returns how many elements
// are kept.
template <class T>
double plan_loop(Job<T>& job, int64_t truncate, double limit, bool bounded) {
  const int64_t back = truncate < 0 ? job.steps : std::min<int64_t>(truncate, job.steps);
  job.begin = static_cast<int32_t>(job.steps - (goes_back(job) ? back : 0));
  job.judges_before = std::any_of(job.weights, job.weights + job.begin, [](double weight) { return weight != 0; });
  job.needs_gradient = needs_gradient(job);
  job.kept_from = 0;
  const Kept whole = kept_of(job);
  job.segment = static_cast<int32_t>(whole.steps);
  job.keeps_tapes = needs_tapes(job);
  if (whole.steps == 0 || whole.all() <= limit) return whole.all();

  const double steps = static_cast<double>(whole.steps);
  const double tapes = job.keeps_tapes ? steps * static_cast<double>(job.support_layouts.kept) : 0;
  const double states = whole.all() - tapes;
  job.kept_from = keeps_part(job) ? job.program->read_from : 0;
  const Kept cut = kept_of(job);
  const double least = cut.in_segments(cut.best_length()), usual = roots * std::sqrt(steps) * whole.step;
  if (!bounded && 2 * least > states) {
    job.kept_from = 0;
    job.keeps_tapes = job.keeps_tapes && tapes <= limit;
    return job.keeps_tapes ? whole.all() : states;
  }
  const int64_t length = cut.longest(bounded ? limit : std::max(least, std::min(limit, usual)));
  if (length > 0 && (3 * length > whole.steps || states > limit)) {
    job.segment = static_cast<int32_t>(length);
    return cut.in_segments(length);
  }
  job.kept_from = 0;
  job.keeps_tapes = false;
  if (states <= limit) return states;
  const double z = static_cast<double>((1 + job.rule.states) * job.n_params);
  const Kept bare{z, z, 0, whole.steps};
  const int64_t shortest = bare.best_length();
  const bool cuts = bare.in_segments(shortest) < bare.all();
  job.segment = static_cast<int32_t>(cuts ? shortest : whole.steps);
  return cuts ? bare.in_segments(shortest) : bare.all();
}

}  // namespace metafast
