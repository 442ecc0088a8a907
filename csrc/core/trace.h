// Where the time of a call goes: what a thread did, from when to when. Data only, as program.h.
#pragma once
#include <cstdint>

namespace metafast {

// What spans are about: the phases of a task, and within them the rules of the layers.
#define METAFAST_PHASES(ROW) ROW(load) ROW(inner_step) ROW(query) ROW(reverse_step)
#define METAFAST_RULES(ROW) ROW(forward) ROW(backward) ROW(tangent_forward) ROW(tangent_backward)

enum class SpanKind : int32_t {
#define METAFAST_NAME(kind) kind,
  METAFAST_PHASES(METAFAST_NAME) METAFAST_RULES(METAFAST_NAME)
#undef METAFAST_NAME
};

// Python reads it as torch/facts.cpp describes it.
struct Span {
  int64_t begin, end;  // nanoseconds of the monotonic clock
  SpanKind kind;
  int32_t index;        // of a phase: its step; of a rule: its node, -1 for the loss
  int32_t task, tasks;  // the first of the tasks that ran at once, and how many
  int32_t thread;
};

// What one thread notes in one call. Rules lie within phases: at most two spans are open at once.
struct Trace {
  Span* spans;
  int64_t size, capacity, open[2];
  int32_t depth, task, tasks, thread;
};

// Not inline, and apart from the code that is timed: where nobody asks, all that is left of a note is a test.
void begin_span(Trace& trace, SpanKind kind, int index);
void end_span(Trace& trace);

}  // namespace metafast
