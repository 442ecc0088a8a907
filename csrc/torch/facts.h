// What Python asks of the extension instead of keeping a copy: names and numbers of kinds, losses and precisions, the
// layout of spans, and the order of numbers that pass in a row.
#pragma once
#include <string>

namespace metafast {

// How tasks are launched on a GPU, in the order of the operators' argument `settings`: bytes of shared memory that a
// block can have, processors, threads in a block (0: chosen), blocks of a task, a Precision, and a stream.
#define METAFAST_LAUNCH_SETTINGS(ROW) ROW(shared) ROW(processors) ROW(threads) ROW(cluster) ROW(precision) ROW(stream)

// What cpu_memory answers. Elements: of a task, of what all of them share, of each thread more that shares a task
// (0: none does), of a core that runs several tasks at once.
// Numbers: chunks of tasks that have a sum each, which are the most that run side by side, tasks that a core runs at
// once (0: one by one), whether tapes are kept, and the first step
// that the way back goes through, and of how many of these z is kept at once (all: none is taken again).
#define METAFAST_MEMORY_NUMBERS(ROW) \
  ROW(task_memory)                   \
  ROW(shared) ROW(team_workspace) ROW(lanes_memory) ROW(chunks) ROW(lanes) ROW(keeps_tapes) ROW(begin) ROW(segment)

// What is done to each task, in the order of the operators' argument `loop`: InnerLoop's numbers, -1 for None, whether
// each step has samples of its own, and the bytes that a meta-gradient keeps where `memory` does not say so.
#define METAFAST_LOOP_SETTINGS(ROW) \
  ROW(steps)                        \
  ROW(first) ROW(truncate) ROW(memory) ROW(first_order) ROW(learns_rates) ROW(one_rate) ROW(each_step) ROW(budget)

struct LoopSettings {
#define METAFAST_NAME(name) int64_t name;
  METAFAST_LOOP_SETTINGS(METAFAST_NAME)
#undef METAFAST_NAME
};

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
