// x Phi(x): f' = Phi + x phi, f'' = phi (2 - x^2) with the normal distribution Phi and its density phi (1606.08415).
#pragma once
#include "pointwise.h"

namespace METAFAST_NAMESPACE {

struct GELU {
  METAFAST_DEVICE explicit GELU(const Op&) {}
  static constexpr bool keeps_zero = true, has_second_derivative = true, reads_output = false;

  template <class Node>
  static void make(Node&, Op&) {}

  template <class M>
  METAFAST_DEVICE auto value(typename M::Pack x) const {
    return x * distribution<M>(x);
  }

  template <class M>
  METAFAST_DEVICE auto times_derivative(typename M::Pack g, typename M::Pack x) const {
    return g * (distribution<M>(x) + x * density<M>(x));
  }

  template <class M>
  METAFAST_DEVICE auto second_derivative(typename M::Pack x) const {
    return density<M>(x) * (2 - x * x);
  }

 private:
  template <class M>
  METAFAST_DEVICE static auto distribution(typename M::Pack x) {
    return typename M::Real(0.5) * (1 + M::erf(x * typename M::Real(0.70710678118654752440)));
  }

  template <class M>
  METAFAST_DEVICE static auto density(typename M::Pack x) {
    return M::exp(typename M::Real(-0.5) * x * x) * typename M::Real(0.39894228040143267794);
  }
};

}  // namespace METAFAST_NAMESPACE
