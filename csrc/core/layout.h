#pragma once
#include <cstdint>

namespace metafast {

// What memory looks like to one build of a Machine.
struct Layout {
  int32_t lanes, panel;  // elements in a pack, and in a panel of weights
};

}  // namespace metafast
