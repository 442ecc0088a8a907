// Which thread or block touched an element last, and whether another one may touch it now.
#pragma once
#include <cstdint>
#include <vector>

namespace METAFAST_NAMESPACE {

// Who touches memory, after so many barriers of all and so many of its group.
struct Access {
  int who, group;
  int64_t phase, group_phase;

  // Is it known to come after `o`, of the same phase?
  bool follows(const Access& o) const {
    return who == o.who || (group == o.group && group >= 0 && group_phase > o.group_phase);
  }
};

// Who touched which element last.
class AccessLog {
 public:
  explicit AccessLog(int64_t elements) : marks(elements) {}

  // What is wrong with it; null: nothing.
  const char* touch(int64_t i, const Access& access, bool writes) {
    auto& [writer, reader] = marks[i];
    if (writer.phase == access.phase && !access.follows(writer))
      return "that another one writes before the next barrier";
    if (writes) {
      if (reader.phase == access.phase && !access.follows(reader))
        return "written that another one reads before the barrier";
      writer = access;
    } else if (reader.phase == access.phase && reader.who != access.who) {
      reader = {many, reader.group == access.group ? access.group : many, access.phase, access.group_phase};
    } else {
      reader = access;
    }
    return nullptr;
  }

 private:
  static constexpr int many = -1;

  struct Mark {
    Access writer{}, reader{};
  };

  std::vector<Mark> marks;
};

}  // namespace METAFAST_NAMESPACE
