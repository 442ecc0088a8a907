// The builds of the inner loop for different instruction sets, and the choice among them.
#pragma once
#include "../core/job.h"
#include "../core/plan/layout.h"
#include "../core/trace.h"
#include "team.h"

namespace metafast {

// Groups of chunks that run at once, one in each lane of a machine.
struct Groups {
  int64_t count;   // groups
  int64_t stride;  // elements from the sums of a group to those of the next
  int64_t* next;   // the first group that no thread has taken yet
};

template <class T>
struct Isa {
  Layout layout, lanes;
  // Elements of memory that `run` needs, aligned to 64 bytes.
  int64_t (*memory)(const Job<T>&);
  // Takes chunk after chunk, the first of them `next`, until none is left; the tasks of chunk k add to sums[k]. Where
  // there is a trace, it takes notes of what they do.
  void (*run)(const Job<T>&, int64_t chunk, int64_t* next, T* memory, Trace*);
  // The same for groups of tasks, on a Program in the layout of lanes, if `runs_lanes` says that it can run so.
  bool (*runs_lanes)(const Program&);
  int64_t (*lanes_memory)(const Job<T>&);
  void (*run_lanes)(const Job<T>&, const Groups&, T* memory, Trace*);
  // Elements of memory that each member of a team but the first needs; 0 where a task is too small for a team: its
  // contractions have fewer than so many products on average.
  int64_t (*team_workspace)(const Job<T>&, int64_t products);
  // Runs chunk k as one member of a team that shares `memory`.
  void (*run_as_team)(const Job<T>&, int64_t chunk, int64_t k, T* memory, T* own, Member, Trace*);
};

// Returns the names of the builds that this processor can run, the best one first.
const char* const* isa_names(int& count);

// Returns the build of that name; null where there is none, or none for this processor.
template <class T>
const Isa<T>* find_isa(const char* name);

}  // namespace metafast
