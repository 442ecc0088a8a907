// f' = 1 - y^2, f'' = -2 y (1 - y^2).
#pragma once
#include "pointwise.h"

namespace METAFAST_NAMESPACE {

struct Tanh {
  METAFAST_DEVICE explicit Tanh(const Op&) {}
  static constexpr bool keeps_zero = true, has_second_derivative = true, reads_output = true;

  template <class Node>
  static void make(Node&, Op&) {}

  template <class M>
  METAFAST_DEVICE auto value(typename M::Pack x) const {
    return M::tanh(x);
  }

  template <class M>
  METAFAST_DEVICE auto times_derivative(typename M::Pack g, typename M::Pack y) const {
    return g * (1 - y * y);
  }

  template <class M>
  METAFAST_DEVICE auto second_derivative(typename M::Pack y) const {
    return -2 * y * (1 - y * y);
  }
};

}  // namespace METAFAST_NAMESPACE
