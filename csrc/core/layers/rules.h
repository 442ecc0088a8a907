// From the kind of an operation to its four rules.
#pragma once
#include "add.h"
#include "avg_pool2d.h"
#include "batch_norm.h"
#include "conv2d.h"
#include "cross_entropy.h"
#include "gelu.h"
#include "external_loss.h"
#include "layer_norm.h"
#include "leaky_relu.h"
#include "max_pool2d.h"
#include "mse.h"
#include "norm_relu_pool.h"
#include "relu.h"
#include "sigmoid.h"
#include "tanh.h"

namespace METAFAST_NAMESPACE {

// f is only compiled for rules that the Machine runs; a Program with others never comes to it.
template <class M, class Rules, class F>
METAFAST_DEVICE void with(const F& f) {
  if constexpr (M::template runs<Rules>) f(Rules{});
}

template <class M, class F>
METAFAST_DEVICE void with_rules(Kind kind, const F& f) {
  switch (kind) {
    case Kind::conv2d:
      return with<M, Conv2d>(f);
    case Kind::batch_norm:
      return with<M, BatchNorm>(f);
    case Kind::layer_norm:
      return with<M, LayerNorm>(f);
    case Kind::relu:
      return with<M, Pointwise<ReLU>>(f);
    case Kind::leaky_relu:
      return with<M, Pointwise<LeakyReLU>>(f);
    case Kind::tanh:
      return with<M, Pointwise<Tanh>>(f);
    case Kind::sigmoid:
      return with<M, Pointwise<Sigmoid>>(f);
    case Kind::gelu:
      return with<M, Pointwise<GELU>>(f);
    case Kind::max_pool2d:
      return with<M, MaxPool2d>(f);
    case Kind::avg_pool2d:
      return with<M, AvgPool2d>(f);
    case Kind::add:
      return with<M, Add>(f);
    case Kind::norm_relu_pool:
      return with<M, NormReluPool>(f);
  }
}

template <class F>
METAFAST_DEVICE void with_loss(LossKind kind, const F& f) {
  switch (kind) {
    case LossKind::cross_entropy:
      return f(CrossEntropy{});
    case LossKind::mse:
      return f(MSE{});
    case LossKind::external:
      return f(ExternalLoss{});
  }
}

}  // namespace METAFAST_NAMESPACE
