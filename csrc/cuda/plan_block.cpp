#include "plan_block.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../core/plan/planned_kinds.h"

namespace metafast {

namespace {

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t elements(const Grid& g) { return static_cast<int64_t>(g.h) * g.w * g.ld; }

int64_t samples_of(const BlockWork& work) {
  return std::max(work.support_layout ? work.support_layout->n : 0, work.query_layout ? work.query_layout->n : 0);
}

// Elements of the inputs of a product that a block fetches, of two in a tangent pass, or of its part of their adjoint.
int64_t exchanged(const BlockWork& work) {
  int64_t largest = 0;
  const int64_t support = work.support_layout ? work.support_layout->n : 0, n = samples_of(work);
  for (int k = 0; k < work.program->n_ops && work.cluster > 1; ++k) {
    const Op& op = work.program->ops[k];
    if (!planning::makes_products(op)) continue;
    const bool divided = op.x.c > op.x.ld;
    largest = std::max(largest, divided ? op.x.ld * work.cluster * std::max(2 * support, n) : op.x.ld * n);
  }
  return largest;
}

// Quads of the largest value or adjoint.
int64_t quads(const BlockWork& work) {
  int64_t largest = 0;
  for (int k = 0; k < work.program->n_ops; ++k) {
    const Op& op = work.program->ops[k];
    largest = std::max({largest, elements(op.x), elements(op.y)});
  }
  return samples_of(work) * largest / 4;
}

bool runs(Kind kind) { return planning::offers(block_offers, kind); }

// The kinds of layers that blocks run. Of convolutions these are those of one pixel: linear layers.
std::string kinds_that_run() {
  std::vector<std::string> names{"linear"};
#define METAFAST_NAME(kind, ...) \
  if (runs(Kind::kind) && Kind::kind != Kind::conv2d) names.push_back(#kind);
  METAFAST_KINDS(METAFAST_NAME)
#undef METAFAST_NAME
  std::string list = names[0];
  for (size_t k = 1; k < names.size(); ++k) list += (k + 1 < names.size() ? ", " : " and ") + names[k];
  return list;
}

}  // namespace

std::string block_refusal(const Program& program) {
  if (program.n_values > max_values) {
    return std::to_string(program.n_values - 1) + " operations: a launch of blocks carries the tables of " +
           std::to_string(max_ops);
  }
  if (!planning::offers(block_offers, program.loss)) {
    return std::string("a loss that is ") + facts(program.loss).name + ": blocks compute their own losses";
  }
  for (int k = 0; k < program.n_ops; ++k) {
    const Op& op = program.ops[k];
    const int taps = op.window.kh * op.window.kw;
    const bool images = planning::makes_products(op) && op.x.h * op.x.w * op.y.h * op.y.w * taps > 1;
    // What is fused is told by the layer that it begins with.
    const Kind kind = op.kind == Kind::norm_relu_pool ? Kind::batch_norm : op.kind;
    if (images || !runs(op.kind)) return std::string(facts(kind).name) + ": blocks run " + kinds_that_run();
  }
  return "";
}

BlockMemory block_memory(const BlockWork& work, bool resident, int element_size) {
  const Program& p = *work.program;
  const bool meta = work.goal == Goal::meta_gradient;
  const bool back = meta || work.goal == Goal::adapt_vjp || work.goal == Goal::hvp;
  const bool all = meta && resident, streams = meta && !resident;
  const bool labelled = facts(p.loss).reads == planning::LossReads::labels;
  int64_t size = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = size;
    size += round_up(count, 16);
    if (size > INT32_MAX / 2) throw std::runtime_error("a task of more elements than any block's memory");
    return static_cast<int32_t>(at);
  };
  const auto samples = [&](const PassLayout* pass, int32_t& x, int32_t& y, int32_t& labels) {
    const int64_t n = pass ? pass->n : 0, label_size = round_up(8, element_size) / element_size;
    x = take(n * elements(p.input));
    y = take(labelled ? 0 : n * elements(p.out));
    labels = take(labelled ? n * label_size : 0);
  };
  BlockMemory m{};
  m.partials = take(max_warps);
  samples(work.support_layout, m.support_x, m.support_y, m.support_labels);
  samples(work.query_layout, m.query_x, m.query_y, m.query_labels);
  const int64_t tape = work.support_layout ? round_up(work.support_layout->tape, 16) : 0;
  m.tape_step = all && !work.first_order ? static_cast<int32_t>(tape) : 0;
  const int64_t z = p.size * (1 + work.states), gradients = p.size * (all ? work.steps : 1);
  m.theta_step = all ? static_cast<int32_t>(z) : 0;
  m.g_step = all && work.needs_gradient ? static_cast<int32_t>(p.size) : 0;
  m.tape = take(m.tape_step ? tape * work.steps : tape);
  m.theta = take(m.theta_step ? z * (work.steps + 1) : z);
  const bool gradient = work.goal != Goal::predict, apart = work.by_rule && work.needs_gradient && back;
  if (apart) m.g = take(gradients);
  m.u = take(gradient ? p.size : 0);
  if (!apart) m.g = m.g_step ? take(gradients) : m.u;
  m.record_at = work.first_order ? m.theta : m.tape;
  m.record = streams ? (work.needs_gradient && !apart ? static_cast<int32_t>(size) : m.u) - m.record_at : 0;
  m.v = take(gradient && work.goal != Goal::adapt ? p.size : 0);
  m.w = take(back ? p.size * work.states : 0);
  const int64_t scratch = back && !work.first_order ? work.support_layout->scratch : 0;
  m.rest = take(std::max(scratch, work.query_layout ? work.query_layout->tape : 0));
  m.common = take(exchanged(work));
  m.size = static_cast<int32_t>(size);
  return m;
}

BlockShape block_shape(const BlockWork& work, int64_t tasks, int threads, const BlockLimits& limits, int element_size,
                       BlockMemory& memory) {
  const bool alone = tasks * work.cluster <= limits.processors;
  memory = block_memory(work, true, element_size);
  if (!alone || static_cast<int64_t>(memory.size) * element_size > limits.shared)
    memory = block_memory(work, false, element_size);
  const int64_t bytes = static_cast<int64_t>(memory.size) * element_size;
  if (bytes > limits.shared) {
    const std::string where = work.cluster > 1 ? " in each of " + std::to_string(work.cluster) + " blocks" : "";
    throw std::runtime_error("a task takes " + std::to_string(bytes) + " bytes of shared memory" + where +
                             " and a block has " + std::to_string(limits.shared));
  }
  if (threads == 0) {
    // One quad a thread where a block has its processor to itself, else two. Where tasks take several blocks it is the
    // weights that count, of which there are more.
    const int64_t wanted = round_up(alone ? quads(work) : quads(work) / 2, 32);
    threads = static_cast<int>(std::clamp<int64_t>(wanted, 64, alone ? max_threads : 128));
    if (work.cluster > 1) threads = max_threads;
  }
  if (threads % 32 != 0 || threads < 32 || threads > max_threads) {
    throw std::runtime_error("threads=" + std::to_string(threads) + ": a block has 32, 64, ... or " +
                             std::to_string(max_threads) + " threads");
  }
  const int64_t reserved = 1024;  // of shared memory by the system, a block
  const int64_t together = std::clamp<int64_t>((limits.shared + reserved) / (bytes + reserved), 1, 2048 / threads);
  const int64_t side_by_side = std::max<int64_t>(limits.processors * together / work.cluster, 1);
  const int64_t blocks = std::min({tasks, side_by_side, int64_t{65535} / work.cluster}) * work.cluster;
  return {threads, static_cast<int32_t>(blocks), work.cluster, bytes};
}

namespace {

// Appends arrays to a piece of memory; says where they will lie.
class Writer {
 public:
  explicit Writer(uint64_t address) : address(address) {}

