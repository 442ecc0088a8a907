// One call of the CPU executor: from tensors to a Job, and how its tasks are spread over threads.
#pragma once
#include <algorithm>
#include <deque>
#include <memory>
#include <optional>

#include "../core/plan/cache.h"
#include "../cpu/arena.h"
#include "../cpu/isa.h"
#include "../core/trace_buffer.h"
#include "../cpu/lane_groups.h"
#include "facts.h"
#include "rule_tables.h"

namespace metafast {

// Returns how many tasks are summed together, so many that there are at most 64 sums.
inline int64_t chunk_of(int64_t tasks) { return (tasks + 63) / 64; }

// Returns how many chunks of tasks run at the same time.
inline int64_t side_by_side(int64_t chunks) { return std::min<int64_t>(torch::stable::get_num_threads(), chunks); }

// Plans what a meta-gradient keeps, and returns the bytes that it may keep. Throws std::runtime_error where the user's
// own bound is less than any plan needs.
template <class T>
int64_t keep_within(Job<T>& job, const LoopSettings& loop) {
  const int64_t chunk = chunk_of(job.tasks), at_once = side_by_side((job.tasks + chunk - 1) / chunk);
  const bool bounded = loop.memory >= 0;
  const int64_t budget = bounded ? loop.memory : loop.budget;
  const double bytes = static_cast<double>(at_once * sizeof(T));
  const double kept = bytes * plan_loop(job, loop.truncate, static_cast<double>(budget) / bytes, bounded);
  if (bounded && kept > static_cast<double>(budget)) {
    fail("memory=" + std::to_string(budget) + ": the way back through " + std::to_string(job.steps - job.begin) +
         " steps keeps " + std::to_string(static_cast<int64_t>(kept)) +
         " bytes at the least; give more, fewer tasks or steps, or truncate=");
  }
  return budget;
}

// Returns the build by its place in isa_names().
template <class T>
const Isa<T>* build(int64_t isa) {
  int count = 0;
  const char* const* names = isa_names(count);
  if (isa < 0 || isa >= count) fail("there is no build " + std::to_string(isa) + " for this processor");
  return find_isa<T>(names[isa]);
}

// A Job, and the memory of what it points to.
template <class T>
class CpuCall {
 public:
  CpuCall(Goal goal, const Tensor& description, int64_t isa, int64_t team_from, int64_t rank, const Tensor& constants,
          int64_t tasks)
      : isa(build<T>(isa)), description_(numbers(description)), team_from_(team_from), rank_(rank) {
    plan = find_plan(description_, this->isa->layout, sizeof(T));
    constants_ = plan->template constants<T>(data<const T>(constants));
    job.goal = goal;
    job.program = &plan->program();
    job.inner = plan->inner().data();
    job.n_params = static_cast<int64_t>(plan->inner().size());
    job.tasks = tasks;
    job.constants = constants_.data();
  }

  // Takes parameters [P], or z [T, (1 + K) P].
  void params(const Tensor& t) {
    job.params_per_task = t.dim() == 2;
    if (!job.params_per_task) return params(std::vector<Tensor>{t});
    expect<T>(t, job.tasks * (1 + job.rule.states) * job.n_params, "params");
    job.params = data<T>(t);
  }

  // Takes parameters [P] in parts, each of any shape.
  void params(const std::vector<Tensor>& parts) {
    int64_t count = 0;
    for (const Tensor& part : parts) count += part.numel();
    if (count != job.n_params) fail_count("params", count, job.n_params);
    inner_params = zeros<T>(job.program->size);
    const int32_t* to = job.inner;
    for (const Tensor& part : parts) {
      const Tensor dense = part.is_contiguous() ? part : torch::stable::contiguous(part);
      expect<T>(dense, dense.numel(), "params");
      const T* from = data<T>(dense);
      for (const T* const end = from + dense.numel(); from < end; ++from) inner_params[*to++] = *from;
    }
    job.params = inner_params.get();
  }

  void direction(const Tensor& u) {
    expect<T>(u, job.tasks * job.n_params, "u");
    job.v = data<T>(u);
  }

  // What is done to each task. `rule` is empty where steps are plain, or as RuleTables says, and so are `rates`.
  void loop(const std::vector<int64_t>& settings, const std::vector<double>& rule, const Tensor& rates) {
    loop_ = loop_settings(settings);
    job.steps = static_cast<int32_t>(loop_.steps);
    job.first = loop_.first;
    job.first_order = loop_.first_order;
    job.learns_rates = loop_.learns_rates;
    job.one_rate = loop_.one_rate && rule.empty();
    if (rule.empty()) {
      read_rule(rule, job.rule);
      this->rates(rates);
    } else {
      rule_.emplace(rule, rates, *plan, job);
    }
    job.needs_gradient = needs_gradient(job);
  }

