#include "fusion.h"

#include <map>

#include "planned_kinds.h"

namespace metafast {
namespace {

bool halves(const Op& pool, const Grid& x) {
  const Window& w = pool.window;
  return w.kh == 2 && w.kw == 2 && w.sy == 2 && w.sx == 2 && w.py + w.px == 0 && w.dy == 1 && w.dx == 1 &&
         pool.y.h == x.h / 2 && pool.y.w == x.w / 2;
}

}  // namespace

std::vector<Op> fused(const std::vector<Op>& ops, int output) {
  std::map<int, int> readers{{output, 1}};
  for (const Op& op : ops) {
    for (int v : op.input) ++readers[v];
  }
  const auto follows = [&](size_t k, Kind kind) {
    return k < ops.size() && ops[k].kind == kind && ops[k].input[0] == ops[k - 1].output &&
           readers[ops[k - 1].output] == 1;
  };
  std::vector<Op> result;
  for (size_t k = 0; k < ops.size(); ++k) {
    Op op = ops[k];
    if (op.kind == Kind::batch_norm && follows(k + 1, Kind::relu) && follows(k + 2, Kind::max_pool2d) &&
        halves(ops[k + 2], op.x)) {
      k += 2;
      op.kind = Kind::norm_relu_pool;
      op.y = ops[k].y;
      op.output = ops[k].output;
    }
    result.push_back(op);
  }
  return result;
}

}  // namespace metafast
