// The builds of the inner loop for different instruction sets, and the choice among them.
#pragma once
#include "../core/job.h"
#include "../core/plan/layout.h"
#include "../core/trace.h"
#include "team.h"

namespace metafast {

// Groups of chunks that run at once, one in each lane of a machine, so far `next` of `count`; the sums of each lie
// `stride` elements behind those of the one before.
struct Groups {
  int64_t count, stride;
  int64_t* next;
};

template <class T>
struct Isa {
  Layout layout, lanes;
  // Elements of memory that `run` needs, aligned to 64 bytes.
  int64_t (*memory)(const Job<T>&);
  // Takes chunk after chunk, the first of them `next`, until none is left; the tasks of chunk k add to sums[k]. What
  // they do is noted in the trace, if there is one.
  void (*run)(const Job<T>&, int64_t chunk, int64_t* next, T* memory, Trace*);
  // The same for groups of tasks, on a Program in the layout of lanes; none for a Program that cannot run so.
  bool (*runs_lanes)(const Program&);
  int64_t (*lanes_memory)(const Job<T>&);
  void (*run_lanes)(const Job<T>&, const Groups&, T* memory, Trace*);
  // Elements of memory that each member of a team but the first needs; 0: with fewer than so many products in each of
  // its contractions a task is too small for a team.
  int64_t (*team_workspace)(const Job<T>&, int64_t products);
  // Runs chunk k as a member of a team that shares `memory`.
  void (*run_as_team)(const Job<T>&, int64_t chunk, int64_t k, T* memory, T* own, Member, Trace*);
};

// Names of the builds that this processor can run, the best one first.
const char* const* isa_names(int& count);

// The build of that name; null: no such build, or not for this processor.
template <class T>
const Isa<T>* find_isa(const char* name);

}  // namespace metafast
