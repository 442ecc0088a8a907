// Which tasks of a call run at once, one in each lane of a core, and how their Job differs from that of the others.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "../core/plan/cache.h"
#include "isa.h"
#include "loop_plan.h"

namespace metafast {

// Makes an array of zeros: a call of memset, which std::vector's constructor is not.
template <class T>
std::unique_ptr<T[]> zeros(int64_t count) {
  return std::make_unique<T[]>(count);
}

// Groups of chunks, as many in each as `isa` has lanes, of a Job that is complete but for its sums. Their way back
// takes no step again: within `budget` bytes they keep everything, or they do not run.
template <class T>
class LaneGroups {
 public:
  LaneGroups(const Isa<T>& isa, const std::vector<double>& description, const Job<T>& all, int64_t chunk,
             int64_t threads, int64_t budget)
      : lanes(isa.lanes.lanes), groups_{0, all.program->size, nullptr} {
    const bool some = isa.runs_lanes(*all.program) && !all.support.counts && !all.query.counts;
    if (!some || all.segment < all.steps - all.begin) return;
    const int64_t count = best_count(all.tasks / chunk, (all.tasks + chunk - 1) / chunk, threads);
    if (count == 0) return;
    plan_ = find_plan(description, isa.lanes, sizeof(T));
    job = all;
    job.keeps_tapes = needs_tapes(all);
    job.kept_from = 0;
    while ((lanes >> shift_) > 1) ++shift_;
    job.program = &plan_->program();
    job.inner = plan_->inner().data();
    job.task_stride = chunk;
    job.support_layouts = pass_layouts(all.support_layouts, all.support.n, PassKind::gradient_and_tangent, support_);
    job.query_layouts = pass_layouts(all.query_layouts, all.query.n,
                                     all.goal == Goal::predict ? PassKind::predict : PassKind::gradient, query_);
    const int64_t tape = job.support_layouts.tape * sizeof(T);
    const int64_t vectors = (5 + 2 * all.rule.states) * job.program->size * sizeof(T);
    const int64_t query = job.query_layouts.tape * sizeof(T), cache = lanes * sizeof(T) * cache_of_a_byte;
    if (vectors + std::max(tape, query) > cache) return;
    const double kept = kept_of(job).all() * static_cast<double>(sizeof(T) * threads);
    if (needs_tapes(all) && kept > static_cast<double>(budget)) return;
    lay_out(all);
    groups_.count = count;
  }

  // Adds up what the groups have summed, `rows` vectors each, and returns it in the layout `inner` of tasks that run
  // alone.
  std::unique_ptr<T[]> collect(T* sums, int64_t rows, const int32_t* inner) const {
    const int64_t width = job.program->size / lanes, stride = groups_.stride;
    auto to = zeros<T>(rows * stride);
    for (int64_t r = 0; r < rows; ++r) {
      T* const sum = sums + r * stride;
      for (int64_t k = 1; k < groups_.count; ++k) {
        const T* const part = sum + k * rows * stride;
        for (int64_t i = 0; i < width; ++i) sum[i] += part[i];
      }
      for (int64_t i = 0; i < job.n_params; ++i) to[r * stride + inner[i]] = sum[element(i)];
    }
    return to;
  }

  // The groups, for threads that take them in turns by `next`.
  Groups groups(int64_t* next) const { return {groups_.count, groups_.stride, next}; }
  int64_t chunks() const { return groups_.count * lanes; }

  const int64_t lanes;
  Job<T> job{};

 private:
  static constexpr double cost = 0.8;  // the time of a chunk in a group over that of one alone
  // What a step touches must stay near a core: 1.25 MiB with vectors of 32 bytes and 2.5 MiB with 64. That is more than
  // a second-level cache of 1 MiB, but rows of weights come in order: up to there lanes were faster at every size.
  static constexpr int64_t cache_of_a_byte = 40 << 10;

  // Returns how many groups let the slowest thread end first, of those that `whole` chunks can make; what is left over
  // runs alone.
  int64_t best_count(int64_t whole, int64_t chunks, int64_t threads) const {
    const auto time = [&](int64_t groups) {
      const double each = cost * static_cast<double>(lanes), left = static_cast<double>(chunks - groups * lanes);
      const double slowest = static_cast<double>((groups + threads - 1) / threads) * each;
      return std::max(slowest, (static_cast<double>(groups) * each + left) / static_cast<double>(threads) + 0.5);
    };
    int64_t best = 0;
    for (int64_t groups = 1; groups <= whole / lanes; ++groups) {
      if (time(groups) < time(best)) best = groups;
    }
    return best;
  }

  // The place of a parameter among those of one lane. Lanes are a power of two; a division would cost more than all
  // else.
  int64_t element(int64_t parameter) const { return job.inner[parameter] >> shift_; }

  TaskPassLayouts pass_layouts(const TaskPassLayouts& like, int n, PassKind kind,
                               std::vector<const PassLayout*>& of) const {
    if (!like.of) return {};
    const PassLayout& layout = plan_->pass_layout(n, kind);
    of.assign(job.tasks * (job.support.each_step ? job.steps : 1), &layout);
    return {of.data(), layout.tape, layout.scratch, layout.kept};
  }

  // Writes what all tasks share, once for all lanes.
  void lay_out(const Job<T>& all) {
    const int64_t size = job.program->size / lanes;
    const auto move = [&](const T* from, T* to) {
      for (int64_t i = 0; i < all.n_params; ++i) to[element(i)] = from[all.inner[i]];
    };
    if (!all.params_per_task && all.params) {
      params_ = zeros<T>(size);
      move(all.params, params_.get());
      job.params = params_.get();
    }
    const auto move_rows = [&](const T* from, int64_t rows, std::unique_ptr<T[]>& to) -> const T* {
      if (!from) return nullptr;
      to = zeros<T>(rows * size);
      for (int64_t r = 0; r < rows; ++r) move(from + r * groups_.stride, to.get() + r * size);
      return to.get();
    };
    job.alpha = move_rows(all.alpha, all.rate_rows, alpha_);
    job.rule.rates = move_rows(all.rule.rates, all.rate_rows, alpha_);
    job.rule.decay = move_rows(all.rule.decay, all.rate_rows, decay_);
    job.rule.moved = move_rows(all.rule.moved, 1, moved_);
    if (all.rule.kind == StepKind::plain) return;
    order_.assign(groups_.stride, -1);
    for (int64_t i = 0; i < all.n_params; ++i) order_[all.inner[i]] = static_cast<int32_t>(element(i));
    job.rule.order = order_.data();
    job.rule.order_size = groups_.stride;
  }

  Groups groups_;
  int shift_ = 0;
  std::shared_ptr<Plan> plan_;
  std::vector<const PassLayout*> support_, query_;
  std::unique_ptr<T[]> params_, alpha_, decay_, moved_;
  std::vector<int32_t> order_;
};

}  // namespace metafast
