#include "trace.h"

#include <chrono>
#include <stdexcept>

namespace metafast {

namespace {

int64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

}  // namespace

void begin_span(Trace& trace, SpanKind kind, int index) {
  trace.open[trace.depth++] = trace.size;
  if (trace.size == trace.capacity) throw std::logic_error("metafast: a trace is longer than its call allows");
  trace.spans[trace.size++] = {now(), 0, kind, index, trace.task, trace.tasks, trace.thread};
}

void end_span(Trace& trace) { trace.spans[trace.open[--trace.depth]].end = now(); }

}  // namespace metafast
