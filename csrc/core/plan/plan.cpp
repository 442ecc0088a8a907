#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "description.h"
#include "fusion.h"
#include "planned_kinds.h"
#include "reading.h"

namespace metafast {

namespace {

int round_up(int value, int step) { return (value + step - 1) / step * step; }

[[noreturn]] void refuse(const std::string& reason) { throw std::runtime_error(reason); }

// Elements of a parameter in the user's vector by (row, channel, y, x), each in its place of the inner one.
struct Placement {
  int rows, c, h, w, ld;
  int columns;  // > 0: rows are so many columns, padded, of panels (a weight); 0: `stride` apart (a vector a row)
  int64_t stride, size;
  bool operator==(const Placement& o) const {
    return rows == o.rows && c == o.c && h == o.h && w == o.w && ld == o.ld && columns == o.columns;
  }
};

}  // namespace

class PlanBuilder {
 public:
  PlanBuilder(Plan& plan, const std::vector<double>& numbers) : plan(plan), given(numbers) {
    plan.program_.loss = given.loss;
  }

  void run() {
    place_input();
    for (size_t k = 0; k < nodes.size(); ++k) {
      if (reading.lives(k)) add_node(static_cast<int>(k));
    }
    if (plan.reads_labels() && flat[output] && !plan.layout_.rows) make_vector(output, output - 1);
    plan.ops_ = fused(plan.ops_, value_of[output]);
    finish();
  }

 private:
  void place_input() {
    const InputPlacement placement = chosen_input(given, reading, plan.layout_);
    Grid input = given.input;
    input.ld = placement.packed ? input.c : padded(input.c);
    Program& p = plan.program_;
    p.border_y = placement.border_y;
    p.border_x = placement.border_x;
    input.h += 2 * p.border_y;
    input.w += 2 * p.border_x;
    p.input = input;
    plan.grids_ = {input};
    value_of.assign(nodes.size() + 1, 0);
    flat.assign(nodes.size() + 1, false);
    flat[0] = input.h * input.w == 1;
    moves = {false};
    depends = {false};
  }

  // What `make` of a kind of layer is told of its node, and asks for.
  class NodeBuilder {
   public:
    NodeBuilder(PlanBuilder& builder, int k) : builder(builder), node(builder.nodes[k]), k(k) {}

    // The next of the options, in the order in which the layer's Python class writes them.
    double real() {
      if (has_read_all()) refuse("a layer of fewer options than its kind has: build metafast._C again");
      return node.options[read_options++];
    }
    bool has_read_all() const { return read_options == node.options.size(); }
    int integer() { return static_cast<int>(real()); }
    bool flag() { return real() != 0; }
    template <class... Integers>
    void read(Integers&... values) {
      ((values = integer()), ...);
    }

    // Is the input [n, features], and not an image? The same of the second input.
    bool is_vector() const { return builder.flat[node.input[0]]; }
    bool other_is_vector() const { return builder.flat[node.input[1]]; }
    const Grid& other() const { return builder.plan.grids_[builder.value_of[node.input[1]]]; }
    void makes_vector(bool vector) { builder.flat[k + 1] = vector; }
    // Is the input the model's, stored with the border that convolutions want?
    bool has_border() const {
      const Program& p = builder.plan.program_;
      return builder.value_of[node.input[0]] == 0 && p.border_y + p.border_x > 0;
    }

    // An image as one pixel of all its features.
    Grid as_vector(const Grid& x) const {
      const Layout& l = builder.plan.layout_;
      const int inputs = x.h * x.w * x.ld;
      return {1, 1, l.task_per_lane ? inputs / l.lanes : inputs, inputs};
    }
    // What a product makes, whose features blocks may share.
    Grid product(int h, int w, int outputs) const { return {h, w, outputs, builder.features(k, outputs)}; }
    Grid pooled(const Grid& x, const Window& w, bool ceil) const {
      const auto outputs = [&](int in, int size, int step, int pad, int spread) {
        const int reach = in + 2 * pad - spread * (size - 1) - 1;
        int count = (reach + (ceil ? step - 1 : 0)) / step + 1;
        if (ceil && (count - 1) * step >= in + pad) --count;  // a window must begin inside the image or its padding
        return count;
      };
      const Grid y{outputs(x.h, w.kh, w.sy, w.py, w.dy), outputs(x.w, w.kw, w.sx, w.px, w.dx), x.c, x.ld};
      if (y.h < 1 || y.w < 1) refuse("a pooling whose window is larger than its padded input");
      return y;
    }

