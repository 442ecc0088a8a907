// Rules in watched memory of which two pieces overlap as no plan lets them: what the checker of races says of it, a
// line for each case.
#define METAFAST_NAMESPACE metafast::twin
#include <cstdio>
#include <functional>

#include "../csrc/core/kinds.h"
#include "../csrc/core/trace.h"
#include "../csrc/cuda/contract.cuh"

namespace {

using namespace metafast::twin;
using M = BlockMachine<float, SingleBlock>;

constexpr int samples = 2, classes = 3, row = 4;

// Places of a classifier's outputs and what belongs to them, in elements.
struct Places {
  int partials = 0, labels = 8, y = 16, saved = 32, g = 48, yd = 64, gd = 80;
};

struct Piece {
  alignas(16) float memory[128] = {};
  std::vector<RaceChecker*> cluster{1};
  RaceChecker checker{memory, sizeof memory, 0, cluster};
  M machine{SingleBlock{}, metafast::Precision::float32, 64, memory, nullptr};
};

void check(const char* name, const std::function<void(Piece&)>& f) {
  Piece piece;
  try {
    f(piece);
    std::printf("%s: nothing\n", name);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

void all_of_cross_entropy(Piece& piece, const Places& at) {
  float* m = piece.memory;
  const LossContext<M> f{piece.machine,
                         {1, 1, classes, row},
                         samples,
                         reinterpret_cast<int64_t*>(m + at.labels),
                         0,
                         nullptr,
                         m + at.saved,
                         m + at.y,
                         m + at.g,
                         m + at.yd,
                         m + at.gd,
                         nullptr};
  CrossEntropy::forward(f);
  CrossEntropy::backward(f);
  CrossEntropy::tangent_backward(f);
}

void cross_entropy(const char* name, const Places& places) {
  check(name, [&](Piece& piece) { all_of_cross_entropy(piece, places); });
}

// What one sample writes, another reads: a row further, or at the other sample's label.
void overlaps() {
  const auto moved = [](const char* name, const std::function<void(Places&)>& move) {
    Places at;
    move(at);
    cross_entropy(name, at);
  };
  moved("apart", [](Places&) {});
  moved("saved over y", [](Places& at) { at.saved = at.y + row; });
  moved("labels over saved", [](Places& at) { at.labels = at.saved + row; });
  moved("g over saved", [](Places& at) { at.g = at.saved + row; });
  moved("g over labels", [](Places& at) { at.g = at.labels + 2; });
  moved("gd over yd", [](Places& at) { at.gd = at.yd + row; });
  moved("gd over saved", [](Places& at) { at.gd = at.saved + row; });
  const auto total = [](int from) {
    return [=](Piece& piece) { piece.machine.total(64, [&](long i) { return M::load(piece.memory + from + i); }); };
  };
  check("partial sums apart", total(8));
  check("partial sums over what is summed", total(0));
}

void accesses() {
  const auto quad_at = [](int place) {
    return [=](Piece& piece) { M::store4(piece.memory + place, M::load4(piece.memory + place)); };
  };
  check("a quad", quad_at(4));
  check("a quad that is not aligned", quad_at(5));
  check("a quad that ends outside", quad_at(128));
  check("a label that is not aligned",
        [](Piece& piece) { M::load_one(reinterpret_cast<const int64_t*>(piece.memory + 1)); });
  alignas(16) static float global[8];
  check("a quad of global memory", [](Piece&) { *global4(global + 4) = {}; });
  check("a quad of global memory that is not aligned", [](Piece&) { *global4(global + 2) = {}; });
}

// Of two threads that touch one element, the second after a barrier or not.
void threads() {
  const auto two = [](bool barrier, bool first_writes, int second) {
    return [=](Piece& piece) {
      const auto touch = [&](int thread, bool writes) {
        RaceChecker::enter(thread);
        writes ? M::store(piece.memory, 1) : static_cast<void>(M::load(piece.memory));
      };
      touch(0, first_writes);
      if (barrier) RaceChecker::barrier();
      touch(second, !first_writes);
    };
  };
  check("written, read behind a barrier", two(true, true, 40));
  check("written, read", two(false, true, 40));
  check("read, written", two(false, false, 40));
  check("written, read in the same warp", two(false, true, 1));
  check("written, read by the same thread", two(false, true, 0));
}

// Work without barriers between its parts. Threads take elements in turns, so a shift gives each to another thread.
void parts() {
  const auto write = [](Piece& piece, int from) {
    piece.machine.each(32, [&](long i) { M::store(piece.memory + from + i, 1); });
  };
  const auto read = [](Piece& piece, int from) {
    piece.machine.each(32, [&](long i) { M::load(piece.memory + from + i); });
  };
  const auto together = [=](int from) {
    return [=](Piece& piece) {
      piece.machine.together([&] {
        write(piece, 16);
        read(piece, from);
      });
      read(piece, 17);
    };
  };
  check("parts that go together", together(64));
  check("parts of which one reads what the other writes", together(17));
  const auto ahead = [=](int between) {
    return [=](Piece& piece) {
      piece.machine.ahead([&] { write(piece, 16); });
      for (int i = 0; i < between; ++i) read(piece, 64);
      read(piece, 17);
    };
  };
  check("written ahead, read behind a barrier", ahead(1));
  check("written ahead, read", ahead(0));
}

}  // namespace

int main() {
  overlaps();
  accesses();
  threads();
  parts();
}
