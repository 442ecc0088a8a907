// One inner step by a rule, and the way back through it, on whole vectors: clips, hyper-parameters and their gradients.
// Written once, for any Machine that has `each` and `totals`.
#pragma once
#include "formulas.h"

namespace METAFAST_NAMESPACE {

// Where the gradients of hyper-parameters go, each `task_stride` from one task that runs at once to the next: numbers
// [rows, H], or vectors [H, rows, size] of all tasks together. Both null: they are not wanted.
template <class T>
struct HyperSums {
  double* numbers;
  T* vectors;
  int64_t task_stride;
};

template <class M>
class RuleStep {
  using T = typename M::Real;
  using Pack = typename M::Pack;

 public:
  // `blocks` is the memory that totals need, M::total_blocks(size) for each sum.
  METAFAST_DEVICE RuleStep(const M& machine, const StepRule<T>& rule, int64_t size, int rows, double* blocks)
      : m(machine), rule(rule), size(size), rows(rows), blocks(blocks) {}

  // Takes the step of that number from z = (theta, state) to `to`; g is zero where a parameter is not moved.
  METAFAST_DEVICE void advance(int64_t number, const T* z, const T* g, T* to) const {
    const Hyper hyper = of_step(number);
    const Clip clip = clip_of(hyper, g);
    with_step_rule<M>(rule, hyper.numbers, number + 1, [&](const auto& formula) {
      m.each(size, [=, *this](long i) {
        const Element<Pack> before = element(hyper, z, i, clip(M::load(g + i)));
        Element<Pack> after = before;
        formula.step(after);
        const auto moved = is_moved(i);
        M::store(to + i, M::select(moved, after.theta, before.theta));
        each_state(
            [&](int k) { M::store(to + (k + 1) * size + i, M::select(moved, after.state[k], before.state[k])); });
      });
    });
  }

  // Takes the adjoints v of theta' and w [K, size] of the state' to those of theta and of the state, without what goes
  // through the gradient, and makes u, that of the gradient. Adds those of the hyper-parameters to the sums.
  METAFAST_DEVICE void back(int64_t number, const T* z, const T* g, T* v, T* w, T* u, const HyperSums<T>& sums) const {
    const Hyper hyper = of_step(number);
    const Clip clip = clip_of(hyper, g);
    const Operands at{z, g, v, w, u};
    with_step_rule<M>(rule, hyper.numbers, number + 1, [&](const auto& formula) {
      if (sums.numbers || sums.vectors) {
        back_through<true>(formula, hyper, clip, at, sums);
      } else {
        back_through<false>(formula, hyper, clip, at, sums);
      }
    });
    if (clip.by_norm || clip.by_value) back_through_clips(hyper, clip, at, sums);
  }

 private:
  struct Hyper {
    const double* numbers;   // [H]
    const T *rates, *decay;  // [size], or null: the numbers
    T rate, decays;
    int row;
  };

  struct Operands {
    const T *z, *g;
    T *v, *w, *u;
  };

  // From the gradient to what the rule takes: clamp(g) min(1, max_norm / (norm + eps)).
  struct Clip {
    bool by_value, by_norm;
    T bound;
    Pack share;                // the factor, of each task
    double of_norm[M::tasks];  // its derivative in the norm, over the norm; zero where it is one
    double of_max[M::tasks];   // its derivative in max_norm

    METAFAST_DEVICE Pack clamped(Pack g) const {
      if (!by_value) return g;
      return M::select(g > bound, M::broadcast(bound), M::select(g < -bound, M::broadcast(-bound), g));
    }
    METAFAST_DEVICE Pack operator()(Pack g) const { return by_norm ? clamped(g) * share : clamped(g); }
  };

  static constexpr double norm_eps = 1e-6;  // what torch.nn.utils.clip_grad_norm_ adds to the norm

  METAFAST_DEVICE Hyper of_step(int64_t number) const {
    const int row = static_cast<int>(number < rows ? number : rows - 1);
    const double* numbers = rule.numbers + static_cast<int64_t>(row) * rule.names;
    const auto vector = [&](const T* of) { return of ? of + row * (size / M::tasks) : nullptr; };
    const int decay = rule.decay_at;
    return {numbers, vector(rule.rates), vector(rule.decay), static_cast<T>(numbers[0]), static_cast<T>(numbers[decay]),
            row};
  }

  METAFAST_DEVICE Clip clip_of(const Hyper& hyper, const T* g) const {
    Clip clip{};
    clip.by_value = rule.max_value >= 0;
    clip.by_norm = rule.max_norm >= 0;
    if (clip.by_value) clip.bound = static_cast<T>(hyper.numbers[rule.max_value]);
    if (!clip.by_norm) return clip;
    double squares[1][M::tasks];
    m.template totals<1>(size, rule, blocks, squares, [=](long i, Pack* sums) {
      const Pack h = clip.clamped(M::load(g + i));
      sums[0] += h * h;
    });
    const double most = hyper.numbers[rule.max_norm];
    clip.share = M::by_task([&](int j) {
      const double norm = std::sqrt(squares[0][j]), above = norm + norm_eps, share = most / above;
      const bool scales = !(share > 1);  // as by a norm that is NaN, which makes all of the gradient so
      clip.of_norm[j] = scales && norm != 0 ? -share / above / norm : 0;
      clip.of_max[j] = scales ? 1 / above : 0;
      return scales ? share : 1;
    });
    return clip;
  }

