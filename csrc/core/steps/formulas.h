// The rules of inner steps for one pack of elements. Each has `names` hyper-parameters of its own and at most `states`
// states, `step`, and `back`: from the adjoints a of theta' and b of the state' it adds to those of theta, and makes
// those of the state, of the gradient and of the hyper-parameters (`own`, where they are learned).
#pragma once
#include <cmath>

#include "../layers/context.h"
#include "step_rule.h"

namespace METAFAST_NAMESPACE {

// By repeated squaring; the exponent is at least 0.
METAFAST_DEVICE inline double power(double base, int64_t exponent) {
  double found = 1;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) found *= base;
    base *= base;
  }
  return found;
}

// One element's part of a step, or of the way back through it.
template <class Pack>
struct Element {
  Pack theta, g, rate, decay;  // g is clipped already
  Pack state[max_states];
};

// The root, and its derivative where `square` is positive; both are zero elsewhere.
template <class M>
struct Root {
  using Pack = typename M::Pack;
  Pack value, derivative;

  METAFAST_DEVICE explicit Root(Pack square) {
    const Pack zero = M::broadcast(0), one = M::broadcast(1);
    const auto flat = square <= zero;
    value = M::select(flat, zero, M::sqrt(M::select(flat, one, square)));
    derivative = M::select(flat, zero, one / (2 * value));
  }
};

// d = g + momentum v' (nesterov), v' or, without a state, g;  v' = momentum v + share g
template <class M>
struct Sgd {
  using T = typename M::Real;
  using Pack = typename M::Pack;
  static constexpr int names = 4, states = 1;
  enum { rate, momentum_, dampening, decay };

  METAFAST_DEVICE Sgd(const StepRule<T>& rule, const double* hyper, int64_t count)
      : momentum(static_cast<T>(hyper[momentum_])),
        share(static_cast<T>(count == 1 ? 1 : 1 - hyper[dampening])),
        damped(count > 1),
        carries(rule.states > 0),
        nesterov(rule.option) {}

  METAFAST_DEVICE void step(Element<Pack>& e) const {
    const Pack g = e.g + e.decay * e.theta;
    if (carries) e.state[0] = momentum * e.state[0] + share * g;
    e.theta = e.theta - e.rate * direction(g, e.state[0]);
  }

  template <bool Learns>
  METAFAST_DEVICE void back(const Element<Pack>& e, Pack& a, Pack* b, Pack& of_g, Pack* own) const {
    const Pack g = e.g + e.decay * e.theta, along = -e.rate * a;
    const Pack next = momentum * e.state[0] + share * g;
    if (Learns) own[rate] = -a * direction(g, next);
    of_g = along;
    if (carries) {
      Pack of_next = b[0] + along;
      if (nesterov) of_next = b[0] + momentum * along;
      of_g = share * of_next;
      if (nesterov) of_g += along;
      if (Learns) {
        own[momentum_] = of_next * e.state[0];
        if (nesterov) own[momentum_] += along * next;
        own[dampening] = damped ? -of_next * g : M::broadcast(0);
      }
      b[0] = momentum * of_next;
    } else if (Learns) {
      own[momentum_] = own[dampening] = M::broadcast(0);
    }
    if (Learns) own[decay] = of_g * e.theta;
    a = a + e.decay * of_g;
  }

 private:
  METAFAST_DEVICE Pack direction(Pack g, Pack next) const {
    if (!carries) return g;
    return nesterov ? g + momentum * next : next;
  }

  T momentum, share;
  bool damped, carries, nesterov;
};

// m' = beta1 m + (1 - beta1) g,  v' = beta2 v + (1 - beta2) g^2,  theta' = theta - rate m' / (root(v') scale + eps)
template <class M>
struct Adam {
  using T = typename M::Real;
  using Pack = typename M::Pack;
  static constexpr int names = 5, states = 2;
  enum { rate, beta1, beta2, eps_, decay };

  METAFAST_DEVICE Adam(const StepRule<T>& rule, const double* hyper, int64_t count) : decoupled(rule.option) {
    const double b1 = hyper[beta1], b2 = hyper[beta2], k = static_cast<double>(count);
    const double c1 = 1 - power(b1, count), c2 = std::sqrt(1 - power(b2, count));
    keep1 = static_cast<T>(b1);
    take1 = static_cast<T>(1 - b1);
    keep2 = static_cast<T>(b2);
    take2 = static_cast<T>(1 - b2);
    eps = static_cast<T>(hyper[eps_]);
    unbias = static_cast<T>(1 / c1);
    scale = static_cast<T>(1 / c2);
    of_unbias = static_cast<T>(k * power(b1, count - 1) / (c1 * c1));
    of_scale = static_cast<T>(k * power(b2, count - 1) / (2 * c2 * c2 * c2));
  }