  void rates(const Tensor& rates) {
    const auto sizes = rates.sizes();
    const int64_t rows = sizes[0], width = sizes[1], size = job.program->size;
    expect<T>(rates, rows * (width == 1 ? 1 : job.n_params), "rates");
    job.one_rate = job.one_rate && width == 1;
    job.rate_rows = static_cast<int32_t>(rows);
    alpha = zeros<T>(rows * size);
    const T* given = data<T>(rates);
    for (int64_t r = 0; r < rows; ++r, given += width) {
      T* const row = alpha.get() + r * size;
      if (width == 1) {
        const uint8_t* const moved = plan->moved().data();
        const T rate = given[0];  // the compiler cannot know that no row holds it
        for (int64_t i = 0; i < size; ++i) row[i] = moved[i] ? rate : T(0);
      } else {
        for (int64_t i = 0; i < job.n_params; ++i) row[job.inner[i]] = plan->adapted()[i] ? given[i] : T(0);
      }
    }
    job.alpha = alpha.get();
    job.rate_numbers = width == 1 ? data<T>(rates) : nullptr;
    if (!sums_numbers()) return;
    moved_ = zeros<T>(size);
    std::copy(plan->moved().begin(), plan->moved().end(), moved_.get());
    job.rule.moved = moved_.get();
  }

  Samples<T> support(const Tensor& x, const Tensor& y, const Tensor& sizes) const {
    return samples(x, y, sizes, loop_.each_step);
  }

  // `sizes` are the samples of each task, [T], or empty where all have n; T is S T where each step has its own.
  Samples<T> samples(const Tensor& x, const Tensor& sizes, bool each_step = false) const {
    const Program& p = *job.program;
    const int32_t n = static_cast<int32_t>(x.sizes()[1]);
    const int h = p.input.h - 2 * p.border_y, w = p.input.w - 2 * p.border_x;
    Samples<T> s{};
    s.each_step = each_step;
    expect<T>(x, rows(s) * n * p.input.c * h * w, "x");
    s.n = n;
    s.x = data<T>(x);
    s.counts = counts(sizes, s);
    return s;
  }

  Samples<T> samples(const Tensor& x, const Tensor& y, const Tensor& sizes, bool each_step = false) const {
    Samples<T> s = samples(x, sizes, each_step);
    if (plan->reads_labels()) {
      s.labels = labels(y, s);
    } else {
      s.targets = targets(y, s);
    }
    return s;
  }

  const T* targets(const Tensor& y, const Samples<T>& s) const {
    const Grid& out = job.program->out;
    expect<T>(y, rows(s) * s.n * out.c * out.h * out.w, "targets");
    return data<T>(y);
  }

  TaskPassLayouts pass_layouts(const Samples<T>& s, PassKind kind) {
    auto& of = layouts_[kind == PassKind::gradient_and_tangent];
    TaskPassLayouts all{};
    of.reserve(rows(s));
    for (int64_t t = 0; t < rows(s); ++t) {
      const int n = static_cast<int>(s.counts ? s.counts[t] : s.n);
      of.push_back(t > 0 && of.back()->n == n ? of.back() : &plan->pass_layout(n, kind));
      all.tape = std::max(all.tape, of.back()->tape);
      all.scratch = std::max(all.scratch, of.back()->scratch);
      all.kept = std::max(all.kept, of.back()->kept);
    }
    all.of = of.data();
    return all;
  }

  // Plans what a meta-gradient keeps; job.weights and the samples are known.
  void plan_memory() { budget_ = keep_within(job, loop_); }

