// The module metafast._C and the operators torch.ops.metafast.cpu_*, on torch's stable ABI.
#include <Python.h>

#include <cstring>

#include "call.h"
#include "facts.h"

namespace metafast {
namespace {

Tensor predict(Tensor description, int64_t isa, int64_t team_from, int64_t rank, Tensor constants, Tensor params,
               Tensor x, Tensor sizes, int64_t step) {
  return by_dtype(params, [&](auto real) {
    CpuCall<decltype(real)> call(Goal::predict, description, isa, team_from, rank, constants, x.sizes()[0]);
    call.params(params);
    call.job.query = call.samples(x, sizes);
    call.job.step = static_cast<int32_t>(step);
    call.job.query_layouts = call.pass_layouts(call.job.query, PassKind::predict);
    Tensor outputs = call.outputs(x, call.job.query.n);
    call.run(false);
    return outputs;
  });
}

std::tuple<Tensor, Tensor, Tensor> loss_and_grad(Tensor description, int64_t isa, int64_t team_from, int64_t rank,
                                                 Tensor constants, Tensor params, Tensor x, Tensor y, Tensor sizes,
                                                 int64_t step) {
  return by_dtype(params, [&](auto real) {
    using T = decltype(real);
    CpuCall<T> call(Goal::loss_and_grad, description, isa, team_from, rank, constants, x.sizes()[0]);
    auto& job = call.job;
    call.params(params);
    job.query = call.samples(x, y, sizes);
    job.step = static_cast<int32_t>(step);
    job.query_layouts = call.pass_layouts(job.query, PassKind::gradient);
    Tensor outputs = call.outputs(x, job.query.n), losses = empty(x, {job.tasks});
    Tensor grads = empty(x, {job.tasks, job.n_params});
    job.losses = data<T>(losses);
    job.grads = data<T>(grads);
    call.run(false);
    return std::make_tuple(losses, grads, outputs);
  });
}

// For a loss that is computed elsewhere: outputs, and their tangent along u [T, P].
std::tuple<Tensor, Tensor> jvp(Tensor description, int64_t isa, int64_t team_from, int64_t rank, Tensor constants,
                               Tensor params, Tensor u, Tensor x, Tensor sizes, int64_t step) {
  return by_dtype(params, [&](auto real) {
    using T = decltype(real);
    CpuCall<T> call(Goal::jvp, description, isa, team_from, rank, constants, x.sizes()[0]);
    auto& job = call.job;
    call.params(params);
    call.direction(u);
    job.support = call.samples(x, sizes);
    job.step = static_cast<int32_t>(step);
    job.support_layouts = call.pass_layouts(job.support, PassKind::gradient_and_tangent);
    Tensor tangents = call.outputs(x, job.support.n);
    job.tangents = data<T>(tangents);
    Tensor outputs = call.outputs(x, job.support.n);
    call.run(false);
    return std::make_tuple(outputs, tangents);
  });
}

// H u [T, P] of the loss, for targets y. For a loss that is computed elsewhere y is its gradient in the outputs and yd
// the tangent of that; else yd is empty.
Tensor hvp(Tensor description, int64_t isa, int64_t team_from, int64_t rank, Tensor constants, Tensor params, Tensor u,
           Tensor x, Tensor y, Tensor yd, Tensor sizes, int64_t step) {
  return by_dtype(params, [&](auto real) {
    using T = decltype(real);
    CpuCall<T> call(Goal::hvp, description, isa, team_from, rank, constants, x.sizes()[0]);
    auto& job = call.job;
    call.params(params);
    call.direction(u);
    job.support = call.samples(x, y, sizes);
    if (yd.numel()) job.support.d_targets = call.targets(yd, job.support);
    job.step = static_cast<int32_t>(step);
    job.support_layouts = call.pass_layouts(job.support, PassKind::gradient_and_tangent);
    Tensor products = empty(x, {job.tasks, job.n_params});
    job.products = data<T>(products);
    call.run(false);
    return products;
  });
}

Tensor adapt(Tensor description, int64_t isa, int64_t team_from, int64_t rank, Tensor constants, Tensor params,
             std::vector<double> rule, Tensor rates, Tensor x, Tensor y, Tensor sizes, std::vector<int64_t> loop) {
  return by_dtype(params, [&](auto real) {
    using T = decltype(real);
    CpuCall<T> call(Goal::adapt, description, isa, team_from, rank, constants, x.sizes()[0] / sets(loop));
    auto& job = call.job;
    call.loop(loop, rule, rates);
    call.params(params);
    job.support = call.support(x, y, sizes);
    job.support_layouts = call.pass_layouts(job.support, PassKind::gradient_and_tangent);
    Tensor trajectory = empty(x, {job.steps + 1, job.tasks, (1 + job.rule.states) * job.n_params});
    job.trajectory = data<T>(trajectory);
    call.run(false);
    return trajectory;
  });
}

std::tuple<Tensor, Tensor> adapt_vjp(Tensor description, int64_t isa, int64_t team_from, int64_t rank, Tensor constants,
                                     Tensor trajectory, std::vector<double> rule, Tensor rates, Tensor x, Tensor y,
                                     Tensor sizes, Tensor v, std::vector<int64_t> loop) {
  return by_dtype(trajectory, [&](auto real) {
    using T = decltype(real);
    CpuCall<T> call(Goal::adapt_vjp, description, isa, team_from, rank, constants, x.sizes()[0] / sets(loop));
    auto& job = call.job;
    call.loop(loop, rule, rates);
    job.support = call.support(x, y, sizes);
    job.support_layouts = call.pass_layouts(job.support, PassKind::gradient_and_tangent);
    job.trajectory = data<T>(trajectory);
    job.v = data<T>(v);
    job.v_everywhere = v.dim() == 3;
    const int64_t width = (1 + job.rule.states) * job.n_params, steps = job.steps + 1;
    if (trajectory.numel() != steps * job.tasks * width || trajectory.scalar_type() != v.scalar_type() ||
        v.numel() != (job.v_everywhere ? steps : 1) * job.tasks * width) {
      fail("trajectory [S+1, T, P] and v [T, P] or [S+1, T, P] do not match the model and the tasks");
    }
    Tensor grads = empty(x, {job.tasks, width});
    job.grads = data<T>(grads);
    call.run(false);
    return std::make_tuple(grads, call.rates_grad(rates, T(1)));
  });
}

// The parameters as a module holds them, and their gradients likewise.
std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor> meta_gradient(
    Tensor description, int64_t isa, int64_t team_from, int64_t rank, Tensor constants, std::vector<Tensor> params,
    std::vector<double> rule, Tensor rates, Tensor support_x, Tensor support_y, Tensor support_sizes, Tensor query_x,
    Tensor query_y, Tensor query_sizes, std::vector<int64_t> loop, std::vector<double> step_weights) {
  return by_dtype(params.at(0), [&](auto real) {
    using T = decltype(real);
    CpuCall<T> call(Goal::meta_gradient, description, isa, team_from, rank, constants, query_x.sizes()[0]);
    auto& job = call.job;
    call.params(params);
    call.loop(loop, rule, rates);
    job.weights = step_weights.data();
    job.support = call.support(support_x, support_y, support_sizes);
    job.query = call.samples(query_x, query_y, query_sizes);
    job.support_layouts = call.pass_layouts(job.support, PassKind::gradient_and_tangent);
    job.query_layouts = call.pass_layouts(job.query, PassKind::gradient);
    call.plan_memory();
    Tensor outputs = call.outputs(query_x, job.query.n), losses = empty(query_x, {job.tasks});
    job.losses = data<T>(losses);
    call.run(true);
    const T scale = T(1) / job.tasks;
    return std::make_tuple(losses, outputs, call.grads(params, scale), call.rates_grad(rates, scale));
  });
}

// Raises with the reason where the model cannot be run; else METAFAST_MEMORY_NUMBERS of a meta-gradient of so many
// tasks with n support and m query samples.
Tensor memory(Tensor description, int64_t isa, int64_t team_from, Tensor like, int64_t n, int64_t m, int64_t tasks,
              std::vector<double> rule, std::vector<int64_t> loop, std::vector<double> step_weights) {
  return by_dtype(like, [&](auto real) {
    using T = decltype(real);
    const Isa<T>* found = build<T>(isa);
    auto plan = find_plan(numbers(description), found->layout, sizeof(T));
    const PassLayout& support = plan->pass_layout(static_cast<int>(n), PassKind::gradient_and_tangent);
    const PassLayout& query = plan->pass_layout(static_cast<int>(m), PassKind::gradient);
    const PassLayout *of_support[] = {&support}, *of_query[] = {&query};
    const LoopSettings settings = loop_settings(loop);
    Job<T> job{};
    job.program = &plan->program();
    job.support.n = static_cast<int32_t>(n);
    job.query.n = static_cast<int32_t>(m);
    job.goal = Goal::meta_gradient;
    job.inner = plan->inner().data();
    job.n_params = static_cast<int64_t>(plan->inner().size());
    job.tasks = tasks;
    job.steps = static_cast<int32_t>(settings.steps);
    job.first_order = settings.first_order;
    job.learns_rates = settings.learns_rates;
    job.one_rate = settings.one_rate && rule.empty();
    job.weights = step_weights.data();
    read_rule(rule, job.rule);
    job.support_layouts = {of_support, support.tape, support.scratch, support.kept};
    job.query_layouts = {of_query, query.tape, 0, 0};
    const int64_t budget = keep_within(job, settings), team = found->team_workspace(job, team_from);
    const int64_t chunk = chunk_of(tasks), chunks = (tasks + chunk - 1) / chunk;
    const LaneGroups<T> groups(*found, numbers(description), job, chunk, side_by_side(chunks), budget);
    const bool some = groups.chunks() > 0;
    MemoryNumbers answer{};
    answer.task_memory = static_cast<double>(found->memory(job));
    answer.shared = static_cast<double>((chunks * (job.learns_rates ? 2 : 1) + 2) * job.program->size);
    answer.team_workspace = static_cast<double>(team);
    answer.lanes_memory = static_cast<double>(some ? found->lanes_memory(groups.job) : 0);
    answer.chunks = static_cast<double>(chunks);
    answer.lanes = static_cast<double>(some ? groups.lanes : 0);
    answer.keeps_tapes = job.keeps_tapes;
    answer.begin = job.begin;
    answer.segment = job.segment;
    Tensor out = empty(description, {sizeof answer / sizeof(double)});
    std::memcpy(out.data_ptr(), &answer, sizeof answer);
    return out;
  });
}

}  // namespace

// What every operator begins with: the model in numbers, and how it is run.
#define METAFAST_MODEL "Tensor description, int isa, int team_from, int rank, Tensor constants, "

STABLE_TORCH_LIBRARY(metafast, m) {
  m.def("cpu_predict(" METAFAST_MODEL "Tensor params, Tensor x, Tensor sizes, int step) -> Tensor");
  m.def("cpu_loss_and_grad(" METAFAST_MODEL
        "Tensor params, Tensor x, Tensor y, Tensor sizes, int step) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_jvp(" METAFAST_MODEL "Tensor params, Tensor u, Tensor x, Tensor sizes, int step) -> (Tensor, Tensor)");
  m.def("cpu_hvp(" METAFAST_MODEL
        "Tensor params, Tensor u, Tensor x, Tensor y, Tensor yd, Tensor sizes, int step) -> Tensor");
  m.def("cpu_adapt(" METAFAST_MODEL
        "Tensor params, float[] rule, Tensor rates, Tensor x, Tensor y, Tensor sizes, int[] loop) -> Tensor");
  m.def("cpu_adapt_vjp(" METAFAST_MODEL
        "Tensor trajectory, float[] rule, Tensor rates, Tensor x, Tensor y, Tensor sizes, Tensor v, int[] loop) "
        "-> (Tensor, Tensor)");
  m.def("cpu_meta_gradient(" METAFAST_MODEL
        "Tensor[] params, float[] rule, Tensor rates, Tensor support_x, Tensor support_y, Tensor support_sizes, "
        "Tensor query_x, Tensor query_y, Tensor query_sizes, int[] loop, float[] step_weights) "
        "-> (Tensor, Tensor, Tensor[], Tensor)");
  m.def(
      "cpu_memory(Tensor description, int isa, int team_from, Tensor like, int n, int m, int tasks, float[] rule, "
      "int[] loop, float[] step_weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("cpu_predict", TORCH_BOX(&predict));
  m.impl("cpu_loss_and_grad", TORCH_BOX(&loss_and_grad));
  m.impl("cpu_jvp", TORCH_BOX(&jvp));
  m.impl("cpu_hvp", TORCH_BOX(&hvp));
  m.impl("cpu_adapt", TORCH_BOX(&adapt));
  m.impl("cpu_adapt_vjp", TORCH_BOX(&adapt_vjp));
  m.impl("cpu_meta_gradient", TORCH_BOX(&meta_gradient));
  m.impl("cpu_memory", TORCH_BOX(&memory));
}

// Names of the builds for this processor, the best first.
PyObject* isas(PyObject*, PyObject*) {
  int count = 0;
  const char* const* names = isa_names(count);
  PyObject* tuple = PyTuple_New(count);
  for (int i = 0; tuple && i < count; ++i) PyTuple_SetItem(tuple, i, PyUnicode_FromString(names[i]));
  return tuple;
}

// trace(True) begins to note what calls do; trace(False) ends it and gives the spans, records as `facts` describes
// them.
PyObject* trace(PyObject*, PyObject* on) {
  const int wanted = PyObject_IsTrue(on);
  if (wanted < 0) return nullptr;
  if (wanted) {
    start_tracing();
    Py_RETURN_NONE;
  }
  const std::vector<Span> spans = stop_tracing();
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(spans.data()), spans.size() * sizeof(Span));
}

}  // namespace metafast

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"isas", metafast::isas, METH_NOARGS, "Builds for this processor, the best first."},
                                  {"trace", metafast::trace, METH_O, "True: note what calls do; False: the notes."},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "The executors in C++ and CUDA.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* made = PyModule_Create(&module);
  if (made) PyModule_AddStringConstant(made, "compiled", "compiler " __VERSION__ ", flags " METAFAST_FLAGS);
  if (made) PyModule_AddStringConstant(made, "facts", metafast::facts_as_json().c_str());
  return made;
}
