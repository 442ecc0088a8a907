// Every kind of layer and of loss, one row each. A new layer is its header in layers/, its #include and its row here:
// the enum, the number that Python writes for the name, the dispatch to the rules, the plan of a pass's memory and what
// the Machines refuse follow from the row, and a row with a missing fact does not compile. README.md says what belongs
// where.
//
// Whoever includes this says with METAFAST_NAMESPACE whose copy of the rules it is: that of one instruction set, of the
// GPU or its twin, or of the plan, which runs no rules.
#pragma once
#include "layers/add.h"
#include "layers/avg_pool2d.h"
#include "layers/batch_norm.h"
#include "layers/conv2d.h"
#include "layers/cross_entropy.h"
#include "layers/external_loss.h"
#include "layers/gelu.h"
#include "layers/layer_norm.h"
#include "layers/leaky_relu.h"
#include "layers/max_pool2d.h"
#include "layers/mse.h"
#include "layers/norm_relu_pool.h"
#include "layers/relu.h"
#include "layers/sigmoid.h"
#include "layers/tanh.h"
#include "layers/vector.h"

// clang-format off

// What is true of a kind of layer:
//   kind      its name, in Python too
//   rules     the class in layers/ with its four rules, `make` (an Op from a node) and `saved_elements`
//   reads     which of its values the backward rule reads: nothing, the input or the output
//   adjoint   in_place: backward may write the adjoint of the input over the input; else it has a place of its own
//   second    the second derivative: where it is nonzero, tangent_backward reads the adjoint of the output and the
//             tangent of the input; where it is zero it must not
//   features  what the rules do with the features of a value that blocks share: each block works on its own, or makes
//             products of all, or reads whole samples, which are not shared then
//   needs     the primitives of a Machine that the rules use
#define METAFAST_KINDS(ROW)                                                                                           \
 /*  kind        rules                 reads    adjoint    second   features  needs */                                \
 ROW(conv2d,     Conv2d,               input,   own_place, nonzero, products, Need::products | Need::sums)            \
 ROW(batch_norm, BatchNorm,            input,   in_place,  nonzero, whole,    Need::maps | Need::sums | Need::channels)\
 ROW(layer_norm, LayerNorm,            input,   own_place, nonzero, whole,    Need::maps | Need::samples)             \
 ROW(relu,       Pointwise<ReLU>,      output,  own_place, zero,    own,      Need::maps)                             \
 ROW(leaky_relu, Pointwise<LeakyReLU>, input,   in_place,  zero,    own,      Need::maps)                             \
 ROW(tanh,       Pointwise<Tanh>,      output,  own_place, nonzero, own,      Need::maps)                             \
 ROW(sigmoid,    Pointwise<Sigmoid>,   output,  own_place, nonzero, own,      Need::maps)                             \
 ROW(gelu,       Pointwise<GELU>,      input,   in_place,  nonzero, own,      Need::maps)                             \
 ROW(max_pool2d, MaxPool2d,            nothing, own_place, zero,    whole,    Need::maps | Need::windows)             \
 ROW(avg_pool2d, AvgPool2d,            nothing, own_place, zero,    whole,    Need::maps | Need::windows)             \
 ROW(add,        Add,                  nothing, own_place, zero,    own,      Need::maps)

// Likewise, but no node of a model is one: fusion.cpp makes them of several operations, or plan.cpp puts them before one.
#define METAFAST_FUSED_KINDS(ROW)                                                                                     \
 ROW(norm_relu_pool, NormReluPool,     input,   in_place,  nonzero, whole,    Need::maps | Need::sums | Need::windows) \
 ROW(vector,         Vector,           nothing, own_place, zero,    whole,    Need::maps | Need::windows)

// Nodes that become operations of another kind: theirs, and the class whose `make` does it.
#define METAFAST_OTHER_NODES(ROW)                                                                                     \
 ROW(linear,              conv2d,     Linear)                                                                         \
 ROW(adaptive_avg_pool2d, avg_pool2d, AdaptiveAvgPool2d)

// What is true of a loss:
//   reads  what it reads beside the outputs: labels, targets of their shape, or the gradient of an external loss
//   saves  what forward leaves for the other rules: nothing, or an element for each output
#define METAFAST_LOSSES(ROW)                                                                                          \
 /*  kind           rules         reads     saves    needs */                                                         \
 ROW(cross_entropy, CrossEntropy, labels,   outputs, Need::rows)                                                      \
 ROW(mse,           MSE,          targets,  nothing, Need::maps | Need::totals)                                       \
 ROW(external,      ExternalLoss, gradient, nothing, Need::maps | Need::gradients)

// clang-format on

namespace metafast {

enum class Kind : int32_t {
#define METAFAST_NAME(kind, ...) kind,
  METAFAST_KINDS(METAFAST_NAME) METAFAST_FUSED_KINDS(METAFAST_NAME) METAFAST_OTHER_NODES(METAFAST_NAME)
      flatten,  // becomes no operation: whatever reads it reads its input, or a `vector` of that
};

enum class LossKind : int32_t { METAFAST_LOSSES(METAFAST_NAME) };
#undef METAFAST_NAME

}  // namespace metafast

