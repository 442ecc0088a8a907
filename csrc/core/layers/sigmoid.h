// f' = y (1 - y), f'' = f' (1 - 2 y).
#pragma once
#include "pointwise.h"

namespace METAFAST_NAMESPACE {

struct Sigmoid {
  METAFAST_DEVICE explicit Sigmoid(const Op&) {}
  static constexpr bool keeps_zero = false, has_second_derivative = true, reads_output = true;

  template <class Node>
  static void make(Node&, Op&) {}

  template <class M>
  METAFAST_DEVICE auto value(typename M::Pack x) const {
    return 1 / (1 + M::exp(-x));
  }

  template <class M>
  METAFAST_DEVICE auto times_derivative(typename M::Pack g, typename M::Pack y) const {
    return g * (y * (1 - y));
  }

  template <class M>
  METAFAST_DEVICE auto second_derivative(typename M::Pack y) const {
    return y * (1 - y) * (1 - 2 * y);
  }
};

}  // namespace METAFAST_NAMESPACE
