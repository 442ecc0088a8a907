#include "tables.h"

#include <algorithm>

namespace metafast {

const int32_t* Tables::table(std::vector<int32_t> values) {
  tables_.push_back(std::make_unique<std::vector<int32_t>>(std::move(values)));
  return tables_.back()->data();
}

const GatherTable* Tables::gather(std::vector<GatherTable> values) {
  gathers_.push_back(std::make_unique<std::vector<GatherTable>>(std::move(values)));
  return gathers_.back()->data();
}

void Tables::tabulate(Op& op, bool backward) {
  const Window& w = op.window;
  const Grid &x = op.x, &y = op.y;
  op.padded = w.py == 0 && w.px == 0;
  const bool runs = op.padded && w.dx == 1;  // a row of the window is one run of memory
  const int across = runs ? 1 : w.kw, stride = runs ? w.kw * x.ld : x.ld;
  const int length = runs && w.kw > 1 ? stride : x.c;  // without the channels that are always zero, where it can
  std::vector<int32_t> source, target, first, offsets;
  for (int s = 0; s < w.kh * across; ++s) first.push_back(s * stride);
  for (int oy = 0; oy < y.h; ++oy) {
    for (int ox = 0; ox < y.w; ++ox) {
      target.push_back((oy * y.w + ox) * y.ld);
      for (int s = 0; s < w.kh * across; ++s) {
        const int iy = oy * w.sy - w.py + s / across * w.dy, ix = ox * w.sx - w.px + s % across * w.dx;
        source.push_back(iy < 0 || iy >= x.h || ix < 0 || ix >= x.w ? -1 : (iy * x.w + ix) * x.ld);
      }
    }
  }
  const int rows = op.padded && w.kh * w.kw > 1 ? w.kh * w.kw * x.ld : x.c;
  for (int i = 0; i < rows; ++i) offsets.push_back(op.padded ? source[i / stride] + i % stride : i);
  op.n_offsets = rows;
  op.offsets = table(std::move(offsets));
  op.forward = gather({{y.h * y.w, w.kh * across, length, table(std::move(source)), table(std::move(target)),
                        table(std::move(first))}});
  if (backward) tabulate_backward(op);
}

void Tables::tabulate_backward(Op& op) {
  const Window& w = op.window;
  const Grid &x = op.x, &y = op.y;
  std::vector<GatherTable> classes;
  for (int ry = 0; ry < std::min(w.sy, x.h); ++ry) {
    for (int rx = 0; rx < std::min(w.sx, x.w); ++rx) {
      std::vector<int32_t> taps, source, target, first;
      for (int tap = 0; tap < w.kh * w.kw; ++tap) {
        const bool meets = (ry + w.py - tap / w.kw * w.dy) % w.sy == 0 && (rx + w.px - tap % w.kw * w.dx) % w.sx == 0;
        if (meets) {
          taps.push_back(tap);
          first.push_back(tap * y.ld);
        }
      }
      for (int iy = ry; iy < x.h; iy += w.sy) {
        for (int ix = rx; ix < x.w; ix += w.sx) {
          target.push_back((iy * x.w + ix) * x.ld);
          for (int tap : taps) {
            const int top = iy + w.py - tap / w.kw * w.dy, left = ix + w.px - tap % w.kw * w.dx;
            const bool inside = top >= 0 && left >= 0 && top / w.sy < y.h && left / w.sx < y.w;
            source.push_back(inside ? (top / w.sy * y.w + left / w.sx) * y.ld : -1);
          }
        }
      }
      classes.push_back({static_cast<int>(target.size()), static_cast<int>(taps.size()), y.c, table(std::move(source)),
                         table(std::move(target)), table(std::move(first))});
    }
  }
  op.classes = static_cast<int>(classes.size());
  op.backward = gather(std::move(classes));
}

}  // namespace metafast
