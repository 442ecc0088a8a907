// Traces of calls, gathered over threads while somebody asks for them.
#pragma once
#include <vector>

#include "job.h"
#include "trace.h"

namespace metafast {

// One thread's share of a call; without a trace when nobody asks.
class TraceBuffer {
 public:
  // Room for all that `tasks` tasks can note.
  TraceBuffer(const Program& program, int steps, int64_t tasks);
  ~TraceBuffer();
  TraceBuffer(const TraceBuffer&) = delete;
  Trace* trace() { return spans_.empty() ? nullptr : &trace_; }

 private:
  std::vector<Span> spans_;
  Trace trace_{};
};

// Begins to gather, with nothing; or ends it and returns what there is.
void start_tracing();
std::vector<Span> stop_tracing();

}  // namespace metafast
