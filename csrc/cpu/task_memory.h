// Where a task keeps things in the memory of its thread, or of its team.
#pragma once
#include "../core/asan.h"
#include "../core/job.h"
#include "contract/contract.h"
#include "lane_machine.h"

namespace METAFAST_NAMESPACE {

// Made from a null base it gives the size. z is theta and the vectors of the state.
template <class M>
struct TaskMemory {
  using T = typename M::Real;
  T *workspace, *support_x, *support_y, *support_yd, *query_x, *query_y;
  T* starts;  // z where each segment begins, and where the last one ends
  T* inside;  // z of the steps between
  T* g;       // the gradient of each step of a segment, where the way back reads it
  T *v, *w;   // the adjoints of theta and of the state
  T* before;  // the gradient of query losses that are judged before the way back begins
  T *u, *product, *tapes, *rest;
  double* blocks;  // of totals
  int64_t size;

  TaskMemory(const Job<T>& job, T* base) : size(0) {
    const Program& p = *job.program;
    const StepRule<T>& rule = job.rule;
    const auto take = [&](int64_t elements) {
      T* at = base ? base + size : nullptr;
      const int64_t whole = (elements + 15) / 16 * 16;
      if (base) {
        allow(at, whole * sizeof(T));
        forbid(at + whole, gap * sizeof(T));
      }
      size += whole + gap;
      return at;
    };
    const auto elements = [](const Grid& g, int n) { return static_cast<int64_t>(n) * g.h * g.w * g.ld; };
    const bool whole = job.goal == Goal::meta_gradient, adapts = whole || job.goal == Goal::adapt;
    const int64_t z = (1 + rule.states) * p.size, length = whole && job.segment > 1 ? job.segment : 1;
    const int64_t segments = whole ? (job.steps - job.begin + length - 1) / length : 1;
    workspace = take(M::workspace_size(p));
    support_x = take(elements(p.input, job.support.n));
    support_y = take(job.support.targets ? elements(p.out, job.support.n) : 0);
    support_yd = take(job.support.d_targets ? elements(p.out, job.support.n) : 0);
    query_x = take(elements(p.input, job.query.n));
    query_y = take(job.query.targets ? elements(p.out, job.query.n) : 0);
    starts = take((!adapts ? 1 : segments > 1 ? segments + 1 : 2) * z);
    inside = take((length - 1) * z);
    g = take((job.needs_gradient ? length : 1) * p.size);
    v = take(p.size);
    w = take(rule.states * p.size);
    before = take(job.judges_before ? p.size : 0);
    u = take(p.size);
    product = take(p.size);
    const int64_t scratch = job.goal == Goal::adapt ? 0 : job.support_layouts.scratch;
    tapes = take((job.keeps_tapes ? length : 1) * job.support_layouts.tape);
    rest =
        take(job.query_layouts.tape > scratch ? job.query_layouts.tape : scratch);  // the two are never alive together
    const int64_t totals = rule.kind == StepKind::plain ? 0 : max_totals * M::total_blocks(p.size);
    blocks = reinterpret_cast<double*>(take(totals * static_cast<int64_t>(sizeof(double) / sizeof(T))));
  }
};

}  // namespace METAFAST_NAMESPACE