  METAFAST_DEVICE void step(Element<Pack>& e) const {
    const Pack g = decoupled ? e.g : e.g + e.decay * e.theta;
    e.state[0] = keep1 * e.state[0] + take1 * g;
    e.state[1] = keep2 * e.state[1] + take2 * (g * g);
    const Pack start = decoupled ? e.theta * (1 - e.rate * e.decay) : e.theta;
    e.theta = start - unbias * e.rate * (e.state[0] / (Root<M>(e.state[1]).value * scale + eps));
  }

  template <bool Learns>
  METAFAST_DEVICE void back(const Element<Pack>& e, Pack& a, Pack* b, Pack& of_g, Pack* own) const {
    const Pack g = decoupled ? e.g : e.g + e.decay * e.theta;
    const Pack m = keep1 * e.state[0] + take1 * g, v = keep2 * e.state[1] + take2 * (g * g);
    const Root<M> root(v);
    const Pack share = 1 / (root.value * scale + eps), ratio = m * share;  // a division costs what ten products do
    const Pack of_ratio = -unbias * e.rate * a * share, of_below = -of_ratio * ratio;
    const Pack of_m = b[0] + of_ratio, of_v = b[1] + scale * of_below * root.derivative;
    of_g = take1 * of_m + 2 * take2 * g * of_v;
    if (Learns) {
      own[rate] = -unbias * a * ratio;
      own[beta1] = of_m * (e.state[0] - g) - of_unbias * e.rate * a * ratio;
      own[beta2] = of_v * (e.state[1] - g * g) + of_scale * of_below * root.value;
      own[eps_] = of_below;
      if (decoupled) {
        own[rate] -= a * e.theta * e.decay;
        own[decay] = -a * e.theta * e.rate;
      } else {
        own[decay] = of_g * e.theta;
      }
    }
    b[0] = keep1 * of_m;
    b[1] = keep2 * of_v;
    a = decoupled ? a * (1 - e.rate * e.decay) : a + e.decay * of_g;
  }

 private:
  T keep1, take1, keep2, take2, eps;
  T unbias, scale;        // 1 / (1 - beta1^k) and 1 / sqrt(1 - beta2^k)
  T of_unbias, of_scale;  // their derivatives in beta1 and beta2
  bool decoupled;
};

// s' = alpha s + (1 - alpha) g^2,  mean' likewise of g (centered),  d = g / (root(s' - mean'^2) + eps),
// velocity' = momentum velocity + d (with momentum). The states are s, velocity and mean, as far as there are any.
template <class M>
struct RmsProp {
  using T = typename M::Real;
  using Pack = typename M::Pack;
  static constexpr int names = 5, states = 3;
  enum { rate, alpha, eps_, decay, momentum_ };

  METAFAST_DEVICE RmsProp(const StepRule<T>& rule, const double* hyper, int64_t)
      : keep(static_cast<T>(hyper[alpha])),
        take(static_cast<T>(1 - hyper[alpha])),
        eps(static_cast<T>(hyper[eps_])),
        momentum(static_cast<T>(hyper[momentum_])),
        centered(rule.option),
        carries(rule.states > 1 + centered) {}

  METAFAST_DEVICE void step(Element<Pack>& e) const {
    const Pack g = e.g + e.decay * e.theta;
    e.state[0] = keep * e.state[0] + take * (g * g);
    if (centered) set_mean(e.state, keep * mean(e.state) + take * g);
    Pack d = g / (Root<M>(spread(e.state[0], mean(e.state))).value + eps);
    if (carries) d = e.state[1] = momentum * e.state[1] + d;
    e.theta = e.theta - e.rate * d;
  }