namespace METAFAST_NAMESPACE {

enum class Reads { nothing, input, output };
enum class Adjoint { own_place, in_place };
enum class SecondDerivative { zero, nonzero };
enum class Features { own, products, whole };
enum class LossReads { labels, targets, gradient };
enum class LossSaves { nothing, outputs };

struct KindFacts {
  const char* name;
  Reads reads;
  Adjoint adjoint;
  SecondDerivative second_derivative;
  Features features;
  uint32_t needs;
};

struct LossFacts {
  const char* name;
  LossReads reads;
  LossSaves saves;
  uint32_t needs;
};

// Of a kind that operations have.
METAFAST_HOST_DEVICE constexpr KindFacts facts(Kind kind) {
  switch (kind) {
#define METAFAST_FACTS(kind, rules, reads, adjoint, second, features, needs) \
  case Kind::kind:                                                           \
    return {#kind, Reads::reads, Adjoint::adjoint, SecondDerivative::second, Features::features, needs};
    METAFAST_KINDS(METAFAST_FACTS)
    METAFAST_FUSED_KINDS(METAFAST_FACTS)
#undef METAFAST_FACTS
    default:
      return {};
  }
}

METAFAST_HOST_DEVICE constexpr LossFacts facts(LossKind kind) {
  switch (kind) {
#define METAFAST_FACTS(kind, rules, reads, saves, needs) \
  case LossKind::kind:                                   \
    return {#kind, LossReads::reads, LossSaves::saves, needs};
    METAFAST_LOSSES(METAFAST_FACTS)
#undef METAFAST_FACTS
  }
  return {};
}

// The kind of the operation that a node becomes.
constexpr Kind operation(Kind node) {
  switch (node) {
#define METAFAST_OPERATION(node, kind, maker) \
  case Kind::node:                            \
    return Kind::kind;
    METAFAST_OTHER_NODES(METAFAST_OPERATION)
#undef METAFAST_OPERATION
    default:
      return node;
  }
}

// Does the forward rule of a loss leave something for the others?
METAFAST_HOST_DEVICE constexpr bool saves(LossKind kind) { return facts(kind).saves != LossSaves::nothing; }

// Is it a linear layer or a convolution, with a weight of its own layout?
METAFAST_HOST_DEVICE constexpr bool makes_products(const Op& op) {
  return facts(op.kind).features == Features::products;
}

// Does a Machine with these primitives run the rules of a layer or a loss?
template <class SomeKind>
METAFAST_HOST_DEVICE constexpr bool offers(uint32_t primitives, SomeKind kind) {
  return (facts(kind).needs & ~primitives) == 0;
}

template <class Rules>
constexpr bool agrees(Rules*, Reads, SecondDerivative) {
  return true;
}
template <class Activation>
constexpr bool agrees(Pointwise<Activation>*, Reads reads, SecondDerivative second) {
  return reads == (Activation::reads_output ? Reads::output : Reads::input) &&
         Activation::has_second_derivative == (second == SecondDerivative::nonzero);
}
#define METAFAST_AGREES(kind, rules, reads, adjoint, second, ...)                             \
  static_assert(agrees(static_cast<rules*>(nullptr), Reads::reads, SecondDerivative::second), \
                #kind ": its row in kinds.h and its header differ about what its derivatives read or are");
METAFAST_KINDS(METAFAST_AGREES)
#undef METAFAST_AGREES

// f(rules) is only compiled for what the Machine runs; a Program with anything else never comes to it.
template <class M, auto kind, class Rules, class F>
METAFAST_DEVICE void if_offered(const F& f) {
  if constexpr (offers(M::offers, kind)) f(Rules{});
}

template <class M, class F>
METAFAST_DEVICE void with_rules(Kind kind, const F& f) {
  switch (kind) {
#define METAFAST_CASE(kind, rules, ...) \
  case Kind::kind:                      \
    return if_offered<M, Kind::kind, rules>(f);
    METAFAST_KINDS(METAFAST_CASE)
    METAFAST_FUSED_KINDS(METAFAST_CASE)
#undef METAFAST_CASE
    default:
      return;
  }
}

// The same for those who plan: all rules, whatever a Machine runs.
template <class F>
void with_every_rule(Kind kind, const F& f) {
  switch (kind) {
#define METAFAST_CASE(kind, rules, ...) \
  case Kind::kind:                      \
    return f(rules{});
    METAFAST_KINDS(METAFAST_CASE)
    METAFAST_FUSED_KINDS(METAFAST_CASE)
#undef METAFAST_CASE
    default:
      return;
  }
}

// f(maker), whose make(node, op) turns a node into an operation.
template <class F>
void with_maker(Kind node, const F& f) {
  switch (node) {
#define METAFAST_CASE(kind, rules, ...) \
  case Kind::kind:                      \
    return f(rules{});
    METAFAST_KINDS(METAFAST_CASE)
#undef METAFAST_CASE
#define METAFAST_CASE(node, kind, maker) \
  case Kind::node:                       \
    return f(maker{});
    METAFAST_OTHER_NODES(METAFAST_CASE)
#undef METAFAST_CASE
    default:
      return;
  }
}

template <class M, class F>
METAFAST_DEVICE void with_loss(LossKind kind, const F& f) {
  switch (kind) {
#define METAFAST_CASE(kind, rules, ...) \
  case LossKind::kind:                  \
    return if_offered<M, LossKind::kind, rules>(f);
    METAFAST_LOSSES(METAFAST_CASE)
#undef METAFAST_CASE
  }
}

}  // namespace METAFAST_NAMESPACE