    // Places of parameters. The weight of a product, [outputs, x.c, h, w].
    Slot weight(const Grid& x, int outputs, int h, int w) {
      return builder.place(node.param[0], {outputs, x.c, h, w, builder.whole(x), builder.columns(outputs), 0, 0});
    }
    // Its bias, [outputs].
    Slot by_output(const Grid& y) { return builder.place(node.param[1], {1, y.c, 1, 1, y.ld, 0, 0, 0}); }
    // Parameter `which` as [rows, channels], a row for each inner step or one for all, or as [channels, height, width].
    Slot by_channel(int which, int rows) {
      const Grid& x = input();
      return builder.place(node.param[which], {rows, x.c, 1, 1, x.ld, 0, 0, 0});
    }
    Slot by_feature(int which) {
      const Grid& x = input();
      return builder.place(node.param[which], {1, x.c, x.h, x.w, x.ld, 0, 0, 0});
    }
    // The place of the node's constants, [2, channels].
    int64_t constants() {
      Plan& plan = builder.plan;
      const Grid& x = input();
      const int64_t at = plan.constants_size_;
      plan.constants_.push_back({node.constants, at, x.c, x.ld});
      plan.constants_size_ += 2 * x.ld;
      return at;
    }

    [[noreturn]] void refuse(const std::string& reason) const { throw std::runtime_error(reason); }

   private:
    const Grid& input() const { return builder.plan.grids_[builder.value_of[node.input[0]]]; }

    PlanBuilder& builder;
    const Node& node;
    const int k;
    size_t read_options = 0;
  };

  void add_node(int k) {
    const Node& n = nodes[k];
    const int in = n.input[0];
    flat[k + 1] = n.kind == Kind::flatten || flat[in];
    if (n.kind == Kind::flatten) {
      value_of[k + 1] = value_of[in];
      return;
    }
    if (wants_vectors(n)) {
      for (int v : n.input) make_vector(v, k);
    }
    Op op = operation(planning::operation(n.kind), k, value_of[in]);
    op.input[1] = n.input[1] < 0 ? -1 : value_of[n.input[1]];
    NodeBuilder node(*this, k);
    bool made = false;
    planning::with_maker(n.kind, [&](auto maker) {
      maker.make(node, op);
      made = node.has_read_all();
    });
    if (!made) refuse("a layer of another kind, or of other options, than this build knows: build metafast._C again");
    add_op(op, n.param);
    value_of[k + 1] = op.output;
  }

  // Of node k, without parameters and as yet without a second input.
  Op operation(Kind kind, int k, int input) const {
    Op op{};
    op.kind = kind;
    op.node = k;
    op.input[0] = input;
    op.input[1] = -1;
    op.x = op.y = plan.grids_[input];
    op.weight.at = op.bias.at = -1;
    return op;
  }

  const Grid& grid_of(int v) const { return plan.grids_[value_of[v]]; }

  // Must it have its flattened images as vectors? Else it reads them as they lie in memory, and blocks always do.
  bool wants_vectors(const Node& n) const {
    const int a = n.input[0], b = n.input[1];
    if (!flat[a] || plan.layout_.rows) return false;
    if (b < 0) return n.kind == Kind::batch_norm || reading.shares(n);
    const Grid &x = grid_of(a), &y = grid_of(b);
    return flat[b] && (x.h != y.h || x.w != y.w || x.c != y.c);
  }

  // Sorts the features of a flattened image as the user has them, before node k, for all that read them from there on.
  void make_vector(int v, int k) {
    if (v < 0 || grid_of(v).h * grid_of(v).w == 1) return;
    Op op = operation(Kind::vector, k, value_of[v]);
    const int features = op.x.h * op.x.w * op.x.c;
    op.y = {1, 1, features, padded(features)};
    add_op(op, {-1, -1});
    value_of[v] = op.output;
  }

