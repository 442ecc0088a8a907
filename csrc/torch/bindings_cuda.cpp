// The operators torch.ops.metafast.cuda_*: tasks run by thread blocks on a GPU or, on CPU tensors, by their twin.
#include <cstring>

#include "cuda_call.h"

namespace metafast {

#ifndef METAFAST_CUDA
void cuda_upload(void*, const void*, int64_t, Queue) { fail("built without CUDA"); }
void cuda_run(const BlockJob<float>&, const BlockShape&, Queue) { fail("built without CUDA"); }
void cuda_sum(const Sum<float>&, Queue) { fail("built without CUDA"); }
#endif

namespace {

Tensor predict(Tensor description, Tensor head, std::vector<int64_t> settings, Tensor params, Tensor x, int64_t step) {
  return by_dtype(params, [&](auto real) {
    CudaCall<decltype(real)> call(Goal::predict, description, head, settings, x);
    call.params(params);
    call.job.query = call.samples(x, nullptr);
    call.job.first = step;
    Tensor outputs = call.outputs();
    call.run(false);
    return outputs;
  });
}

std::tuple<Tensor, Tensor, Tensor> loss_and_grad(Tensor description, Tensor head, std::vector<int64_t> settings,
                                                 Tensor params, Tensor x, Tensor y, int64_t step) {
  return by_dtype(params, [&](auto real) {
    CudaCall<decltype(real)> call(Goal::loss_and_grad, description, head, settings, x);
    call.params(params);
    call.job.query = call.samples(x, &y);
    call.job.first = step;
    Tensor losses = call.losses(), grads = call.grads(), outputs = call.outputs();
    call.run(false);
    return std::make_tuple(losses, grads, outputs);
  });
}

// H u [T, P] of the loss on the support sets; of u [T, P] the adapted parameters count.
Tensor hvp(Tensor description, Tensor head, std::vector<int64_t> settings, Tensor params, Tensor u, Tensor x, Tensor y,
           int64_t step) {
  return by_dtype(params, [&](auto real) {
    using T = decltype(real);
    CudaCall<T> call(Goal::hvp, description, head, settings, x);
    auto& job = call.job;
    call.params(params);
    job.steps = 1;  // the way back through it
    job.first = step;
    job.support = call.samples(x, &y);
    call.expect_here(u, job.tasks * job.n_params, "u");
    job.v = data<T>(u);
    Tensor products = call.grads();
    call.run(false);
    return products;
  });
}

Tensor adapt(Tensor description, Tensor head, std::vector<int64_t> settings, Tensor params, std::vector<double> rule,
             Tensor rates, Tensor x, Tensor y, std::vector<int64_t> loop) {
  return by_dtype(params, [&](auto real) {
    CudaCall<decltype(real)> call(Goal::adapt, description, head, settings, x, sets(loop));
    auto& job = call.job;
    call.loop(loop, rule, rates);
    job.learns_rates = false;
    call.params(params);
    job.support = call.support(x, y);
    Tensor trajectory = empty(x, {job.steps + 1, job.tasks, call.z_size()});
    job.trajectory = data<decltype(real)>(trajectory);
    call.run(false);
    return trajectory;
  });
}

std::tuple<Tensor, Tensor> adapt_vjp(Tensor description, Tensor head, std::vector<int64_t> settings, Tensor trajectory,
                                     std::vector<double> rule, Tensor rates, Tensor x, Tensor y, Tensor v,
                                     std::vector<int64_t> loop) {
  return by_dtype(trajectory, [&](auto real) {
    using T = decltype(real);
    CudaCall<T> call(Goal::adapt_vjp, description, head, settings, x, sets(loop));
    auto& job = call.job;
    call.loop(loop, rule, rates);
    const int64_t rows = job.steps + 1, row = job.tasks * call.z_size();
    job.support = call.support(x, y);
    job.v_everywhere = v.dim() == 3;
    call.expect_here(trajectory, rows * row, "trajectory");
    call.expect_here(v, (job.v_everywhere ? rows : 1) * row, "v");
    job.trajectory = data<T>(trajectory);
    job.v = data<T>(v);
    Tensor grads = call.grads();
    call.run(false);
    return std::make_tuple(grads, call.rates_grad(T(1)));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> meta_gradient(Tensor description, Tensor head, std::vector<int64_t> settings,
                                                         Tensor params, std::vector<double> rule, Tensor rates,
                                                         Tensor support_x, Tensor support_y, Tensor query_x,
                                                         Tensor query_y, Tensor step_weights,
                                                         std::vector<int64_t> loop) {
  return by_dtype(params, [&](auto real) {
    using T = decltype(real);
    CudaCall<T> call(Goal::meta_gradient, description, head, settings, query_x);
    auto& job = call.job;
    if (params.dim() != 1) fail("a meta-gradient is of parameters [P] that all tasks share");
    call.loop(loop, rule, rates);
    call.params(params);
    call.weights(step_weights);
    job.support = call.support(support_x, support_y);
    job.query = call.samples(query_x, &query_y);
    Tensor outputs = call.outputs(), losses = call.losses();
    call.run(true);
    const T scale = T(1) / job.tasks;
    return std::make_tuple(losses, outputs, call.grad(scale), call.rates_grad(scale));
  });
}

// The tables of a model for so many samples, where `like` is, and on the CPU the head that points to them.
std::tuple<Tensor, Tensor> tables(Tensor description, Tensor like, int64_t support, int64_t query, bool predicts,
                                  int64_t cluster, int64_t stream) {
  return by_dtype(like, [&](auto real) {
    const auto plan = block_plan<decltype(real)>(description, cluster);
    const PassLayouts layouts(*plan, support, query, predicts);
    BlockTables head;
    const int64_t size = block_tables<decltype(real)>(*plan, layouts.support, layouts.query, 0, head).size();
    Tensor out = empty(like, {size / static_cast<int64_t>(sizeof(real)) + 1});
    Tensor out_head = empty(description, {static_cast<int64_t>(sizeof head / sizeof(double)) + 1});
    const auto address = reinterpret_cast<uint64_t>(out.data_ptr());
    const auto bytes = block_tables<decltype(real)>(*plan, layouts.support, layouts.query, address, head);
    std::memcpy(out_head.data_ptr(), &head, sizeof head);
    if (like.is_cuda()) {
      cuda_upload(out.data_ptr(), bytes.data(), size, queue(like, stream));
    } else {
      std::memcpy(out.data_ptr(), bytes.data(), size);
    }
    return std::make_tuple(out, out_head);
  });
}

// Bytes of shared memory that a task takes at least, in each of `cluster` blocks: for a meta-gradient; without a query
// set, for steps and the way back; without a support set, for a gradient or a prediction. Raises with the reason where
// blocks cannot run the model.
int64_t needs(Tensor description, bool in_double, int64_t support, int64_t query, bool predicts, int64_t cluster,
              std::vector<double> rule) {
  const auto plan = in_double ? block_plan<double>(description, cluster) : block_plan<float>(description, cluster);
  const std::string reason = block_refusal(plan->program());
  if (!reason.empty()) fail(reason);
  const PassLayouts layouts(*plan, support, query, predicts);
  const int size = in_double ? 8 : 4;
  const Goal alone = predicts ? Goal::predict : support ? Goal::adapt_vjp : Goal::loss_and_grad;
  Job<float> job{};
  job.goal = support && query ? Goal::meta_gradient : alone;
  job.steps = 1;
  job.learns_rates = support > 0;
  read_rule(rule, job.rule);
  job.needs_gradient = needs_gradient(job);
  const BlockWork work = block_work(job, plan->program(), layouts, static_cast<int>(cluster));
  return int64_t{size} * block_memory(work, false, size).size;
}

// How a meta-gradient of so many tasks is launched: threads in a block, blocks, bytes of shared memory in each, and
// bytes that each keeps of an inner step in global memory; zero: none, all steps stay in shared memory.
std::tuple<int64_t, int64_t, int64_t, int64_t> launch(Tensor description, bool in_double, std::vector<int64_t> settings,
                                                      int64_t tasks, int64_t support, int64_t query,
                                                      std::vector<double> rule, std::vector<int64_t> loop) {
  const LaunchSettings m(settings);
  const auto plan = in_double ? block_plan<double>(description, m.cluster) : block_plan<float>(description, m.cluster);
  const PassLayouts layouts(*plan, support, query, false);
  const int size = in_double ? 8 : 4;
  Job<float> job{};
  job.goal = Goal::meta_gradient;
  read_loop(loop, rule, job);
  BlockMemory memory;
  const BlockShape shape =
      block_shape(block_work(job, plan->program(), layouts, m.cluster), tasks, m.threads, m.limits, size, memory);
  return {shape.threads, shape.blocks, shape.bytes, int64_t{size} * memory.record};
}

bool built() {
#ifdef METAFAST_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(metafast, m) {
  m.def("cuda_predict(Tensor description, Tensor head, int[] settings, Tensor params, Tensor x, int step) -> Tensor");
  m.def(
      "cuda_loss_and_grad(Tensor description, Tensor head, int[] settings, Tensor params, Tensor x, Tensor y, int "
      "step) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_hvp(Tensor description, Tensor head, int[] settings, Tensor params, Tensor u, Tensor x, Tensor y, int "
      "step) "
      "-> Tensor");
  m.def(
      "cuda_adapt(Tensor description, Tensor head, int[] settings, Tensor params, float[] rule, Tensor rates, Tensor "
      "x, "
      "Tensor y, int[] loop) -> Tensor");
  m.def(
      "cuda_adapt_vjp(Tensor description, Tensor head, int[] settings, Tensor trajectory, float[] rule, Tensor rates, "
      "Tensor x, Tensor y, Tensor v, int[] loop) -> (Tensor, Tensor)");
  m.def(
      "cuda_meta_gradient(Tensor description, Tensor head, int[] settings, Tensor params, float[] rule, Tensor rates, "
      "Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, Tensor step_weights, int[] loop) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_tables(Tensor description, Tensor like, int support, int query, bool predicts, int cluster, int stream) "
      "-> (Tensor, Tensor)");
  m.def(
      "cuda_needs(Tensor description, bool in_double, int support, int query, bool predicts, int cluster, "
      "float[] rule) -> int");
  m.def(
      "cuda_launch(Tensor description, bool in_double, int[] settings, int tasks, int support, int query, "
      "float[] rule, int[] loop) -> (int, int, int, int)");
  m.def("cuda_built() -> bool");
}

template <class Library>
void implement(Library& m) {
  m.impl("cuda_predict", TORCH_BOX(&predict));
  m.impl("cuda_loss_and_grad", TORCH_BOX(&loss_and_grad));
  m.impl("cuda_hvp", TORCH_BOX(&hvp));
  m.impl("cuda_adapt", TORCH_BOX(&adapt));
  m.impl("cuda_adapt_vjp", TORCH_BOX(&adapt_vjp));
  m.impl("cuda_meta_gradient", TORCH_BOX(&meta_gradient));
  m.impl("cuda_tables", TORCH_BOX(&tables));
}

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  implement(m);
  m.impl("cuda_needs", TORCH_BOX(&needs));
  m.impl("cuda_launch", TORCH_BOX(&launch));
}

STABLE_TORCH_LIBRARY_IMPL(metafast, CUDA, m) { implement(m); }

STABLE_TORCH_LIBRARY_IMPL(metafast, CompositeExplicitAutograd, m) { m.impl("cuda_built", TORCH_BOX(&built)); }

}  // namespace metafast
