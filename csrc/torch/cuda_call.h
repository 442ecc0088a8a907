// One call of the CUDA executor: from tensors to a BlockJob, on a GPU or, for CPU tensors, by its twin.
#pragma once
#include <optional>

#include "../core/plan/cache.h"
#include "../cpu/loop_plan.h"
#include "../cuda/launch.h"
#include "../cuda/plan_block.h"
#include "facts.h"
#include "rule_tables.h"
#include "tensors.h"

namespace metafast {

// Where and how a call runs: METAFAST_LAUNCH_SETTINGS in a row.
struct LaunchSettings {
  explicit LaunchSettings(const std::vector<int64_t>& numbers) {
    const auto of = [&](Setting setting) { return numbers.at(static_cast<size_t>(setting)); };
    limits = {of(Setting::shared), of(Setting::processors)};
    threads = static_cast<int>(of(Setting::threads));
    cluster = static_cast<int>(of(Setting::cluster));
    precision = static_cast<Precision>(of(Setting::precision));
    stream = of(Setting::stream);
  }

  BlockLimits limits;
  int threads, cluster;
  Precision precision;
  int64_t stream;
};

inline Queue queue(const Tensor& t, int64_t stream) { return {t.get_device_index(), stream}; }

template <class T>
void run_anywhere(const BlockJob<T>& job, const BlockShape& shape, const Tensor& like, int64_t stream) {
  if (!like.is_cuda()) return twin_run(job, shape);
  if constexpr (sizeof(T) == 4) return cuda_run(job, shape, queue(like, stream));
  fail("on a GPU tasks run in float32");
}

template <class T>
void sum_anywhere(const Sum<T>& sum, const Tensor& like, int64_t stream) {
  if (!like.is_cuda()) return twin_sum(sum);
  if constexpr (sizeof(T) == 4) cuda_sum(sum, queue(like, stream));
}

// The passes that tables hold, by the numbers of samples; zero: none.
struct PassLayouts {
  const PassLayout *support, *query;

  PassLayouts(Plan& plan, int64_t support, int64_t query, bool predicts)
      : support(support ? &plan.pass_layout(static_cast<int>(support), PassKind::gradient_and_tangent) : nullptr),
        query(query ? &plan.pass_layout(static_cast<int>(query), predicts ? PassKind::predict : PassKind::gradient)
                    : nullptr) {}
};

template <class T>
std::shared_ptr<Plan> block_plan(const Tensor& description, int64_t cluster) {
  return find_plan(numbers(description), block_layout(static_cast<int>(cluster)), sizeof(T));
}

// Reads what is done to each task.
template <class T>
LoopSettings read_loop(const std::vector<int64_t>& settings, const std::vector<double>& rule, Job<T>& job) {
  const LoopSettings loop = loop_settings(settings);
  job.steps = static_cast<int32_t>(loop.steps);
  job.first = loop.first;
  job.first_order = loop.first_order;
  job.learns_rates = loop.learns_rates;
  read_rule(rule, job.rule);
  job.needs_gradient = needs_gradient(job);
  return loop;
}

template <class T>
BlockWork block_work(const Job<T>& job, const Program& program, const PassLayouts& layouts, int cluster) {
  return {job.goal,        &program,           layouts.support,  layouts.query,
          job.steps,       job.first_order,    job.learns_rates, job.rule.kind != StepKind::plain,
          job.rule.states, job.needs_gradient, cluster};
}

// One call: a job, and the tensors that it points to.
template <class T>
class CudaCall {
 public:
  // For the tasks of `x [T, n, ...]`, or of [S T, n, ...] where each of so many steps has its own.
  CudaCall(Goal goal, const Tensor& description, const Tensor& head, const std::vector<int64_t>& settings,
           const Tensor& x, int64_t sets = 1)
      : settings(settings), plan(block_plan<T>(description, this->settings.cluster)), like(x) {
    job.goal = goal;
    job.precision = this->settings.precision;
    if (job.precision != Precision::float32 && sizeof(T) != sizeof(float)) fail("tensor cores take float32");
    job.tables = *static_cast<const BlockTables*>(head.data_ptr());
    job.n_params = static_cast<int64_t>(plan->inner().size());
    job.tasks = x.sizes()[0] / sets;
    job.rate_rows = 1;
    job.rate_width = 1;
  }

  void params(const Tensor& t) {
    job.params_per_task = t.dim() == 2;
    expect_here(t, job.params_per_task ? job.tasks * z_size() : job.n_params, "params");
    job.params = data<T>(t);
  }

  // What is done to each task. `rates` are those of plain steps, [1 or S, 1 or P], or under a rule the hyper-parameters
  // of each step in a row, float64 [1 or S, H].
  void loop(const std::vector<int64_t>& settings, const std::vector<double>& rule, const Tensor& rates) {
    loop_ = read_loop(settings, rule, job);
    const int64_t rows = rates.sizes()[0], width = rates.sizes()[1];
    job.rate_rows = static_cast<int32_t>(rows);
    if (rule.empty()) {
      expect_here(rates, rows * (width == 1 ? 1 : job.n_params), "rates");
      job.rates = data<T>(rates);
      job.rate_width = width;
    } else {
      expect<double>(rates, rows * job.rule.names, "rates");
      expect_device(rates, "rates");
      numbers_ = rates;
      job.rule.numbers = data<double>(rates);
      job.rule.moved = static_cast<const T*>(job.tables.moved);
    }
  }