  template <class T>
  const T* add(const T* values, int64_t count) {
    const int64_t at = round_up(static_cast<int64_t>(bytes.size()), 16);
    bytes.resize(at + count * sizeof(T));
    if (count) std::memcpy(bytes.data() + at, values, count * sizeof(T));
    return reinterpret_cast<const T*>(address + at);
  }

  std::vector<char> bytes;

 private:
  uint64_t address;
};

void copy(const PassLayout* layout, const Program& p, PassTables& out) {
  if (!layout) return;
  out.n = layout->n;
  out.tape = layout->tape;
  out.scratch = layout->scratch;
  std::copy_n(layout->value, p.n_values, out.value);
  std::copy_n(layout->adjoint, p.n_values, out.adjoint);
  std::copy_n(layout->tangent, p.n_values, out.tangent);
  std::copy_n(layout->d_adjoint, p.n_values, out.d_adjoint);
  std::copy_n(layout->saved, p.n_ops + 1, out.saved);
}

std::vector<int32_t> outer(const Plan& plan) {
  std::vector<int32_t> out(plan.moved().size(), -1);
  for (size_t i = 0; i < plan.inner().size(); ++i) {
    const int64_t place = plan.inner()[i], size = plan.program().size;
    const size_t end = place < plan.program().common ? out.size() : place + 1;
    for (size_t at = place; plan.adapted()[i] && at < end; at += size) out[at] = static_cast<int32_t>(i);
  }
  return out;
}

}  // namespace

template <class T>
std::vector<char> block_tables(const Plan& plan, const PassLayout* support_layout, const PassLayout* query_layout,
                               uint64_t address, BlockTables& head) {
  const Program& p = plan.program();
  if (const std::string reason = block_refusal(p); !reason.empty()) throw std::runtime_error(reason);
  head = {};
  head.program = p;
  head.program.ops = nullptr;
  head.program.moving = head.program.depends = nullptr;
  std::copy_n(p.ops, p.n_ops, head.ops);
  for (Op& op : head.ops) {
    op.forward = op.backward = nullptr;
    op.offsets = nullptr;
  }
  copy(support_layout, p, head.support_layout);
  copy(query_layout, p, head.query_layout);
  Writer to(address);
  const std::vector<int32_t> places = outer(plan);
  head.inner = to.add(plan.inner().data(), plan.inner().size());
  head.outer = to.add(places.data(), places.size());
  std::vector<T> moved(places.size());
  std::transform(places.begin(), places.end(), moved.begin(), [](int32_t place) { return T(place >= 0); });
  head.moved = to.add(moved.data(), moved.size());
  return std::move(to.bytes);
}

template std::vector<char> block_tables<float>(const Plan&, const PassLayout*, const PassLayout*, uint64_t,
                                               BlockTables&);
template std::vector<char> block_tables<double>(const Plan&, const PassLayout*, const PassLayout*, uint64_t,
                                                BlockTables&);

}  // namespace metafast
