// Where the time of a call goes: what a thread did, from when to when. Data only, as program.h.
#pragma once
#include <cstdint>

namespace metafast {

// The phases of a task, and within them the rules of the layers. In the order of metafast/profile/native.py.
enum class SpanKind : int32_t {
  load,
  inner_step,
  query,
  reverse_step,
  forward,
  backward,
  tangent_forward,
  tangent_backward,
};

// `index`: the step of a phase; the node of a rule, -1 for the loss. `task`: the first of those that run at once.
// Nanoseconds of the monotonic clock.
struct Span {
  int64_t begin, end;
  int32_t what, index, task, tasks, thread, unused;
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