  // Runs all tasks. Each chunk of them has a sum of its own, and these are added in order, so it does not matter to the
  // sums who ran them.
  void run(bool sums) {
    const int64_t chunk = chunk_of(job.tasks), chunks = (job.tasks + chunk - 1) / chunk;
    const int64_t size = job.program->size, threads = side_by_side(chunks);
    const bool learns = job.learns_rates;
    if (learns && rule_) {
      rule_->sum_up(job, chunks);
    } else if (sums_numbers()) {
      number_sums_ = zeros<double>(chunks * job.rate_rows);
      job.number_sums = number_sums_.get();
      job.number_stride = job.rate_rows;
    } else {
      job.rate_sum_rows = job.rate_rows;
    }
    const bool rate_sums = learns && job.rate_sum_rows > 0;
    const int64_t in_sums = sums ? chunks * size : 0, in_lr_sums = rate_sums ? chunks * job.rate_sum_rows * size : 0;
    if (sums || rate_sums) partial.emplace((in_sums + in_lr_sums) * sizeof(T), -1);
    if (sums) job.sums = static_cast<T*>(partial->data());
    if (rate_sums) job.rate_sums = static_cast<T*>(partial->data()) + in_sums;
    const int64_t workspace = chunks < torch::stable::get_num_threads() ? isa->team_workspace(job, team_from_) : 0;
    if (workspace > 0) {
      run_in_teams(chunks, chunk, workspace);
    } else {
      LaneGroups<T> groups(*isa, description_, job, chunk, threads, budget_);
      run_separately(threads, chunk, groups);
      if (groups.chunks() > 0) {
        collect(groups, chunks);
        return;
      }
    }
    total(job.sums, 0, chunks, size, job.sums);
    total(job.rate_sums, 0, chunks, job.rate_sum_rows * size, job.rate_sums);
  }

  // Returns gradients of the shapes of the parts that params took.
  std::vector<Tensor> grads(const std::vector<Tensor>& parts, T scale) const {
    std::vector<Tensor> out;
    const int32_t* from = job.inner;
    for (const Tensor& part : parts) {
      const auto sizes = part.sizes();
      out.push_back(empty(part, {sizes.begin(), sizes.end()}));
      T* const to = data<T>(out.back());
      const int64_t count = part.numel();
      for (int64_t i = 0; i < count; ++i) to[i] = job.sums[*from++] * scale;
    }
    return out;
  }

  // Returns the gradient of the rates, of their shape.
  Tensor rates_grad(const Tensor& rates, T scale) const {
    if (rule_) return rule_->gradient(rates, job, 1.0 / (scale == 1 ? 1 : job.tasks));
    const int64_t rows = rates.sizes()[0], width = rates.sizes()[1], size = job.program->size;
    Tensor out = empty(rates, {job.learns_rates ? rows : 0, width});
    for (int64_t r = 0; r < out.sizes()[0]; ++r) {
      T* to = data<T>(out) + r * width;
      double sum = 0;
      if (sums_numbers()) {
        for (int64_t k = 0; k * chunk_of(job.tasks) < job.tasks; ++k) sum += number_sums_[k * rows + r];
        to[0] = static_cast<T>(sum * scale);
        continue;
      }
      for (int64_t i = 0; i < job.n_params; ++i) {
        const T value = plan->adapted()[i] ? job.rate_sums[r * size + job.inner[i]] * scale : T(0);
        width == 1 ? sum += value : to[i] = value;
      }
      if (width == 1) to[0] = static_cast<T>(sum);
    }
    return out;
  }

  // Makes the outputs [T, n, ...]: vectors where samples of the output have one axis, else images.
  Tensor outputs(const Tensor& like, int64_t n) {
    const Grid& g = job.program->out;
    const std::vector<int64_t> vectors{job.tasks, n, g.c * g.h * g.w}, images{job.tasks, n, g.c, g.h, g.w};
    Tensor out = empty(like, rank_ == 1 ? vectors : images);
    job.outputs = data<T>(out);
    return out;
  }

  const Isa<T>* isa;
  std::shared_ptr<Plan> plan;
  Job<T> job{};

 private:
  // Is the gradient of the rates of plain steps one number a step?
  bool sums_numbers() const { return job.learns_rates && job.one_rate && !job.first_order; }

