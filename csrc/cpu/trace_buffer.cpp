#include "trace_buffer.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>

namespace metafast {

namespace {

std::atomic<bool> recording{false};
std::atomic<int32_t> threads{0};
std::mutex mutex;
std::vector<Span> gathered;

int32_t this_thread() {
  static thread_local const int32_t number = threads++;
  return number;
}

int64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

}  // namespace

void begin_span(Trace& trace, SpanKind what, int index) {
  trace.open[trace.depth++] = trace.size;
  if (trace.size == trace.capacity) throw std::logic_error("metafast: a trace is longer than its call allows");
  trace.spans[trace.size++] = {now(), 0, static_cast<int32_t>(what), index, trace.task, trace.tasks, trace.thread, 0};
}

void end_span(Trace& trace) { trace.spans[trace.open[--trace.depth]].end = now(); }

TraceBuffer::TraceBuffer(const Program& program, int steps, int64_t tasks) {
  if (!recording) return;
  const int64_t rules = 2 * program.n_ops + 2;  // of a pass, with the loss's
  spans_.resize(tasks * (1 + (steps + 1) * (3 + 4 * rules)));
  trace_.spans = spans_.data();
  trace_.capacity = static_cast<int64_t>(spans_.size());
  trace_.thread = this_thread();
}

TraceBuffer::~TraceBuffer() {
  if (spans_.empty()) return;
  const std::lock_guard<std::mutex> lock(mutex);
  gathered.insert(gathered.end(), trace_.spans, trace_.spans + trace_.size);
}

void start_tracing() {
  const std::lock_guard<std::mutex> lock(mutex);
  gathered.clear();
  recording = true;
}

std::vector<Span> stop_tracing() {
  const std::lock_guard<std::mutex> lock(mutex);
  recording = false;
  std::vector<Span> spans;
  spans.swap(gathered);
  return spans;
}

}  // namespace metafast
