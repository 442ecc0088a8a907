// Tensors of torch's stable ABI as plain memory: what the bindings of both executors need.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

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

[[noreturn]] inline void fail_count(const char* name, int64_t found, int64_t wanted) {
  fail(std::string(name) + " has " + std::to_string(found) + " elements where the model needs " +
       std::to_string(wanted));
}

// Of the real type T, contiguous, of so many elements.
template <class T>
void expect(const Tensor& t, int64_t elements, const char* name) {
  const auto wanted = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  if (t.scalar_type() != wanted) fail(std::string(name) + " must have the dtype of the parameters");
  if (!t.is_contiguous()) fail(std::string(name) + " must be contiguous");
  if (t.numel() != elements) fail_count(name, t.numel(), elements);
}

// Of the dtype and on the device of `like`. Not by way of torch's dispatcher, which takes longer than small tasks do.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t dtype = 0, device = 0, index = 0;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device, index, &made));
  return Tensor(made);
}

template <class F>
auto by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) return f(float());
  if (t.scalar_type() == ScalarType::Double) return f(double());
  fail("params must be float32 or float64");
}

}  // namespace metafast
