// The Machine that runs several tasks at once, one in each lane: elements are packs, so layers of vectors need neither
// padding nor transposes, and a call is made once for all. Every number is computed as CoreMachine computes it, in the
// same order: a task comes out the same, bit by bit, however it is run.
#pragma once
#include "contract/direct.h"

namespace METAFAST_NAMESPACE {

constexpr uint32_t offered_in_lanes = Need::maps | Need::sums | Need::products | Need::rows | Need::totals;

// Does a LaneMachine run it?
static inline bool runs_in_lanes(const Program& program) {
  bool all = offers(offered_in_lanes, program.loss);
  for (int k = 0; k < program.n_ops; ++k) {
    const Op& op = program.ops[k];
    const bool vectors = op.x.h * op.x.w * op.y.h * op.y.w == 1 && (!makes_products(op) || of_vectors(op));
    all = all && offers(offered_in_lanes, op.kind) && vectors;
  }
  return all;
}

template <class T>
class LaneMachine : public CoreMachine<T> {
  using S = Simd<T>;

 public:
  using S::lanes;
  using typename S::Pack;
  using Term = METAFAST_NAMESPACE::Term<T>;
  using Pair = METAFAST_NAMESPACE::Pair<T>;

  static constexpr int tasks = lanes;

  // What rules add to the vector `of`, once to each element, goes to another: to = from - rate * it, or to = it. So it
  // need not be cleared, written and read again, which costs much where the weights of all lanes fill a cache.
  struct Redirect {
    const T* of;
    T* to;
    const T *from, *rate;
  };
  Redirect redirect{};

  struct Loss {
    double of[lanes] = {};

    Loss() = default;
    Loss(Pack pack) {
      for (int j = 0; j < lanes; ++j) of[j] = pack[j];
    }
    Loss& operator+=(const Loss& other) {
      for (int j = 0; j < lanes; ++j) of[j] += other.of[j];
      return *this;
    }
    friend Loss operator/(Loss loss, int count) {
      for (double& value : loss.of) value /= count;
      return loss;
    }
  };

  // What takes an element for itself, or leaves all to a contraction: for that it does not matter whose it is.
  static constexpr uint32_t offers = offered_in_lanes;

  LaneMachine(const Program&, T*, T*, Member) {}
  static long workspace_size(const Program&) { return 0; }

  void clear_padding(const Grid&, int, T*) const {}

  // CoreMachine's, of neighbours in a row: not offered, so that no rule comes to use them by mistake.
  void samples() const = delete;
  void channels() const = delete;
  void pixels() const = delete;
  void windows() const = delete;
  void windows2x2() const = delete;
  void outside_windows2x2() const = delete;

  template <int K, class F>
  void reduce(long rows, int ld, T* out, bool add, const F& f) const {
    const Redirect to = at(out);
    CoreMachine<T>::template reduce<K>(rows, ld, f, [=](long i, Pack sum) {
      if (to.of) {
        S::store(to.to + i, to.from ? descended(to, i, sum) : sum);
      } else {
        S::put(out + i, sum, add);
      }
    });
  }

  template <class F>
  void rows(int n, const F& f) const {
    for (int s = 0; s < n; ++s) {
      for (int j = 0; j < lanes; ++j) f(s, j);
    }
  }

  template <class F>
  Loss sum_rows(int n, const F& f) const {
    Loss sum;
    for (int s = 0; s < n; ++s) {
      for (int j = 0; j < lanes; ++j) sum.of[j] += f(s, j);
    }
    return sum;
  }

  // CoreMachine adds packs of neighbours in a row, blocks of them apart, and at last the lanes of the sums.
  template <class F>
  Pack total(long size, int ld, const F& f) const {
    const int channels = ld / lanes;
    Pack parts[lanes] = {};
    Loss sum;
    long packs = 0;
    const auto close = [&] {
      Pack all{};
      for (Pack& part : parts) {
        all += part;
        part = Pack{};
      }
      sum += all;
    };
    for (long row = 0; row < size; row += ld) {
      for (int c = 0; c < channels; ++c) {
        if (c % lanes == 0 && packs++ % CoreMachine<T>::block_rows == 0 && row + c > 0) close();
        parts[c % lanes] += f(row + c * lanes);
      }
    }
    close();
    Pack result{};
    for (int j = 0; j < lanes; ++j) result[j] = static_cast<T>(sum.of[j]);
    return result;
  }

  // Elements go in the order in which CoreMachine adds up those of its own layout.
  template <int K, class F>
  void totals(long, const StepRule<T>& rule, double*, double (&out)[K][lanes], const F& f) const {
    constexpr int64_t block = CoreMachine<T>::block_rows * lanes;
    for (auto& of_tasks : out) std::memset(of_tasks, 0, sizeof of_tasks);
    for (int64_t first = 0; first < rule.order_size; first += block) {
      Pack parts[lanes][K] = {};
      const int64_t end = first + block < rule.order_size ? first + block : rule.order_size;
      for (int64_t i = first; i < end; ++i) {
        if (rule.order[i] >= 0) f(static_cast<long>(rule.order[i]) * lanes, parts[i % lanes]);
      }
      for (int k = 0; k < K; ++k) {
        Pack all{};
        for (const auto& part : parts) all += part[k];
        for (int j = 0; j < lanes; ++j) out[k][j] += all[j];
      }
    }
  }
  static long total_blocks(long) { return 0; }

