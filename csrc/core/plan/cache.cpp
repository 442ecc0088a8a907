#include "cache.h"

#include <mutex>

namespace metafast {

std::shared_ptr<Plan> find_plan(const std::vector<double>& description, Layout layout, int element_size) {
  struct Entry {
    std::vector<double> description;
    Layout layout;
    int element_size;
    std::shared_ptr<Plan> plan;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& e : entries) {
    const Layout& l = e.layout;
    const bool same = l.lanes == layout.lanes && l.panel == layout.panel && l.rows == layout.rows &&
                      l.task_per_lane == layout.task_per_lane && l.blocks == layout.blocks;
    if (same && e.element_size == element_size && e.description == description) return e.plan;
  }
  if (entries.size() >= 32) entries.erase(entries.begin());
  entries.push_back({description, layout, element_size, std::make_shared<Plan>(description, layout, element_size)});
  return entries.back().plan;
}

}  // namespace metafast