  // Each thread takes group after group, then chunk after chunk, so that none waits for one that began late.
  void run_separately(int64_t threads, int64_t chunk, LaneGroups<T>& groups) {
    const bool some = groups.chunks() > 0;
    groups.job.sums = job.sums;
    groups.job.rate_sums = job.rate_sums;
    groups.job.number_sums = job.number_sums;
    const int64_t memory = std::max(isa->memory(job), some ? isa->lanes_memory(groups.job) : 0) * sizeof(T);
    int64_t next_group = 0, next = groups.chunks();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
      const Arena arena(memory, thread);
      T* const base = static_cast<T*>(arena.data());
      TraceBuffer trace(*job.program, job.steps, job.tasks);
      if (some) isa->run_lanes(groups.job, groups.groups(&next_group), base, trace.trace());
      isa->run(job, chunk, &next, base, trace.trace());
    });
  }

  // Adds the sums of the groups, and on top of them those of the chunks behind.
  void collect(LaneGroups<T>& groups, int64_t chunks) {
    const auto all = [&](T*& sums, int64_t rows, std::unique_ptr<T[]>& sum) {
      if (!sums) return;
      sum = groups.collect(sums, rows, job.inner);
      total(sums, groups.chunks(), chunks, rows * job.program->size, sum.get());
      sums = sum.get();
    };
    all(job.sums, 1, sums_);
    all(job.rate_sums, job.rate_sum_rows, rate_sums_);
  }

  // Makes a team for each chunk. A pool may give fewer threads than there are members: then one thread stands for
  // several, and finds the teams closed that it would join a second time.
  void run_in_teams(int64_t chunks, int64_t chunk, int64_t workspace) {
    const int64_t threads = torch::stable::get_num_threads();
    std::deque<Team> teams;
    std::deque<Arena> memories;
    for (int64_t k = 0; k < chunks; ++k) {
      teams.emplace_back(static_cast<int>(threads / chunks + (k < threads % chunks)));
      memories.emplace_back(isa->memory(job) * sizeof(T), k);
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t end) {
      const Arena own(workspace * sizeof(T), chunks + first);
      for (int64_t i = first; i < end; ++i) {
        const int64_t k = i % chunks;
        TraceBuffer trace(*job.program, job.steps, chunk);
        Team& team = teams[k];
        const int rank = team.join();
        if (rank < 0) continue;
        isa->run_as_team(job, chunk, k, static_cast<T*>(memories[k].data()), static_cast<T*>(own.data()),
                         {&team, rank, team.size()}, rank == 0 ? trace.trace() : nullptr);
      }
    });
  }

  // Counts the sets of samples.
  int64_t rows(const Samples<T>& s) const { return s.each_step ? job.steps * job.tasks : job.tasks; }

  const int64_t* counts(const Tensor& sizes, const Samples<T>& s) const {
    if (!sizes.numel()) return nullptr;
    if (sizes.scalar_type() != ScalarType::Long || sizes.numel() != rows(s)) fail("sizes must be int64 of shape [T]");
    const int64_t* counts = data<int64_t>(sizes);
    for (int64_t t = 0; t < rows(s); ++t) {
      if (counts[t] < 1 || counts[t] > s.n) fail("a task has between 1 and " + std::to_string(s.n) + " samples");
    }
    return counts;
  }

  const int64_t* labels(const Tensor& y, const Samples<T>& s) const {
    const int64_t count = rows(s) * s.n;
    if (y.scalar_type() != ScalarType::Long || y.numel() != count) {
      fail("labels must be int64 of shape [T, n]");
    }
    const int64_t* labels = data<int64_t>(y);
    const int classes = job.program->out.c;
    for (int64_t i = 0; i < count; ++i) {
      if (labels[i] < 0 || labels[i] >= classes) {
        fail("label " + std::to_string(labels[i]) + " of task " + std::to_string(i / s.n % job.tasks) +
             " is outside 0.." + std::to_string(classes - 1) + ": the model has " + std::to_string(classes) +
             " outputs");
      }
    }
    return labels;
  }

  // Adds the sums of chunks to `sum`, which may be the first of them: in blocks of as many as run in lanes, so that it
  // does not matter whether they did.
  void total(T* sums, int64_t first, int64_t count, int64_t size, T* sum) const {
    const auto add = [=](T* to, const T* part) {
      for (int64_t i = 0; i < size; ++i) to[i] += part[i];
    };
    const int64_t block = isa->layout.lanes;
    for (int64_t k = first; k < count && sums; k += block) {
      T* const part = sums + k * size;
      for (int64_t j = 1; j < std::min(block, count - k); ++j) add(part, part + j * size);
      if (part != sum) add(sum, part);
    }
  }

  const std::vector<double> description_;
  std::vector<T> constants_;
  std::unique_ptr<T[]> inner_params, alpha, moved_, sums_, rate_sums_;
  std::unique_ptr<double[]> number_sums_;
  const int64_t team_from_, rank_;
  LoopSettings loop_{};
  int64_t budget_ = 0;  // bytes that a meta-gradient keeps at most
  std::optional<RuleTables<T>> rule_;
  std::optional<Arena> partial;  // the sums of each chunk
  std::vector<const PassLayout*> layouts_[2];
};

}  // namespace metafast