  void add_op(Op& op, const int (&params)[2]) {
    op.output = static_cast<int>(plan.grids_.size());
    plan.grids_.push_back(op.y);
    bool depend = false, move = false;
    for (int v : op.input) {
      if (v < 0) continue;
      depend |= depends[v];
      move |= moves[v];
    }
    for (int p : params) {
      if (p < 0) continue;
      depend = true;
      move |= parameters[p].adapted;
    }
    if (planning::makes_products(op) && !plan.layout_.rows && !plan.layout_.task_per_lane)
      plan.tables_.tabulate(op, depends[op.input[0]]);
    depends.push_back(depend);
    moves.push_back(move);
    plan.ops_.push_back(op);
  }

  // Elements from pixel to pixel of so many channels.
  int padded(int channels) const {
    const Layout& l = plan.layout_;
    return l.task_per_lane ? channels * l.lanes : round_up(channels, l.lanes);
  }

  int columns(int outputs) const {
    if (plan.layout_.task_per_lane) return outputs;
    const int packs = share(outputs) / plan.layout_.lanes;
    return (plan.layout_.rows ? packs | 1 : packs) * plan.layout_.lanes;
  }

  // Of the columns of a weight those that one block has.
  int share(int outputs) const {
    const Layout& l = plan.layout_;
    return round_up(outputs, l.lanes * l.blocks) / l.blocks;
  }

  // From sample to sample of what node k makes. A divided value is known by its having more features.
  int features(int k, int outputs) const {
    const Layout& l = plan.layout_;
    const bool divided = divisible[k + 1] && l.blocks > 1 && outputs > l.lanes * (l.blocks - 1);
    return divided ? share(outputs) : padded(outputs);
  }

  // The same of all blocks' parts side by side.
  int whole(const Grid& grid) const { return grid.c > grid.ld ? grid.ld * plan.layout_.blocks : grid.ld; }

  // Does every block have other elements of it?
  bool spreads(const Placement& p) const { return plan.layout_.blocks > 1 && (p.columns || p.c > p.ld); }

  // Of element i of several: which block has it, and at which of its places.
  int64_t spread(int i, int each) const { return i / each * plan.program_.size + i % each; }

  Slot place(int index, Placement p) {
    if (index < 0) return {-1, 0, 0, 0, false};
    const Parameter& parameter = parameters[index];
    const int panel = plan.layout_.panel;
    if (static_cast<int64_t>(p.rows) * p.c * p.h * p.w != parameter.size)
      refuse("a parameter of another size than its layer");
    p.stride = round_up(p.h * p.w * p.ld, panel);
    p.size = p.columns ? static_cast<int64_t>(p.columns) * p.h * p.w * p.ld : p.rows * p.stride;
    if (placed.count(index)) {
      if (!(placed[index].first == p)) refuse("a parameter that two layers share in different layouts");
    } else {
      int64_t& end = spreads(p) ? own : size;
      placed[index] = {p, end};
      end += p.size;
    }
    ++uses;
    return {placed[index].second, p.size, p.rows, static_cast<int32_t>(p.stride), parameter.adapted};
  }

  void finish() {
    Program& p = plan.program_;
    const int values = static_cast<int>(plan.grids_.size());
    std::vector<bool> begun(values, false);
    begun[value_of[output]] = true;
    for (size_t k = plan.ops_.size(); k-- > 0;) {
      Op& op = plan.ops_[k];
      for (int i = 0; i < 2; ++i) {
        if (op.input[i] < 0) continue;
        op.add[i] = begun[op.input[i]];
        begun[op.input[i]] = true;
      }
    }
    plan.moving_ = std::make_unique<bool[]>(values);
    plan.depends_ = std::make_unique<bool[]>(values);
    std::copy(moves.begin(), moves.end(), plan.moving_.get());
    std::copy(depends.begin(), depends.end(), plan.depends_.get());
    place_parameters();
    p.read_from = p.size;
    for (const Op& op : plan.ops_) {
      if (op.weight.at >= 0 && !plan.multiplies_constants(op)) p.read_from = std::min(p.read_from, op.weight.at);
      if (op.bias.at >= 0) p.read_from = std::min(p.read_from, op.bias.at);
    }
    p.ops = plan.ops_.data();
    p.n_ops = static_cast<int>(plan.ops_.size());
    p.n_values = values;
    p.output = value_of[output];
    p.out = plan.grids_[p.output];
    p.moving = plan.moving_.get();
    p.depends = plan.depends_.get();
    if (plan.reads_labels() && (p.out.h * p.out.w > 1 || !flat[output]))
      refuse("cross-entropy of outputs that are not [n, classes]");
  }

