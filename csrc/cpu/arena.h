// The working memory of one thread, taken from those that earlier calls left: fresh pages cost more than many a call.
#pragma once
#include <cstddef>

namespace metafast {

class Arena {
 public:
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  void* data() const { return block_.data; }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  friend struct Pool;
  Block block_;
};

}  // namespace metafast
