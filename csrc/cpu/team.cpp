#include "team.h"

#include <chrono>
#include <thread>

namespace metafast {

namespace {

constexpr auto patience = std::chrono::microseconds(500);  // several times what a sleeping thread takes to wake

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// A thread that waits longer than its neighbours' share of a primitive takes leaves its core to others.
template <class F>
void spin_until(const F& done) {
  for (int turn = 0; !done(); ++turn) turn < 2000 ? pause() : std::this_thread::yield();
}

}  // namespace

int Team::join() {
  int rank = joined_;
  do {
    if (rank < 0) return -1;
  } while (!joined_.compare_exchange_weak(rank, rank + 1));
  if (rank > 0) {
    spin_until([&] { return closed_.load(std::memory_order_acquire); });
    return rank;
  }
  const auto end = std::chrono::steady_clock::now() + patience;
  while (joined_ < wanted_ && std::chrono::steady_clock::now() < end) pause();
  size_ = joined_.exchange(-1);
  closed_.store(true, std::memory_order_release);
  return rank;
}

void Team::wait() {
  const int round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
  } else {
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }
}

}  // namespace metafast
