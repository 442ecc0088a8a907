// Working memory, taken from what earlier calls left: fresh pages cost more than many a call, and so does memory that
// another core holds in its cache. So whoever asks, a thread by its number, gets its own back where that is free.
#pragma once
#include <cstddef>
#include <cstdint>

namespace metafast {

class Arena {
 public:
  Arena(size_t bytes, int64_t owner);
  ~Arena();
  Arena(const Arena&) = delete;
  void* data() const { return block_.data; }

 private:
  struct MemoryBlock {
    void* data;
    size_t size;
    int64_t owner;
  };
  friend struct Pool;
  MemoryBlock block_;
};

}  // namespace metafast
