// Where a pass keeps things. What must outlive the pass has a place of its own; the rest shares memory by lifetime.
#include <algorithm>

#include "../asan.h"
#include "plan.h"
#include "planned_kinds.h"

namespace metafast {

using planning::Reads;

namespace {

struct Interval {
  int64_t* offset;
  int64_t size;
  int born, dies;  // both inclusive
  bool stays;      // after the pass
  int64_t end() const { return *offset + size; }
};

struct Height {
  int64_t all, staying;
};

// Places intervals so that no two alive at once overlap, each as low as it can behind its gap, and lowest what stays;
// returns the heights. Where there are gaps, nothing shares memory, so that they stay where they are.
Height arrange(std::vector<Interval>& intervals) {
  for (Interval& one : intervals) {
    one.size += gap;
    if (gap > 0) {
      one.born = 0;
      one.dies = INT32_MAX;
      one.stays = true;
    }
  }
  std::stable_sort(intervals.begin(), intervals.end(),
                   [](const Interval& a, const Interval& b) { return a.stays != b.stays ? a.stays : a.size > b.size; });
  std::vector<const Interval*> placed;  // by offset
  Height height{};
  for (Interval& one : intervals) {
    int64_t at = 0;
    for (const Interval* other : placed) {
      if (other->dies < one.born || one.dies < other->born) continue;
      if (at + one.size <= *other->offset) break;
      at = std::max(at, other->end());
    }
    *one.offset = at;
    height.all = std::max(height.all, one.end());
    if (one.stays) height.staying = height.all;
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &one,
                                   [](const Interval* a, const Interval* b) { return *a->offset < *b->offset; }),
                  &one);
  }
  for (Interval& one : intervals) *one.offset += gap;
  return height;
}

bool reads(const Op& op, Reads which) { return facts(op.kind).reads == which; }

bool has_second_derivative(const Op& op) {
  return facts(op.kind).second_derivative == planning::SecondDerivative::nonzero;
}

}  // namespace

bool Plan::multiplies_constants(const Op& op) const { return planning::makes_products(op) && !depends_[op.input[0]]; }

const PassLayout& Plan::pass_layout(int n, PassKind kind) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& slot = layouts_[{n, static_cast<int>(kind)}];
  if (!slot) {
    slot = std::make_unique<OwnedPassLayout>();
    build_pass_layout(n, kind, *slot);
  }
  return slot->layout;
}

// Time runs through the forward rules 0 .. L-1, the loss at L, and the backward rules of L-1 .. 0 at L+1 .. 2L. Tangent
// rules read of the values what the backward rules read.
void Plan::build_pass_layout(int n, PassKind kind, OwnedPassLayout& out) const {
  const int values = static_cast<int>(grids_.size()), L = static_cast<int>(ops_.size()), end = 2 * L + 1;
  for (auto* v : {&out.value, &out.adjoint, &out.tangent, &out.d_adjoint}) v->assign(values, -1);
  out.saved.assign(L + 1, -1);
  std::vector<int> made(values, 0), first_reader(values, L), last_reader(values, -1), needed(values, 0),
      tangent_needed(values, 0);
  std::vector<bool> followed(values, false);  // do tangent rules read it?
  const int output = program_.output;
  const bool backward = kind != PassKind::predict;
  for (int k = 0; k < L; ++k) {
    const Op& op = ops_[k];
    made[op.output] = k;
    for (int v : op.input) {
      if (v < 0) continue;
      first_reader[v] = std::min(first_reader[v], k);
      last_reader[v] = std::max(last_reader[v], k);
      const bool read_again = backward && depends_[op.output] && reads(op, Reads::input);
      needed[v] = std::max(needed[v], read_again ? 2 * L - k : k);
      if (read_again) followed[v] = true;
      if (has_second_derivative(op)) tangent_needed[v] = std::max(tangent_needed[v], 2 * L - k);
      tangent_needed[v] = std::max(tangent_needed[v], k);
    }
    if (backward && reads(op, Reads::output)) {
      needed[op.output] = std::max(needed[op.output], 2 * L - k);
      followed[op.output] = true;
    }
  }
  needed[output] = std::max(needed[output], L + 1);
  tangent_needed[output] = std::max(tangent_needed[output], L);
  last_reader[output] = L;

  const auto size = [&](int v) {
    return (static_cast<int64_t>(n) * grids_[v].h * grids_[v].w * grids_[v].ld + 15) / 16 * 16;
  };
  const bool with_tangent = kind == PassKind::gradient_and_tangent;
  std::vector<Interval> tape, scratch;
  std::vector<int> in_place;  // values whose adjoints take their place
  // `stays`: for tangent rules that read it.
  const auto keep = [&](int64_t& offset, int64_t elements, int born, int dies, bool stays) {
    stays = stays && with_tangent;
    if (elements > 0) tape.push_back({&offset, (elements + 15) / 16 * 16, born, stays ? end : dies, stays});
  };
  const planning::PlannedPass pass{n, kind, element_size_};
  for (int k = 0; k < L; ++k) {
    int64_t saved = 0;
    planning::with_every_rule(ops_[k].kind, [&](auto rules) { saved = rules.saved_elements(ops_[k], pass); });
    keep(out.saved[k], saved, k, backward ? 2 * L - k : k, true);
  }
  for (const Op& op : ops_) {
    const int v = op.output;
    const int adjoint_born = 2 * L - last_reader[v], adjoint_dies = 2 * L - made[v];
    const bool has_adjoint = backward && (with_tangent ? moving_[v] : depends_[v]);
    const bool shares_place = has_adjoint && !with_tangent && last_reader[v] < L && first_reader[v] == last_reader[v] &&
                              needed[v] == adjoint_born &&
                              facts(ops_[last_reader[v]].kind).adjoint == planning::Adjoint::in_place;
    if (shares_place) in_place.push_back(v);
    keep(out.value[v], size(v), made[v], shares_place ? adjoint_dies : needed[v], followed[v]);
    if (has_adjoint && !shares_place) {
      const bool read = v == output || (has_second_derivative(op) && !multiplies_constants(op));
      keep(out.adjoint[v], size(v), adjoint_born, adjoint_dies, read);
    }
    if (with_tangent && moving_[v]) scratch.push_back({&out.tangent[v], size(v), made[v], tangent_needed[v], false});
    if (with_tangent && depends_[v]) scratch.push_back({&out.d_adjoint[v], size(v), adjoint_born, adjoint_dies, false});
  }
  const Grid& o = program_.out;
  if (planning::saves(program_.loss)) keep(out.saved[L], pass.elements(o), L, L, true);
  const Height height = arrange(tape), scratch_height = arrange(scratch);
  for (int v : in_place) out.adjoint[v] = out.value[v];
  out.layout = {
      n,          out.value.data(),   out.adjoint.data(), out.saved.data(), out.tangent.data(), out.d_adjoint.data(),
      height.all, scratch_height.all, height.staying};
}

}  // namespace metafast