  // Of the support sets, where each step may have its own: T is S T then.
  Samples<T> support(const Tensor& x, const Tensor& y) const { return samples(x, &y, loop_.each_step); }

  Samples<T> samples(const Tensor& x, const Tensor* y, bool each_step = false) const {
    const Program& p = plan->program();
    const int32_t n = static_cast<int32_t>(x.sizes()[1]);
    const int64_t count = (each_step ? job.steps * job.tasks : job.tasks) * n;
    expect_here(x, count * p.input.c * p.input.h * p.input.w, "x");
    Samples<T> s{};
    s.n = n;
    s.x = data<T>(x);
    s.each_step = each_step;
    if (!y) return s;
    if (!plan->reads_labels()) {
      expect_here(*y, count * p.out.c * p.out.h * p.out.w, "targets");
      s.targets = data<T>(*y);
    } else {
      if (y->scalar_type() != ScalarType::Long || y->numel() != count) fail("labels must be int64 of shape [T, n]");
      expect_device(*y, "labels");
      s.labels = data<int64_t>(*y);
    }
    return s;
  }

  void weights(const Tensor& of_steps) {
    expect_device(of_steps, "step_weights");
    job.weights = data<double>(of_steps);
  }

  void expect_here(const Tensor& t, int64_t elements, const char* name) const {
    expect<T>(t, elements, name);
    expect_device(t, name);
  }

  void expect_device(const Tensor& t, const char* name) const {
    const bool same =
        t.is_cuda() == like.is_cuda() && (!t.is_cuda() || t.get_device_index() == like.get_device_index());
    if (!same) fail(std::string(name) + " is on another device than the tasks");
  }

  // [T, n, c, h, w]; Python gives it the shape of the model's outputs.
  Tensor outputs() {
    const Grid& g = plan->program().out;
    Tensor out = empty(like, {job.tasks, job.query.n, g.c, g.h, g.w});
    job.outputs = data<T>(out);
    return out;
  }

  Tensor losses() {
    Tensor out = empty(like, {job.tasks});
    job.losses = data<T>(out);
    return out;
  }

  // Elements of a task's z.
  int64_t z_size() const { return (1 + job.rule.states) * job.n_params; }

  Tensor grads() {
    Tensor out = empty(like, {job.tasks, z_size()});
    job.grads = data<T>(out);
    return out;
  }

  void run(bool wants_sums) {
    const Program& p = plan->program();
    const PassLayouts layouts(*plan, job.support.n, job.query.n, job.goal == Goal::predict);
    const BlockWork work = block_work(job, p, layouts, settings.cluster);
    shape = block_shape(work, job.tasks, settings.threads, settings.limits, sizeof(T), job.memory);
    const int64_t blocks = shape.blocks;
    if (wants_sums) job.sums = take(blocks * p.size);
    if (job.learns_rates && job.rule.kind != StepKind::plain) {
      number_sums = empty(*numbers_, {blocks / shape.cluster, shape.cluster, job.rate_rows, job.rule.names});
      job.number_sums = data<double>(number_sums);
    } else if (job.learns_rates) {
      job.rate_sums = take(blocks * job.rate_rows * (job.rate_width > 1 ? p.size : 1));
    }
    if (job.memory.record) job.history = take(blocks * job.steps * job.memory.record);
    run_anywhere(job, shape, like, settings.stream);
  }

  // Over the tasks, of the parameters.
  Tensor grad(T scale) const {
    Tensor out = empty(like, {job.n_params});
    const int64_t clusters = shape.blocks / shape.cluster, size = plan->program().size * shape.cluster;
    sum_anywhere<T>({job.sums, clusters, size, 1, size, job.tables.inner, job.n_params, scale, data<T>(out)}, like,
                    settings.stream);
    return out;
  }

  // Likewise, of the shape of rates; under a rule neither summed nor scaled: those of each block, float64 [blocks,
  // rows, H], of which the blocks of a cluster have the same.
  Tensor rates_grad(T scale) const {
    if (numbers_) return job.learns_rates ? number_sums : empty(*numbers_, {0});
    const bool each = job.rate_width > 1;  // parameter has a rate, summed by clusters; else blocks sum one for all
    const int64_t rows = job.learns_rates ? job.rate_rows : 0, width = each ? plan->program().size * shape.cluster : 1;
    const int64_t parts = each ? shape.blocks / shape.cluster : shape.blocks;
    Tensor out = empty(like, {rows, job.rate_width});
    const int32_t* index = each ? job.tables.inner : nullptr;
    if (rows)
      sum_anywhere<T>({job.rate_sums, parts, rows * width, rows, width, index, job.rate_width, scale, data<T>(out)},
                      like, settings.stream);
    return out;
  }

  BlockJob<T> job{};

 private:
  T* take(int64_t elements) {
    workspace.push_back(empty(like, {elements}));
    return data<T>(workspace.back());
  }

  LaunchSettings settings;
  std::shared_ptr<Plan> plan;
  Tensor like, number_sums;
  std::optional<Tensor> numbers_;
  LoopSettings loop_{};
  BlockShape shape{};
  std::vector<Tensor> workspace;
};

}  // namespace metafast
