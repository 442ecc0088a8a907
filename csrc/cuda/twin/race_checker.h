// What watches the twin's shared memory: every access must lie inside it, at an address that its size divides, and
// between two barriers no element that one thread writes may be touched by another, nor between two barriers of a
// cluster one that a block writes by another. Between threads of one warp a barrier of that warp is enough.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "access_log.h"

namespace METAFAST_NAMESPACE {

// Of one block, in the thread that runs it. `cluster`: those of all blocks that run a task together, by rank.
class RaceChecker {
 public:
  RaceChecker(void* memory, int64_t bytes, int rank, std::vector<RaceChecker*>& cluster)
      : begin(static_cast<char*>(memory)),
        bytes(bytes),
        rank(rank),
        cluster(cluster),
        threads(bytes / grain),
        blocks(cluster.size() > 1 ? bytes / grain : 0) {
    current = cluster[rank] = this;
  }
  ~RaceChecker() { current = cluster[rank] = nullptr; }
  RaceChecker(const RaceChecker&) = delete;

  static void enter(int thread) {
    if (current) current->thread = thread;
  }
  // Another thread of the same warp.
  static void enter_lane(int lane) {
    if (current) current->thread = current->thread / warp * warp + lane;
  }
  static void barrier() {
    if (current) ++current->phase;
  }
  static void warp_barrier() {
    if (current) ++current->warp_phases[current->thread / warp];
  }
  static void cluster_barrier() {
    if (current) ++current->cluster_phase;
  }
  static void read(const void* p, int64_t bytes) {
    if (current) current->touch(p, bytes, false);
  }
  static void write(const void* p, int64_t bytes) {
    if (current) current->touch(p, bytes, true);
  }

  // Of an access to any memory.
  static void expect_aligned(uint64_t address, int64_t size) {
    if (current && address % size != 0) current->fail(unaligned(size), static_cast<int64_t>(address));
  }

  // What lies in the block of that rank where p lies in this one.
  template <class T>
  static T* peer(T* p, int rank) {
    const RaceChecker* other = current->cluster.at(rank);
    const int64_t at = current->place(p);
    if (!other) current->fail("of a block that has ended", at);
    return reinterpret_cast<T*>(other->begin + at);
  }

 private:
  static constexpr int64_t grain = 4;
  static constexpr int warp = 32, max_warps = 8;

  int64_t place(const void* p) const { return static_cast<const char*>(p) - begin; }
  bool holds(const void* p, int64_t size) const { return place(p) >= 0 && place(p) + size <= bytes; }

  void touch(const void* p, int64_t size, bool writes) {
    RaceChecker* owner = holds(p, size) ? this : nullptr;
    for (RaceChecker* other : cluster) {
      if (other && !owner && other->holds(p, size)) owner = other;
    }
    if (!owner) fail("outside of the block's memory", place(p));
    if (owner->place(p) % size != 0) fail(unaligned(size), owner->place(p));
    for (int64_t at = owner->place(p), end = at + size; at < end; at += grain) {
      const Access one{thread, thread / warp, phase, warp_phases[thread / warp]};
      const char* wrong = owner == this ? threads.touch(at / grain, one, writes) : nullptr;
      const Access block{rank, -1, cluster_phase, 0};
      if (!wrong && cluster.size() > 1) wrong = owner->blocks.touch(at / grain, block, writes);
      if (wrong) fail(wrong, at);
    }
  }

  static std::string unaligned(int64_t size) {
    return "where no access of " + std::to_string(size) + " bytes is aligned";
  }

  [[noreturn]] void fail(const std::string& what, int64_t at) const {
    const std::string block = cluster.size() > 1 ? " of block " + std::to_string(rank) : "";
    throw std::runtime_error("twin: thread " + std::to_string(thread) + block + " touches byte " + std::to_string(at) +
                             ", " + what);
  }

  inline static thread_local RaceChecker* current = nullptr;
  char* begin;
  int64_t bytes;
  int rank;
  std::vector<RaceChecker*>& cluster;
  AccessLog threads, blocks;
  int64_t phase = 1, cluster_phase = 1, warp_phases[max_warps] = {};
  int thread = 0;
};

}  // namespace METAFAST_NAMESPACE
