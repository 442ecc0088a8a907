// The order in which the sums of blocks are added: `ways` runs through them, then those in a row.
#pragma once
#include "../core/layers/context.h"
#include "launch.h"

namespace METAFAST_NAMESPACE {

constexpr int ways = 16;

template <class T>
METAFAST_DEVICE T sum_way(const Sum<T>& sum, int64_t row, int64_t column, int way) {
  const T* parts = sum.parts + row * sum.columns + (sum.index ? sum.index[column] : column);
  T total = 0;
  for (int64_t k = way; k < sum.count; k += ways) total += parts[k * sum.stride];
  return total;
}

}  // namespace METAFAST_NAMESPACE