  template <class F>
  static Pack by_task(const F& f) {
    Pack pack;
    for (int j = 0; j < lanes; ++j) pack[j] = static_cast<T>(f(j));
    return pack;
  }

  void correlate(const Op& op, int n, const Term* terms, int count, const T* bias, T* y) const {
    Product p{{}, {}, count, op.x.ld, lanes, op.x.ld, lanes, op.x.c, y, op.y.ld, lanes, bias, false, false};
    for (int t = 0; t < count; ++t) {
      p.a[t] = terms[t].a;
      p.b[t] = terms[t].weights;
    }
    multiply(p, n, op.y.c);
  }

  void correlate_transposed(const Op& op, int n, const Term* terms, int count, T* g_x, bool add) const {
    Product p{{}, {}, count, op.y.ld, lanes, lanes, op.x.ld, op.y.c, g_x, op.x.ld, lanes, nullptr, false, add};
    for (int t = 0; t < count; ++t) {
      p.a[t] = terms[t].a;
      p.b[t] = terms[t].weights;
    }
    multiply(p, n, op.x.c);
  }

  void outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const {
    Product p{{}, {}, count, lanes, op.y.ld, lanes, op.x.ld, n, g_w, op.x.ld, lanes, nullptr, true, false};
    for (int t = 0; t < count; ++t) {
      p.a[t] = pairs[t].g;
      p.b[t] = pairs[t].x;
    }
    p.instead = at(g_w);
    if (p.instead.of) {
      p.out = p.instead.to;
      p.continues = false;
    }
    multiply(p, op.y.c, op.x.c);
  }

  static Pack load_shared(const T* p, long i) { return S::broadcast(p[i / lanes]); }
  static double of_task(const Loss& loss, int task) { return loss.of[task]; }
  static void add_weighted(Loss& sum, double weight, const Loss& loss) {
    for (int j = 0; j < lanes; ++j) CoreMachine<T>::add_weighted(sum.of[j], weight, loss.of[j]);
  }

 private:
  // out[i][j] (+)= sum over terms and k of a[i][k] b[k][j], on top of a bias[j] or of what is there.
  struct Product {
    const T *a[2], *b[2];
    int count;
    long a_row, a_step, b_column, b_step, depth;
    T* out;
    long out_row, out_column;
    const T* bias;
    bool continues, add;
    Redirect instead{};
  };

  // The part of it from `out`, an element of the vector.
  Redirect at(const T* out) const {
    if (!redirect.of) return {};
    const long i = out - redirect.of;
    if (!redirect.from) return {out, redirect.to + i};
    return {out, redirect.to + i, redirect.from + i, redirect.rate + i / lanes};
  }

  static Pack descended(const Redirect& to, long i, Pack g) {
    return S::load(to.from + i) - load_shared(to.rate, i) * g;
  }

  // As many sums as there are registers, with a few for the factors.
  static constexpr int wide = sizeof(Pack) == 64 ? 4 : 3, high = sizeof(Pack) == 64 ? 6 : 4;

  static void multiply(const Product& p, int rows, int columns) {
    int column = 0;
    for (; columns - column >= wide; column += wide) strip<wide>(p, rows, column);
    if constexpr (wide > 3) {
      if (columns - column == 3) strip<3>(p, rows, column);
    }
    if (columns - column == 2) strip<2>(p, rows, column);
    if (columns - column == 1) strip<1>(p, rows, column);
  }

  // Rows in tiles of about equal height.
  template <int V>
  static void strip(const Product& p, int rows, int column) {
    constexpr int max_height = V == 1 ? 12 : high * wide / V;
    const int tiles = (rows + max_height - 1) / max_height, height = rows / tiles, taller = rows % tiles;
    const auto run = [&](int first, int count, int high) {
      Direct<T>::template with_rows<max_height>(high,
                                                [&](auto r) { tile<decltype(r)::value, V>(p, first, count, column); });
    };
    if (taller > 0) run(0, taller, height + 1);
    if (tiles > taller) run(taller * (height + 1), tiles - taller, height);
  }

  template <int R, int V>
  METAFAST_KERNEL static void tile(const Product& p, int first, int count, int column) {
    for (int row = first; row < first + count * R; row += R) {
      T* const out = p.out + row * p.out_row + column * p.out_column;
      RegisterTile<T, R, V> sums{};
      if (p.bias) sums.start(p.bias + column * lanes, 0);
      if (p.continues) sums.start(out, p.out_row, p.out_column);
      for (int t = 0; t < p.count; ++t) {
        const T* const a = p.a[t] + row * p.a_row;
        const long stride = p.a_row;
        sums.multiply([=](int i, long k) { return S::load(a + i * stride + k); }, p.a_step,
                      p.b[t] + column * p.b_column, p.b_step, p.depth, p.b_column);
      }
      if (p.instead.from) {
        const auto descent = [&](long i, Pack g) { return descended(p.instead, out - p.out + i, g); };
        sums.finish(descent, out, p.out_row, p.out_column);
      } else {
        sums.finish(out, p.out_row, p.add, p.out_column);
      }
    }
  }
};

}  // namespace METAFAST_NAMESPACE