  void place_parameters() {
    int64_t count = 0;
    const auto adapted = [](const Parameter& q) { return q.adapted; };
    plan.program_.used_once = uses == parameters.size() && placed.size() == parameters.size() &&
                              std::all_of(parameters.begin(), parameters.end(), adapted);
    for (size_t index = 0; index < parameters.size(); ++index) {
      const Parameter& q = parameters[index];
      count = std::max(count, q.at + q.size);
      if (placed.count(static_cast<int>(index))) continue;  // else it is read by nothing that counts
      const int elements = static_cast<int>(q.size), ld = plan.layout_.task_per_lane ? padded(elements) : elements;
      place(static_cast<int>(index), {1, elements, 1, 1, ld, 0, 0, 0});
    }
    const Layout& l = plan.layout_;
    plan.program_.size = round_up(static_cast<int>(size + own), l.task_per_lane ? l.lanes * l.lanes : 64);
    plan.program_.common = l.blocks > 1 ? size : plan.program_.size;
    for (auto& [index, slot] : placed) slot.second += spreads(slot.first) ? size : 0;
    for (Op& op : plan.ops_) {
      if (!planning::makes_products(op) || plan.layout_.blocks == 1) continue;
      op.weight.at += size;
      if (op.bias.at >= 0 && op.y.c > op.y.ld) op.bias.at += size;
    }
    plan.inner_.assign(count, 0);
    plan.adapted_.assign(count, 0);
    for (size_t index = 0; index < parameters.size(); ++index) {
      const Parameter& q = parameters[index];
      const auto& [p, at] = placed[static_cast<int>(index)];
      std::fill_n(plan.adapted_.begin() + q.at, q.size, q.adapted);
      int32_t* to = plan.inner_.data() + q.at;
      for (int row = 0; row < p.rows; ++row) {
        for (int c = 0; c < p.c; ++c) {
          for (int pixel = 0; pixel < p.h * p.w; ++pixel) *to++ = static_cast<int32_t>(at + position(p, row, c, pixel));
        }
      }
    }
  }

  // The last panel is as wide as what is left of the columns.
  int64_t position(const Placement& p, int row, int c, int pixel) const {
    const Layout& l = plan.layout_;
    const int64_t at = static_cast<int64_t>(pixel) * p.ld + (l.task_per_lane ? c * l.lanes : c);
    if (spreads(p)) return p.columns ? at * p.columns + spread(row, share(p.rows)) : spread(c, p.ld);
    if (!p.columns) return row * p.stride + at;
    const int panel = l.rows ? p.columns : l.panel, begin = row / panel * panel;
    const int64_t depth = static_cast<int64_t>(p.h) * p.w * p.ld;
    return begin * depth + at * std::min(panel, p.columns - begin) + row - begin;
  }

  Plan& plan;
  const Description given;
  const int output = given.output;
  const std::vector<Parameter>& parameters = given.parameters;
  const std::vector<Node>& nodes = given.nodes;
  const std::vector<bool> divisible = given.divisible();
  const Reading reading{given};
  std::vector<bool> flat, moves, depends;
  std::vector<int> value_of;  // by value of the description
  std::map<int, std::pair<Placement, int64_t>> placed;
  int64_t size = 0, own = 0;  // of parameters that all blocks have, and of those that they share
  size_t uses = 0;            // of parameters, by layers
};

bool Plan::reads_labels() const { return facts(program_.loss).reads == planning::LossReads::labels; }

Plan::Plan(const std::vector<double>& description, Layout layout, int element_size)
    : layout_(layout), element_size_(element_size) {
  PlanBuilder(*this, description).run();
  moved_.assign(program_.size * layout_.blocks, 0);
  for (size_t i = 0; i < inner_.size(); ++i) moved_[inner_[i]] = adapted_[i];
}

}  // namespace metafast
