// Threads that run one task together, as those of a thread block do: each primitive of the Machine spreads its elements
// over them and ends with a barrier.
#pragma once
#include <atomic>

namespace metafast {

// A team is whoever came: the first member closes it when all are there or enough time has gone by, so that nobody
// waits for a thread that the pool did not give.
class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}

  // Returns the rank of a new member, once the team is closed; negative where it was closed before.
  int join();
  int size() const { return size_; }
  // Returns when all members have called it.
  void wait();

  double leader_value = 0;  // what the first member has for the others

 private:
  const int wanted_;
  int size_ = 0;
  std::atomic<int> joined_{0}, arrived_{0}, round_{0};
  std::atomic<bool> closed_{false};
};

// One member's part of a primitive.
struct Member {
  Team* team = nullptr;  // null: there is no other member
  int rank = 0, members = 1;
};

}  // namespace metafast
