#include "arena.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "../core/asan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace metafast {

struct Pool {
  std::mutex mutex;
  std::vector<Arena::MemoryBlock> blocks;
};

namespace {

Pool& pool() {
  static Pool* const pool = new Pool;  // outlives every thread
  return *pool;
}

constexpr size_t huge_page = size_t{2} << 20;

}  // namespace

Arena::Arena(size_t bytes, int64_t owner) {
  {
    // The owner's, else the smallest block that is large enough; else the largest makes room for the new one.
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& blocks = pool().blocks;
    std::sort(blocks.begin(), blocks.end(), [](const MemoryBlock& a, const MemoryBlock& b) { return a.size < b.size; });
    const auto fits = [&](const MemoryBlock& b) { return b.size >= bytes; };
    auto found =
        std::find_if(blocks.begin(), blocks.end(), [&](const MemoryBlock& b) { return fits(b) && b.owner == owner; });
    if (found == blocks.end()) found = std::find_if(blocks.begin(), blocks.end(), fits);
    if (found != blocks.end()) {
      block_ = *found;
      block_.owner = owner;
      blocks.erase(found);
      return;
    }
    if (!blocks.empty()) {
      std::free(blocks.back().data);
      blocks.pop_back();
    }
  }
  const size_t size = (std::max<size_t>(bytes, 1) + huge_page - 1) / huge_page * huge_page;
  block_ = {std::aligned_alloc(huge_page, size), size, owner};
  if (!block_.data) throw std::bad_alloc();
#ifdef __linux__
  madvise(block_.data, size, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() {
  allow(block_.data, static_cast<int64_t>(block_.size));  // the next owner lays it out anew
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().blocks.push_back(block_);
}

}  // namespace metafast
