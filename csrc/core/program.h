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

// One sample of a value: h x w pixels of c channels in memory [h, w, ld], where channels c..ld-1 are always zero. Where
// blocks share the features of a value, ld is what one of them has, and c > ld.
struct Grid {
  int32_t h, w;  // pixels
  int32_t c;     // channels
  int32_t ld;    // elements from pixel to pixel
};

// Of a convolution or a pooling, in pixels, along y and x.
struct Window {
  int32_t kh, kw;  // height and width of the kernel
  int32_t sy, sx;  // stride
  int32_t py, px;  // padding on each side
  int32_t dy, dx;  // dilation
};

// A matrix [rows, segments * length] whose rows are read out of an image: row r is `segments` runs of `length` elements
// at source[r][s], to be multiplied by the rows of the other factor that start at first[s]; the product goes to
// target[r].
struct GatherTable {
  int32_t rows, segments, length;
  const int32_t* source;  // [rows, segments]: element of the image, or -1 for a run of zeros
  const int32_t* target;  // [rows]: element of the image that is written
  const int32_t* first;   // [segments]: row of the other factor
};

// Where a parameter of a layer lies in the inner vector: [rows, size / rows], a row for each inner step or one for all.
struct Slot {
  int64_t at;    // first element; negative: the layer has no such parameter
  int64_t size;  // elements
  int32_t rows;
  int32_t stride;  // elements from row to row
  bool adapted;    // by the inner loop
};

// One operation. Members that belong to one kind say so.
struct Op {
  Kind kind;
  int32_t node;                 // of the user's model; the first of those that are fused
  int32_t input[2];             // values that it reads; input[1] < 0: only one
  int32_t output;               // the value that it makes
  bool add[2];                  // an operation behind it has begun the adjoint of that input: this one adds to it
  Grid x, y;                    // of input[0] and output
  Slot weight, bias;            // or gamma and beta
  Window window;                // conv2d, max_pool2d, avg_pool2d
  bool padded;                  // conv2d: the stored input has its border of zeros, so that windows never leave it
  const GatherTable* forward;   // conv2d: the windows of one image
  const GatherTable* backward;  // conv2d, [classes]: for each class of input pixels that meet the same taps
  int32_t classes;
  // conv2d, [n_offsets]: where in an image the rows of the weight lie that one step of a weight gradient covers: all
  // that windows can reach (padded), or those of one tap.
  const int32_t* offsets;
  int32_t n_offsets;
  bool fixed_statistics;  // batch_norm: means and variances are constants
  bool adaptive;          // avg_pool2d: windows follow from the size of the output
  bool count_pad;         // avg_pool2d: the mean counts padding
  double eps;             // batch_norm, layer_norm
  double number;          // of activations that have one: the negative slope of leaky_relu
  double divisor;         // avg_pool2d; 0: the pixels that it counts
  int64_t constants;      // batch_norm: element of the constants where [2, ld], mean and variance, begins
};

// Where one pass over n samples keeps things: elements from the base of its memory, -1: not kept. A value, its adjoint
// and their tangents are [n, h, w, ld].
struct PassLayout {
  int32_t n;                 // samples
  const int64_t* value;      // by value, in the tape
  const int64_t* adjoint;    // by value, in the tape
  const int64_t* saved;      // by op, in the tape: what its forward rule leaves; the last entry belongs to the loss
  const int64_t* tangent;    // by value, in the scratch memory
  const int64_t* d_adjoint;  // by value, in the scratch memory: the tangent of the adjoint
  int64_t tape, scratch;     // elements of the two
  int64_t kept;              // elements in front of the tape that tangent rules read; those behind may go
};

struct Program {
  const Op* ops;  // [n_ops], in the order in which they run
  int32_t n_ops, n_values;
  int32_t output;  // the value that is the model's
  LossKind loss;
  Grid input;                  // with its border
  Grid out;                    // of the output
  int32_t border_y, border_x;  // pixels of zeros on each side of the stored input
  int64_t size;                // elements of the inner vector of parameters
  bool used_once;              // every parameter is adapted, and read by one operation
  int64_t read_from;           // no tangent rule reads elements of theta in front of this one
  int64_t common;      // elements of the inner vector that all blocks have alike; each has its own of those behind them
  const bool* moving;  // by value: does it depend on an adapted parameter?
  const bool* depends;  // by value: does it depend on any parameter?
};

}  // namespace metafast
