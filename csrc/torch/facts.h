// What Python asks of the extension instead of keeping a copy: names and numbers of kinds, losses and precisions, the
// layout of spans, and the order of numbers that pass in a row.
#pragma once
#include <string>

namespace metafast {

// How tasks are launched on a GPU, in the order of the operators' argument `settings`: bytes of shared memory that a
// block can have, processors, threads in a block (0: chosen), blocks of a task, a Precision, and a stream.
#define METAFAST_LAUNCH_SETTINGS(ROW) ROW(shared) ROW(processors) ROW(threads) ROW(cluster) ROW(precision) ROW(stream)

// What cpu_memory answers. Elements: of the tape of one step's pass over the support set and of its tangents, of a pass
// over the query set, of each thread more that shares a task (0: none does), of a core that runs several tasks at once.
// Numbers: chunks of tasks that have a sum each, which are the most that run side by side, and tasks that a core runs
// at once (0: one by one).
#define METAFAST_MEMORY_NUMBERS(ROW) \
  ROW(tape) ROW(tangents) ROW(query_tape) ROW(team_workspace) ROW(lanes_memory) ROW(chunks) ROW(lanes)

enum class Setting {
#define METAFAST_NAME(name) name,
  METAFAST_LAUNCH_SETTINGS(METAFAST_NAME)
#undef METAFAST_NAME
};

struct MemoryNumbers {
#define METAFAST_NAME(name) double name;
  METAFAST_MEMORY_NUMBERS(METAFAST_NAME)
#undef METAFAST_NAME
};

// All of it as JSON.
std::string facts_as_json();

}  // namespace metafast
