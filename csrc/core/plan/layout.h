#pragma once
#include <cstdint>

namespace metafast {

// What memory looks like to one build of a Machine.
struct Layout {
  int32_t lanes;       // elements in a pack; channels are padded to whole packs
  int32_t panel;       // columns of a weight that lie side by side, [panel][row][column]
  bool rows = false;   // each row of a weight is one panel, an odd number of packs: no two meet in a memory bank
  int32_t blocks = 1;  // that share the columns of each weight; of all else each has its own copy
  bool task_per_lane = false;  // a pack is one element of each of several tasks; nothing is padded
};

}  // namespace metafast
