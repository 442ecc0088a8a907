// Where a block keeps a job, how many blocks run it, and the tables that it reads.
#pragma once
#include <string>
#include <vector>

#include "../core/plan/plan.h"
#include "block_job.h"

namespace metafast {

// Features in quads, rows of weights as block_machine.cuh reads them, their columns shared by the blocks of a cluster.
constexpr Layout block_layout(int cluster) { return {4, 4, true, cluster}; }

// In words why a block cannot run the Program; empty: it can.
std::string block_refusal(const Program& program);

// What of a job decides its memory. Passes that a goal does not need are null.
struct BlockWork {
  Goal goal;
  const Program* program;
  const PassLayout *support_layout, *query_layout;
  int64_t steps;
  bool first_order, needs_lr;
  int cluster;  // blocks that run a task
};

// `resident`: every inner step has its own tape and theta; else one of each is there, and they go through global
// memory.
BlockMemory block_memory(const BlockWork& work, bool resident, int element_size);

// Chooses `memory` and the shape; `threads` > 0 fixes the size of a block. Throws std::runtime_error with the bytes
// where the work does not fit.
BlockShape block_shape(const BlockWork& work, int64_t tasks, int threads, const BlockLimits& limits, int element_size,
                       BlockMemory& memory);

// A Program and its passes, and its maps as one piece of memory that may lie anywhere: the bytes that belong at
// `address`, and the head that points to them. Throws std::runtime_error with the reason where a block cannot run it.
std::vector<char> block_tables(const Plan& plan, const PassLayout* support_layout, const PassLayout* query_layout,
                               uint64_t address, BlockTables& head);

}  // namespace metafast
