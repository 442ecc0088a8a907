// Tensors of torch's stable ABI as plain memory: what both files of bindings need.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace metafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const std::string& reason) { throw std::runtime_error("metafast: " + reason); }

inline std::vector<double> numbers(const Tensor& t) {
  const auto* data = static_cast<const double*>(t.data_ptr());
  return std::vector<double>(data, data + t.numel());
}

template <class T>
T* data(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

// Of the real type T, contiguous, of so many elements.
template <class T>
void expect(const Tensor& t, int64_t elements, const char* name) {
  const auto wanted = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  if (t.scalar_type() != wanted) fail(std::string(name) + " must have the dtype of the parameters");
  if (!t.is_contiguous()) fail(std::string(name) + " must be contiguous");
  if (t.numel() != elements) {
    fail(std::string(name) + " has " + std::to_string(t.numel()) + " elements where the model needs " +
         std::to_string(elements));
  }
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()});
}

template <class F>
auto by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) return f(float());
  if (t.scalar_type() == ScalarType::Double) return f(double());
  fail("params must be float32 or float64");
}

}  // namespace metafast
