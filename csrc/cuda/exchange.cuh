// What the blocks of a cluster tell one another: values whose features they divide, and parts of sums.
#pragma once
#include "machine.cuh"

namespace METAFAST_NAMESPACE {

// Where the inputs of a product are divided values: has all features of one, and of the other if there are two, in this
// block, and changes the pointers accordingly.
template <class T, class Team>
METAFAST_DEVICE void Block<T, Team>::gather(const Grid& grid, int n, const T*& one, const T*& other, bool two) const {
  if (!divided(grid)) return;
  team.barrier();
  one = fetch(grid, n, one, common);
  if (two) other = fetch(grid, n, other, common + n * width(grid));
  team.barrier();
}

template <class T, class Team>
METAFAST_DEVICE const T* Block<T, Team>::fetch(const Grid& grid, int n, const T* from, T* to) const {
  const int own = grid.ld / pack;
  each(n * team.size() * own, [&](long i) {
    const int quad = static_cast<int>(i) % own, part = static_cast<int>(i) / own;
    const int rank = part % team.size(), sample = part / team.size();
    store4(to + i * pack, load4(team.at(from, rank) + sample * grid.ld + quad * pack));
  });
  return to;
}

// to (+)= the sum of all blocks' parts. Of a divided value a block adds its own features, of another one its share of
// them, and gives that to all.
template <class T, class Team>
METAFAST_DEVICE void Block<T, Team>::add_parts(const Grid& grid, int n, T* to, bool add) const {
  const bool apart = divided(grid);
  const int row = width(grid) / pack, own = grid.ld / pack;
  const Share mine = apart ? Share{0, n * own} : share(n * row);
  team.barrier();
  each(mine.count, [&](long i) {
    const int at = mine.first + static_cast<int>(i);
    const int from = apart ? at / own * row + team.rank() * own + at % own : at;
    Quad<T> sum = add ? load4(to + at * pack) : Quad<T>{};
    for (int rank = 0; rank < team.size(); ++rank) sum.add(1, load4(team.at(common, rank) + from * pack));
    apart ? store4(to + at * pack, sum) : store4_everywhere(to + at * pack, sum);
  });
  team.barrier();
}

}  // namespace METAFAST_NAMESPACE
