// What watches the twin's shared memory: every access must lie inside it, and between two barriers no element that one
// thread writes may be touched by another.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace METAFAST_NAMESPACE {

class Watch {
 public:
  Watch(const void* memory, int64_t bytes) : begin(static_cast<const char*>(memory)), marks(bytes / grain) {
    now = this;
  }
  ~Watch() { now = nullptr; }
  Watch(const Watch&) = delete;

  static void enter(int thread) {
    if (now) now->thread = thread;
  }
  static void barrier() {
    if (now) ++now->phase;
  }
  static void read(const void* p, int64_t bytes) {
    if (now) now->touch(p, bytes, false);
  }
  static void write(const void* p, int64_t bytes) {
    if (now) now->touch(p, bytes, true);
  }

 private:
  static constexpr int64_t grain = 4;
  static constexpr int many = -1;

  struct Mark {
    int64_t written = 0, read = 0;  // the last phase
    int writer = 0, reader = 0;     // the thread then, or `many`
  };

  void touch(const void* p, int64_t bytes, bool writes) {
    const int64_t at = static_cast<const char*>(p) - begin;
    if (at < 0 || at + bytes > static_cast<int64_t>(marks.size()) * grain) fail("outside of the block's memory", at);
    for (int64_t i = at / grain; i < (at + bytes) / grain; ++i) {
      Mark& m = marks[i];
      if (m.written == phase && m.writer != thread) fail("that another thread writes before the next barrier", at);
      if (writes) {
        if (m.read == phase && m.reader != thread) fail("written that another thread reads before the barrier", at);
        m.written = phase, m.writer = thread;
      } else {
        m.reader = m.read == phase && m.reader != thread ? many : thread;
        m.read = phase;
      }
    }
  }

  [[noreturn]] void fail(const char* what, int64_t at) const {
    throw std::runtime_error("twin: thread " + std::to_string(thread) + " touches byte " + std::to_string(at) + ", " +
                             what);
  }

  inline static thread_local Watch* now = nullptr;
  const char* begin;
  std::vector<Mark> marks;
  int64_t phase = 1;
  int thread = 0;
};

}  // namespace METAFAST_NAMESPACE