  template <bool Learns>
  METAFAST_DEVICE void back(const Element<Pack>& e, Pack& a, Pack* b, Pack& of_g, Pack* own) const {
    const Pack g = e.g + e.decay * e.theta;
    const Pack squares = keep * e.state[0] + take * (g * g), next = keep * mean(e.state) + take * g;
    const Root<M> root(spread(squares, next));
    const Pack below = root.value + eps, ratio = g / below;
    Pack of_d = -e.rate * a;
    if (Learns) own[rate] = -a * (carries ? momentum * e.state[1] + ratio : ratio);
    if (Learns) own[momentum_] = M::broadcast(0);
    if (carries) {
      of_d = of_d + b[1];
      if (Learns) own[momentum_] = of_d * e.state[1];
      b[1] = momentum * of_d;
    }
    of_g = of_d / below;
    const Pack of_below = -of_g * ratio, of_spread = of_below * root.derivative;
    const Pack of_squares = b[0] + of_spread;
    of_g = of_g + 2 * take * g * of_squares;
    if (Learns) own[alpha] = of_squares * (e.state[0] - g * g);
    b[0] = keep * of_squares;
    if (centered) {
      const Pack of_next = mean(b) - 2 * next * of_spread;
      of_g = of_g + take * of_next;
      if (Learns) own[alpha] += of_next * (mean(e.state) - g);
      set_mean(b, keep * of_next);
    }
    if (Learns) own[eps_] = of_below;
    if (Learns) own[decay] = of_g * e.theta;
    a = a + e.decay * of_g;
  }

 private:
  METAFAST_DEVICE Pack spread(Pack squares, Pack of_mean) const {
    return centered ? squares - of_mean * of_mean : squares;
  }

  // The mean has the second place among the states, or behind a velocity the third.
  METAFAST_DEVICE Pack mean(const Pack* state) const { return carries ? state[2] : state[1]; }
  METAFAST_DEVICE void set_mean(Pack* state, Pack value) const {
    if (carries) {
      state[2] = value;
    } else {
      state[1] = value;
    }
  }

  T keep, take, eps, momentum;
  bool centered, carries;
};

// s' = s + g^2,  theta' = theta - rate / (1 + (k - 1) rate_decay) g / (root(s') + eps)
template <class M>
struct Adagrad {
  using T = typename M::Real;
  using Pack = typename M::Pack;
  static constexpr int names = 4, states = 1;
  enum { rate, rate_decay, decay, eps_ };

  METAFAST_DEVICE Adagrad(const StepRule<T>&, const double* hyper, int64_t count) : eps(static_cast<T>(hyper[eps_])) {
    const double past = static_cast<double>(count - 1), share = 1 / (1 + past * hyper[rate_decay]);
    slowed = static_cast<T>(share);
    of_slowed = static_cast<T>(-past * share * share);
  }

  METAFAST_DEVICE void step(Element<Pack>& e) const {
    const Pack g = e.g + e.decay * e.theta;
    e.state[0] = e.state[0] + g * g;
    e.theta = e.theta - slowed * e.rate * (g / (Root<M>(e.state[0]).value + eps));
  }

  template <bool Learns>
  METAFAST_DEVICE void back(const Element<Pack>& e, Pack& a, Pack* b, Pack& of_g, Pack* own) const {
    const Pack g = e.g + e.decay * e.theta;
    const Root<M> root(e.state[0] + g * g);
    const Pack below = root.value + eps, ratio = g / below;
    of_g = -slowed * e.rate * a / below;
    const Pack of_below = -of_g * ratio;
    b[0] = b[0] + of_below * root.derivative;
    of_g = of_g + 2 * g * b[0];
    if (Learns) {
      own[rate] = -slowed * a * ratio;
      own[rate_decay] = -of_slowed * e.rate * a * ratio;
      own[eps_] = of_below;
      own[decay] = of_g * e.theta;
    }
    a = a + e.decay * of_g;
  }

 private:
  T eps, slowed, of_slowed;  // 1 / (1 + (k - 1) rate_decay) and its derivative
};

// Calls f(rule) with the rule of a step, `hyper` being its numbers and `count` the number of the step, from 1.
template <class M, class F>
METAFAST_DEVICE void with_step_rule(const StepRule<typename M::Real>& rule, const double* hyper, int64_t count,
                                    const F& f) {
  switch (rule.kind) {
    case StepKind::plain:
      return;
#define METAFAST_CASE(kind, Formula, ...) \
  case StepKind::kind:                    \
    return f(Formula<M>(rule, hyper, count));
      METAFAST_STEP_RULES(METAFAST_CASE)
#undef METAFAST_CASE
  }
}

}  // namespace METAFAST_NAMESPACE
