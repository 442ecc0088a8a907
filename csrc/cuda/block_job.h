// One launch: what the tasks read and write, and where a block keeps things. Data only: it is passed to the kernel.
#pragma once
#include "../core/job.h"
#include "../core/primitives.h"

namespace metafast {

// Places in a block's shared memory, in elements from its base; steps are the distances between what belongs to one
// inner step and the next, zero where only one is there at a time. `u` holds a direction, or a gradient on its way into
// theta, v or the adjoint of a rate (then it is `g` too): never both, but for steps by rules, whose gradient lies apart
// where the way back reads it. Under a rule `theta` has the K vectors of the state behind it, and `w` has the adjoints
// of these.
struct BlockMemory {
  int32_t partials, support_x, support_y, support_labels, query_x, query_y, query_labels;
  int32_t tape, theta, g, v, w, u, rest;
  int32_t common;  // for what the blocks of a cluster exchange
  int32_t tape_step, theta_step, g_step;
  int32_t record_at,
      record;  // what goes to global memory after each inner step and comes back in reverse: its elements
  int32_t size;
};

// The largest model whose tables a launch can carry. Every launch copies room for so many operations, so there are no
// more than a block's memory has use for.
constexpr int max_ops = 32, max_values = max_ops + 1;

// A PassLayout together with the arrays that it points to.
struct PassTables {
  int32_t n;
  int64_t tape, scratch;
  int64_t value[max_values], adjoint[max_values], tangent[max_values], d_adjoint[max_values];
  int64_t saved[max_ops + 1];
};

// The tables of a model. What every phase reads travels with each job: a GPU has it in the constant bank, where a read
// is one for a whole warp and no barrier of a cluster drops it from a cache. What has an element for each parameter
// lies where the blocks are.
struct BlockTables {
  Program program;  // its `ops` are those below
  Op ops[max_ops];
  PassTables support_layout, query_layout;
  const int32_t* inner;  // [P]: where an element of the user's flat vector lies in the inner ones of a cluster's blocks
  const int32_t* outer;  // the way back, for each block: the index of an adapted parameter, else negative
  const void* moved;     // likewise, of the job's type: one where the inner loop moves a parameter, else zero
};

// How products are computed: exactly in the type of the job, or on tensor cores, of float32 as three products of TF32,
// as one, or of bfloat16; their sums are float32.
#define METAFAST_PRECISIONS(ROW) ROW(float32) ROW(tf32x3) ROW(tf32) ROW(bf16)

enum class Precision : int32_t {
#define METAFAST_NAME(precision) precision,
  METAFAST_PRECISIONS(METAFAST_NAME)
#undef METAFAST_NAME
};

template <class T>
struct BlockJob : Job<T> {
  Precision precision;
  BlockTables tables;  // in place of the pointers of Job
  const T* rates;      // [rate_rows, rate_width], rate_width either n_params or 1
  int64_t rate_width;
  BlockMemory memory;
  T* history;  // [blocks, steps, record]
};
static_assert(sizeof(BlockJob<float>) <= 32764, "CUDA: what a kernel can be given");

// How a job is spread over the machine.
struct BlockShape {
  int32_t threads, blocks, cluster;  // `cluster` of the blocks run a task together
  int64_t bytes;                     // of shared memory for each block
};

// What a GPU has for blocks.
struct BlockLimits {
  int64_t shared;      // bytes that one block can have
  int64_t processors;  // multiprocessors, which run blocks side by side
};

// What the rules of layers and losses can use of a block.
constexpr uint32_t block_offers = Need::maps | Need::sums | Need::products | Need::samples | Need::rows | Need::totals;

constexpr int max_threads = 256;
constexpr int max_warps = max_threads / 32;

}  // namespace metafast
