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
  T* inside;  // z of the steps between, or what is kept of it behind two places that take turns
  T* g;       // the gradient of each step of a segment, where the way back reads it
  T *v, *w;   // the adjoints of theta and of the state
  T* before;  // the gradient of query losses that are judged before the way back begins
  T *u, *product, *tapes, *rest;
  double* blocks;  // of totals
  int64_t size;

  TaskMemory(const Job<T>& job, T* base) : size(0), job(job) {
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
    const int64_t z = z_size(), length = whole && job.segment > 1 ? job.segment : 1;
    const int64_t segments = whole ? this->segments() : 1;
    workspace = take(M::workspace_size(p));
    support_x = take(elements(p.input, job.support.n));
    support_y = take(job.support.targets ? elements(p.out, job.support.n) : 0);
    support_yd = take(job.support.d_targets ? elements(p.out, job.support.n) : 0);
    query_x = take(elements(p.input, job.query.n));
    query_y = take(job.query.targets ? elements(p.out, job.query.n) : 0);
    starts = take((!adapts ? 1 : segments > 1 ? segments + 1 : 2) * z);
    const int64_t turns = whole && job.kept_from > 0 ? 2 * z : 0;
    inside = take(turns + (length - 1) * (z - job.kept_from));
    g = take((job.needs_gradient ? length : 1) * p.size);
    v = take(p.size);
    w = take(rule.states * p.size);
    before = take(job.judges_before ? p.size : 0);
    u = take(p.size);
    product = take(p.size);
    const int64_t scratch = job.goal == Goal::adapt ? 0 : job.support_layouts.scratch;
    tapes = take((job.keeps_tapes ? length - 1 : 0) * job.support_layouts.kept + job.support_layouts.tape);
    rest =
        take(job.query_layouts.tape > scratch ? job.query_layouts.tape : scratch);  // the two are never alive together
    const int64_t totals = rule.kind == StepKind::plain ? 0 : max_totals * M::total_blocks(p.size);
    blocks = reinterpret_cast<double*>(take(totals * static_cast<int64_t>(sizeof(double) / sizeof(T))));
  }

  // The segments of the steps that the way back goes through.
  int segments() const { return job.steps > job.begin ? (job.steps - job.begin - 1) / job.segment + 1 : 0; }
  // Segment j has the steps first_of(j) .. first_of(j + 1) - 1. The first is the one that may be shorter: the last, of
  // which no step is taken again, is as long as can be.
  int first_of(int j) const {
    const int64_t first = job.steps - static_cast<int64_t>(segments() - j) * job.segment;
    return static_cast<int>(first > job.begin ? first : job.begin);
  }

  T* start(int j) const { return starts + j * z_size(); }
  // z after s steps, of segment j. Two places take turns where it `keeps` nothing between.
  T* place(int s, int j, bool keeps) const {
    if (s == first_of(j)) return start(j);
    if (s == first_of(j + 1)) return start(j + 1);
    const int i = s - first_of(j) - 1;
    return inside + (keeps && job.kept_from == 0 ? i : i % 2) * z_size();
  }
  // The same on the way back, from the element on that is kept.
  const T* kept_z(int s, int j) const {
    return s == first_of(j) || job.kept_from == 0 ? place(s, j, true) : part(s - first_of(j) - 1) - job.kept_from;
  }
  // Of z after step i of a segment.
  T* part(int i) const { return inside + 2 * z_size() + i * (z_size() - job.kept_from); }
  int64_t z_size() const { return (1 + job.rule.states) * job.program->size; }
  // Of a segment's step i.
  T* gradient(int i) const { return g + (job.needs_gradient ? i : 0) * job.program->size; }
  // What tangent rules do not read of it lies where the next step's begins.
  T* tape(int i) const { return tapes + (job.keeps_tapes ? i : 0) * job.support_layouts.kept; }

 private:
  const Job<T>& job;
};

}  // namespace METAFAST_NAMESPACE
