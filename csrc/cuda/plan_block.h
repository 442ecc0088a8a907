// Where a block keeps a job, how many blocks run it, and the tables that it reads.
#pragma once
#include <string>
#include <vector>

#include "../core/plan/plan.h"
#include "block_job.h"

namespace metafast {

// Features in quads, rows of weights as block_machine.cuh reads them, their columns shared by the blocks of a cluster.
constexpr Layout block_layout(int cluster) { return {4, 4, true, cluster}; }

// Says why a block cannot run the Program; empty where it can.
std::string block_refusal(const Program& program);

// The part of a job that decides its memory. A pass that the goal does not need is null.
struct BlockWork {
  Goal goal;
  const Program* program;
  const PassLayout *support_layout, *query_layout;
  int64_t steps;
  bool first_order, learns_rates;
  bool by_rule;         // steps are those of a rule
  int32_t states;       // K, of it
  bool needs_gradient;  // the way back through a step reads the gradient that it took
  int cluster;          // blocks that run a task together
};

// Lays out a block's memory. `resident`: every inner step has its own tape and theta there; else there is one of each,
// and steps go through global memory.
BlockMemory block_memory(const BlockWork& work, bool resident, int element_size);

// Chooses `memory` and the shape; `threads` > 0 fixes the size of a block. Throws std::runtime_error with the bytes
// where the work does not fit.
BlockShape block_shape(const BlockWork& work, int64_t tasks, int threads, const BlockLimits& limits, int element_size,
                       BlockMemory& memory);

// Fills `head` with a Program and its passes, and returns the maps of its parameters as one piece of memory: the bytes
// that belong at `address`, to which `head` points. Throws std::runtime_error with the reason where a block cannot run
// it.
template <class T>
std::vector<char> block_tables(const Plan& plan, const PassLayout* support_layout, const PassLayout* query_layout,
                               uint64_t address, BlockTables& head);

}  // namespace metafast
