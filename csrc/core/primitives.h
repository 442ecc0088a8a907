// The primitives of a Machine, in groups. A kind of layer says in kinds.h which ones its rules use, and a Machine says
// which ones it offers; README.md says what each must do.
#pragma once
#include <cstdint>

namespace metafast {

struct Need {
  enum : uint32_t {
    maps = 1,        // each, clear_padding
    sums = 2,        // reduce: sums over the pixels of a channel
    products = 4,    // correlate, correlate_transposed, outer, together
    samples = 8,     // samples: maps and sums within one sample
    channels = 16,   // channels: maps with coefficients by channel
    windows = 32,    // pixels, windows, windows2x2, outside_windows2x2
    rows = 64,       // rows, sum_rows: a few scalars a sample
    totals = 128,    // total: the sum over all elements
    gradients = 256  // passes under a loss that is computed elsewhere
  };
};

}  // namespace metafast
