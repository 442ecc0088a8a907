#include "trace_buffer.h"

#include <atomic>
#include <mutex>

namespace metafast {

namespace {

std::atomic<bool> tracing{false};
std::atomic<int32_t> threads{0};
std::mutex mutex;
std::vector<Span> gathered;

int32_t this_thread() {
  static thread_local const int32_t number = threads++;
  return number;
}

}  // namespace

TraceBuffer::TraceBuffer(const Program& program, int steps, int64_t tasks) {
  if (!tracing) return;
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
  tracing = true;
}

std::vector<Span> stop_tracing() {
  const std::lock_guard<std::mutex> lock(mutex);
  tracing = false;
  std::vector<Span> spans;
  spans.swap(gathered);
  return spans;
}

}  // namespace metafast
