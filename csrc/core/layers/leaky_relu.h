#pragma once
#include "pointwise.h"

namespace METAFAST_NAMESPACE {

struct LeakyReLU {
  double negative_slope;
  METAFAST_DEVICE explicit LeakyReLU(const Op& op) : negative_slope(op.number) {}
  static constexpr bool keeps_zero = true, has_second_derivative = false, reads_output = false;

  template <class Node>
  static void make(Node& node, Op& op) {
    op.number = node.real();
  }

  template <class M>
  METAFAST_DEVICE auto value(typename M::Pack x) const {
    return times_derivative<M>(x, x);
  }

  template <class M>
  METAFAST_DEVICE auto times_derivative(typename M::Pack g, typename M::Pack x) const {
    return M::select(x > 0, g, g * typename M::Real(negative_slope));
  }

  template <class M>
  METAFAST_DEVICE auto second_derivative(typename M::Pack x) const {
    return x * 0;
  }
};

}  // namespace METAFAST_NAMESPACE
