// What the blocks of a cluster tell one another: values whose features they divide, and parts of sums.
#pragma once
#include "block_machine.cuh"

namespace METAFAST_NAMESPACE {

// Where the inputs of a product are divided values: has all features of one, and of the other if there are two, in this
// block, and changes the pointers accordingly.
template <class T, class Cluster>
METAFAST_DEVICE void BlockMachine<T, Cluster>::gather(const Grid& grid, int n, const T*& one, const T*& other,
                                                      bool two) const {
  if (!divided(grid)) return;
  cluster.barrier();
  one = fetch(grid, n, one, common);
  if (two) other = fetch(grid, n, other, common + n * width(grid));
  cluster.barrier();
}

template <class T, class Cluster>
METAFAST_DEVICE const T* BlockMachine<T, Cluster>::fetch(const Grid& grid, int n, const T* from, T* to) const {
  const int own = grid.ld / pack;
  each(n * cluster.size() * own, [&](long i) {
    const int quad = static_cast<int>(i) % own, part = static_cast<int>(i) / own;
    const int rank = part % cluster.size(), sample = part / cluster.size();
    store4(to + i * pack, load4(cluster.at(from, rank) + sample * grid.ld + quad * pack));
  });
  return to;
}

// to (+)= the sum of all blocks' parts. Of a divided value a block adds its own features, of another one its share of
// them, and gives that to all.
template <class T, class Cluster>
METAFAST_DEVICE void BlockMachine<T, Cluster>::add_parts(const Grid& grid, int n, T* to, bool add) const {
  const bool is_divided = divided(grid);
  const int row = width(grid) / pack, own = grid.ld / pack;
  const QuadRange mine = is_divided ? QuadRange{0, n * own} : share(n * row);
  cluster.barrier();
  each(mine.count, [&](long i) {
    const int at = mine.first + static_cast<int>(i);
    const int from = is_divided ? at / own * row + cluster.rank() * own + at % own : at;
    Quad<T> sum = add ? load4(to + at * pack) : Quad<T>{};
    for (int rank = 0; rank < cluster.size(); ++rank) sum.add(1, load4(cluster.at(common, rank) + from * pack));
    is_divided ? store4(to + at * pack, sum) : store4_everywhere(to + at * pack, sum);
  });
  cluster.barrier();
}

}  // namespace METAFAST_NAMESPACE
