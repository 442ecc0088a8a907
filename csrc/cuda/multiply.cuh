// Products on tensor cores: a warp makes a tile of 16 x 8 of C += A B, whose operands lie in shared memory in float32
// and are rounded on their way.
#pragma once
#include "block_machine.cuh"
#include "mma.cuh"

namespace METAFAST_NAMESPACE {

template <class Format>
struct Elements {
  float a[Format::of_a], b[Format::of_b];
};

// In tiles that are at least half full.
METAFAST_DEVICE inline bool fills_tiles(int rows, int columns, int depth) {
  const int padded = (rows + 15) / 16 * 16 * ((columns + 7) / 8 * 8) * ((depth + 7) / 8 * 8);
  return 2 * rows * columns * depth >= padded;
}

// From row to row and from column to column.
struct Strides {
  int row, column;
};

template <class T>
struct Factors {
  int rows, columns, depth;  // C is rows x columns, and the sum of `count` products over the depth
  Strides of_a, of_b;
  int count;
  const T *a, *b, *other_a, *other_b;
};

// The lane's elements of the tiles of A at (row, k) and of B at (k, column).
template <class M, class Format, class T>
METAFAST_DEVICE void load_elements(const Factors<T>& f, bool other, int row, int column, int k, int lane,
                                   Elements<Format>& held) {
  const T *a = other ? f.other_a : f.a, *b = other ? f.other_b : f.b;
  for (int i = 0; i < Format::of_a; ++i) {
    const int r = row + Format::a_row(lane, i), c = k + Format::a_column(lane, i);
    held.a[i] = r < f.rows && c < f.depth ? M::load(a + r * f.of_a.row + c * f.of_a.column) : T(0);
  }
  for (int i = 0; i < Format::of_b; ++i) {
    const int r = k + Format::b_row(lane, i), c = column + b_column(lane);
    held.b[i] = r < f.depth && c < f.columns ? M::load(b + r * f.of_b.row + c * f.of_b.column) : T(0);
  }
}

// Adds the product of the elements to the sums; with `thrice`, of their upper and lower halves, without what both lower
// ones would give.
template <class Format>
METAFAST_DEVICE void multiply_add(PerLane<Accumulators>& sums, PerLane<Elements<Format>>& elements,
                                  [[maybe_unused]] bool thrice) {
  PerLane<Words> upper;
  upper.each([&](int lane, Words& w) { w = Format::round(elements.of(lane).a, elements.of(lane).b); });
  if constexpr (Format::splits) {
    if (thrice) {
      PerLane<Words> lower, mixed;
      lower.each(
          [&](int lane, Words& w) { w = Format::rest(upper.of(lane), elements.of(lane).a, elements.of(lane).b); });
      mixed.each([&](int lane, Words& w) { w = combined(lower.of(lane), upper.of(lane)); });
      Format::multiply(sums, mixed);
      mixed.each([&](int lane, Words& w) { w = combined(upper.of(lane), lower.of(lane)); });
      Format::multiply(sums, mixed);
    }
  }
  Format::multiply(sums, upper);
}

// start(row, column) is what an element of C is before, finish(row, column, value) takes it.
template <class M, class Format, class T, class Start, class Finish>
METAFAST_DEVICE void multiply_in_tiles(const Threads<T>& threads, const Factors<T>& f, bool thrice, const Start& start,
                                       const Finish& finish) {
  const int across = (f.columns + 7) / 8, tiles = (f.rows + 15) / 16 * across;
  threads.run_warps(tiles, [&](const auto&, int tile) {
    const int row = tile / across * 16, column = tile % across * 8;
    const auto each_sum = [&](PerLane<Accumulators>& sums, const auto& visit) {
      sums.each([&](int lane, Accumulators& held) {
        for (int i = 0; i < 4; ++i) {
          const int r = row + c_row(lane, i), c = column + c_column(lane, i);
          visit(r, c, r < f.rows && c < f.columns, held.c[i]);
        }
      });
    };
    PerLane<Accumulators> sums;
    each_sum(sums, [&](int r, int c, bool inside, float& sum) { sum = inside ? start(r, c) : 0; });
    for (int t = 0; t < f.count; ++t) {
      for (int k = 0; k < f.depth; k += Format::k) {
        PerLane<Elements<Format>> elements;
        elements.each([&](int lane, Elements<Format>& e) { load_elements<M>(f, t > 0, row, column, k, lane, e); });
        multiply_add<Format>(sums, elements, thrice);
      }
    }
    each_sum(sums, [&](int r, int c, bool inside, float& sum) {
      if (inside) finish(r, c, sum);
    });
  });
}

// C += A B where tensor cores are wanted and the shape fills their tiles; false: it is left to do.
template <class T, class Cluster>
template <class Start, class Finish>
METAFAST_DEVICE bool BlockMachine<T, Cluster>::on_tensor_cores([[maybe_unused]] const Factors<T>& f,
                                                               [[maybe_unused]] const Start& start,
                                                               [[maybe_unused]] const Finish& finish) const {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (precision == Precision::float32 || !fills_tiles(f.rows, f.columns, f.depth)) return false;
    if (precision == Precision::bf16) {
      multiply_in_tiles<BlockMachine, Bf16>(threads, f, false, start, finish);
    } else {
      multiply_in_tiles<BlockMachine, Tf32>(threads, f, precision == Precision::tf32x3, start, finish);
    }
    return true;
  }
  return false;
}

}  // namespace METAFAST_NAMESPACE
