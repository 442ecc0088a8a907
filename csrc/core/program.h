// What a pass runs: a Program with every shape and address worked out. Data only, no functions: the same header is
// compiled for several instruction sets, and an inline function of one must not be linked into another.
#pragma once
#include <cstddef>
#include <cstdint>

namespace metafast {

enum class Kind : int32_t;      // of a layer: kinds.h
enum class LossKind : int32_t;  // likewise

// What follows a pass: nothing, its gradient, or that and the tangents of both.
enum class PassKind : int32_t { predict, gradient, gradient_and_tangent };

// One sample: h x w pixels of c channels, `ld` elements from pixel to pixel; channels c..ld-1 are always zero.
struct Grid {
  int32_t h, w, c, ld;
};

struct Window {
  int32_t kh, kw, sy, sx, py, px, dy, dx;
};

// Rows of a matrix read out of an image: row r is `segments` runs of `length` elements at source[r][s] (-1: zeros),
// to be multiplied by the rows of the other factor that start at first[s]; the product goes to target[r].
struct GatherTable {
  int32_t rows, segments, length;
  const int32_t* source;
  const int32_t* target;
  const int32_t* first;
};

// A parameter of a layer inside the flat vector, `rows` times `stride` elements; at < 0: the layer has none.
struct Slot {
  int64_t at, size;
  int32_t rows, stride;
  bool adapted;
};

struct Op {
  Kind kind;
  int32_t node;              // of the user's model; the first of those that are fused
  int32_t input[2], output;  // values; input[1] < 0: none
  bool add[2];               // the adjoint of that input has been begun by a later reader
  Grid x, y;
  Slot weight, bias;  // or gamma and beta
  Window window;
  bool padded;                  // conv2d: the stored input has its zero border, so that windows never leave it
  const GatherTable* forward;   // conv2d
  const GatherTable* backward;  // conv2d: one for each class of input pixels that meet the same taps
  int32_t classes;
  const int32_t* offsets;    // conv2d: of the rows of the weight that one step of a weight gradient covers: of all
  int32_t n_offsets;         // windows can reach (padded), or of one tap
  bool fixed_statistics;     // batch_norm: means and variances are constants
  bool adaptive, count_pad;  // avg_pool2d
  double eps, negative_slope, divisor;
  int64_t constants;  // batch_norm: mean at constants, variance `ld` later
};

// Where one pass over n samples keeps things, in elements from the base of its memory; -1: not kept.
struct PassLayout {
  int32_t n;
  const int64_t* value;      // by value
  const int64_t* adjoint;    // by value
  const int64_t* saved;      // by op; the last entry belongs to the loss
  const int64_t* tangent;    // by value, from the base of the scratch memory
  const int64_t* d_adjoint;  // by value, likewise
  int64_t tape, scratch;     // elements in all
};

struct Program {
  const Op* ops;
  int32_t n_ops, n_values, output;
  LossKind loss;
  Grid input, out;  // input: with its border
  int32_t border_y, border_x;
  int64_t size;         // of the inner flat vector
  bool used_once;       // each parameter is adapted, and read by one operation
  int64_t common;       // of these, the elements that all blocks have alike; those behind them are of each block's own
  const bool* moving;   // by value: does it depend on an adapted parameter
  const bool* depends;  // by value: on any parameter
};

}  // namespace metafast
