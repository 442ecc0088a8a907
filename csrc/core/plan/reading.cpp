#include "reading.h"

#include <algorithm>
#include <stdexcept>

#include "planned_kinds.h"

namespace metafast {

Reading::Reading(const Description& given) : live(given.nodes.size()), readers(given.parameters.size()) {
  std::vector<bool> wanted(given.nodes.size() + 1, false);
  wanted[given.output] = true;
  for (size_t k = given.nodes.size(); k-- > 0;) {
    if (!wanted[k + 1]) continue;
    live[k] = true;
    for (int v : given.nodes[k].input) {
      if (v >= 0) wanted[v] = true;
    }
    for (int p : given.nodes[k].param) {
      if (p >= 0) ++readers[p];
    }
  }
}

bool Reading::shares(const Node& n) const {
  return std::any_of(std::begin(n.param), std::end(n.param), [&](int p) { return p >= 0 && readers[p] > 1; });
}

InputPlacement chosen_input(const Description& given, const Reading& reading, const Layout& layout) {
  const Grid& input = given.input;
  bool contractions = true, border = input.c < layout.lanes;
  int py = -1, px = -1;
  std::vector<bool> reads(given.nodes.size() + 1, false);
  reads[0] = true;
  for (size_t k = 0; k < given.nodes.size(); ++k) {
    const Node& n = given.nodes[k];
    const bool reads_it = (n.input[0] >= 0 && reads[n.input[0]]) || (n.input[1] >= 0 && reads[n.input[1]]);
    if (!reading.lives(k) || !reads_it) continue;
    if (n.kind == Kind::flatten) {
      reads[k + 1] = true;
      border = false;
    } else if (reading.shares(n)) {
      contractions = false;
    } else if (n.kind == Kind::linear) {
      border = false;
    } else if (n.kind == Kind::conv2d) {
      const auto [y, x] = planning::Conv2d::padding(n.options);
      if (py >= 0 && (y != py || x != px)) border = false;
      py = y;
      px = x;
    } else {
      contractions = false;
    }
  }
  if (reads[given.output]) throw std::runtime_error("the model hands on its input unchanged");
  const bool dense = !layout.rows && (input.c < layout.lanes || input.h * input.w == 1);
  const bool bordered = contractions && border && py >= 0;
  return {contractions && dense && !layout.task_per_lane, bordered ? py : 0, bordered ? px : 0};
}

}  // namespace metafast
