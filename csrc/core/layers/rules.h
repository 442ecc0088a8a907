// From the kind of an operation to its four rules.
#pragma once
#include "add.h"
#include "avg_pool2d.h"
#include "batch_norm.h"
#include "conv2d.h"
#include "cross_entropy.h"
#include "gelu.h"
#include "layer_norm.h"
#include "leaky_relu.h"
#include "max_pool2d.h"
#include "mse.h"
#include "norm_relu_pool.h"
#include "relu.h"
#include "sigmoid.h"
#include "tanh.h"

namespace METAFAST_NAMESPACE {

template <class F>
void with_rules(Kind kind, const F& f) {
  switch (kind) {
    case Kind::conv2d: return f(Conv2d{});
    case Kind::batch_norm: return f(BatchNorm{});
    case Kind::layer_norm: return f(LayerNorm{});
    case Kind::relu: return f(Pointwise<ReLU>{});
    case Kind::leaky_relu: return f(Pointwise<LeakyReLU>{});
    case Kind::tanh: return f(Pointwise<Tanh>{});
    case Kind::sigmoid: return f(Pointwise<Sigmoid>{});
    case Kind::gelu: return f(Pointwise<GELU>{});
    case Kind::max_pool2d: return f(MaxPool2d{});
    case Kind::avg_pool2d: return f(AvgPool2d{});
    case Kind::add: return f(Add{});
    case Kind::norm_relu_pool: return f(NormReluPool{});
  }
}

template <class F>
void with_loss(LossKind kind, const F& f) {
  kind == LossKind::mse ? f(MSE{}) : f(CrossEntropy{});
}

}  // namespace METAFAST_NAMESPACE
