// The blocks of a cluster on the CPU: threads of which one runs at a time, from barrier to barrier in the order of
// their ranks, so that a run can be repeated and a RaceChecker needs no locks.
#pragma once
#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace METAFAST_NAMESPACE {

class RoundRobin {
 public:
  explicit RoundRobin(int count) : ended(count, false) {}

  int count() const { return static_cast<int>(ended.size()); }

  // Runs f(rank) for all ranks; rethrows the first error.
  template <class F>
  void run(const F& f) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < count(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          await(rank);
          f(rank);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
        end(rank);
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
  }

  // A barrier: returns when all others have come to theirs.
  void barrier(int rank) {
    next(rank);
    await(rank);
  }

 private:
  void await(int rank) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn == rank || error; });
    if (error) throw std::runtime_error("twin: another block of the cluster has failed");
  }

  void next(int rank) {
    const std::lock_guard<std::mutex> lock(mutex);
    turn = (rank + 1) % count();
    if (ended[turn] && !error) {
      error = std::make_exception_ptr(std::runtime_error("twin: a block waits for one of its cluster that has ended"));
    }
    changed.notify_all();
  }

  void end(int rank) {
    if (last(rank)) return;
    next(rank);
  }

  bool last(int rank) {
    const std::lock_guard<std::mutex> lock(mutex);
    ended[rank] = true;
    return std::find(ended.begin(), ended.end(), false) == ended.end();
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::exception_ptr error;
  std::vector<bool> ended;
  int turn = 0;
};

}  // namespace METAFAST_NAMESPACE
