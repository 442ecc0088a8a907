#pragma once
#include "pointwise.h"

namespace METAFAST_NAMESPACE {

struct ReLU {
  METAFAST_DEVICE explicit ReLU(const Op&) {}
  static constexpr bool keeps_zero = true, has_second_derivative = false, reads_output = true;

  template <class Node>
  static void make(Node&, Op&) {}

  template <class M>
  METAFAST_DEVICE auto value(typename M::Pack x) const {
    return M::select(x > 0, x, x * 0);  // not zero where x is NaN
  }

  template <class M>
  METAFAST_DEVICE auto times_derivative(typename M::Pack g, typename M::Pack y) const {
    return M::select(y > 0, g, M::broadcast(0));
  }

  template <class M>
  METAFAST_DEVICE auto second_derivative(typename M::Pack y) const {
    return y * 0;
  }
};

}  // namespace METAFAST_NAMESPACE