  METAFAST_DEVICE Element<Pack> element(const Hyper& hyper, const T* z, long i, Pack g) const {
    Element<Pack> e{};
    e.theta = M::load(z + i);
    e.g = g;
    e.rate = hyper.rates ? m.load_shared(hyper.rates, i) : M::broadcast(hyper.rate);
    e.decay = hyper.decay ? m.load_shared(hyper.decay, i) : M::broadcast(hyper.decays);
    each_state([&](int k) { e.state[k] = M::load(z + (k + 1) * size + i); });
    return e;
  }

  // In turns that a compiler knows, so that a GPU keeps the states in registers.
  template <class F>
  METAFAST_DEVICE void each_state(const F& f) const {
    for (int k = 0; k < max_states; ++k) {
      if (k < rule.states) f(k);
    }
  }

  METAFAST_DEVICE auto is_moved(long i) const { return m.load_shared(rule.moved, i) > T(0); }

  // Leaves the adjoint of the clipped gradient in u.
  template <bool Learns, class Formula>
  METAFAST_DEVICE void back_through(const Formula& formula, const Hyper& hyper, const Clip& clip, const Operands& at,
                                    const HyperSums<T>& sums) const {
    const auto go = [=, *this](long i, Pack* own) {
      const Element<Pack> e = element(hyper, at.z, i, clip(M::load(at.g + i)));
      const Pack a = M::load(at.v + i), zero = M::broadcast(0);
      Pack b[max_states] = {}, of_theta = a, of_g, of_state[max_states] = {};
      each_state([&](int k) { of_state[k] = b[k] = M::load(at.w + k * size + i); });
      formula.template back<Learns>(e, of_theta, of_state, of_g, own);
      const auto moved = is_moved(i);
      M::store(at.v + i, M::select(moved, of_theta, a));
      each_state([&](int k) { M::store(at.w + k * size + i, M::select(moved, of_state[k], b[k])); });
      M::store(at.u + i, M::select(moved, of_g, zero));
      for (int h = 0; Learns && h < Formula::names; ++h) own[h] = M::select(moved, own[h], zero);
    };
    add_sums<Learns ? Formula::names : 0>(0, hyper.row, sums, go);
  }

  // Calls f(i, own) for each pack, which makes K summands `own` of hyper-parameters from the place `first` on.
  template <int K, class F>
  METAFAST_DEVICE void add_sums(int first, int row, const HyperSums<T>& sums, const F& f) const {
    if constexpr (K == 0) {
      m.each(size, [=](long i) { f(i, nullptr); });
    } else if (sums.vectors) {
      T* const to = sums.vectors + (static_cast<int64_t>(first) * rows + row) * size;
      const int64_t next = rows * size;
      m.each(size, [=](long i) {
        Pack own[K];
        f(i, own);
        for (int k = 0; k < K; ++k) M::put(to + k * next + i, own[k], true);
      });
    } else {
      double found[K][M::tasks];
      m.template totals<K>(size, rule, blocks, found, [=](long i, Pack* parts) {
        Pack own[K];
        f(i, own);
        for (int k = 0; k < K; ++k) parts[k] += own[k];
      });
      add_numbers(first, row, sums, found);
    }
  }

  template <int K>
  METAFAST_DEVICE void add_numbers(int first, int row, const HyperSums<T>& sums,
                                   const double (&found)[K][M::tasks]) const {
    m.once([&] {
      double* const to = sums.numbers + static_cast<int64_t>(row) * rule.names + first;
      for (int k = 0; k < K; ++k) {
        for (int j = 0; j < M::tasks; ++j) to[j * sums.task_stride + k] += found[k][j];
      }
    });
  }

  // Takes u, the adjoint of the clipped gradient, to that of the gradient.
  METAFAST_DEVICE void back_through_clips(const Hyper& hyper, const Clip& clip, const Operands& at,
                                          const HyperSums<T>& sums) const {
    const T* g = at.g;
    T* const u = at.u;
    const bool learns = sums.numbers || sums.vectors;
    if (clip.by_norm) {
      double along[1][M::tasks];
      m.template totals<1>(size, rule, blocks, along,
                           [=](long i, Pack* parts) { parts[0] += M::load(u + i) * clip.clamped(M::load(g + i)); });
      if (learns) {
        const Pack of_max = M::by_task([&](int j) { return clip.of_max[j]; });
        add_sums<1>(rule.max_norm, hyper.row, sums,
                    [=](long i, Pack* own) { own[0] = of_max * (M::load(u + i) * clip.clamped(M::load(g + i))); });
      }
      const Pack back = M::by_task([&](int j) { return along[0][j] * clip.of_norm[j]; });
      m.each(size, [=](long i) { M::store(u + i, clip.share * M::load(u + i) + back * clip.clamped(M::load(g + i))); });
    }
    if (!clip.by_value) return;
    const auto go = [=](long i, Pack* own) {
      const Pack of = M::load(u + i), x = M::load(g + i), zero = M::broadcast(0);
      const auto above = x > clip.bound, below = x < -clip.bound;
      if (own) own[0] = M::select(above, of, M::select(below, -of, zero));
      M::store(u + i, M::select(above, zero, M::select(below, zero, of)));
    };
    if (learns) {
      add_sums<1>(rule.max_value, hyper.row, sums, go);
    } else {
      add_sums<0>(0, 0, sums, go);
    }
  }

  const M& m;
  const StepRule<T>& rule;
  const int64_t size;
  const int rows;
  double* const blocks;
};

}  // namespace METAFAST_NAMESPACE
