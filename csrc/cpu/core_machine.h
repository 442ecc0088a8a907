// The Machine that is one core with SIMD, or one of a team of them. Maps and reductions take a function of a pack of
// channels that returns the function to apply to each of its elements, so what belongs to a channel stays in registers.
// In a team every primitive takes its share of the elements and ends with a barrier. An element is always computed
// whole and in the same order, so the numbers do not depend on the size of the team.
#pragma once
#include "../core/layers/context.h"
#include "../core/steps/step_rule.h"
#include "../core/trace.h"
#include "simd.h"
#include "team.h"

namespace METAFAST_NAMESPACE {

template <class T>
class CoreMachine : public Simd<T> {
 public:
  using Simd<T>::lanes;
  using typename Simd<T>::Pack;
  using Term = METAFAST_NAMESPACE::Term<T>;
  using Pair = METAFAST_NAMESPACE::Pair<T>;

  static constexpr uint32_t offers = Need::maps | Need::sums | Need::products | Need::samples | Need::channels |
                                     Need::windows | Need::rows | Need::totals | Need::gradients;

  static constexpr int tasks = 1;  // that run at once
  using Loss = double;

  // What rules add to the vector `of`, once to each element, makes to = from - rate * it. So a vector need not be
  // cleared, written and read again, which costs much where the threads of a team share it.
  struct Descent {
    const T* of;
    T* to;
    const T* from;
    T rate;
  };
  Descent descent{};

  // Workspaces hold workspace_size elements; `shared` is that of the whole team, the first member's own.
  CoreMachine(const Program& program, T* own, T* shared, Member member);

  Trace* trace = nullptr;
  void begin(SpanKind what, int index) const {
    if (trace) begin_span(*trace, what, index);
  }
  void end() const {
    if (trace) end_span(*trace);
  }

  static long pixel(const Grid& grid, int sample, int y, int x) {
    return ((static_cast<long>(sample) * grid.h + y) * grid.w + x) * grid.ld;
  }

  // This member's of `count` elements.
  Share share(long count) const {
    if (!member.team) return {0, count};
    return {count * member.rank / member.members, count * (member.rank + 1) / member.members};
  }
  void barrier() const {
    if (member.team) member.team->wait();
  }
  bool leads() const { return member.rank == 0; }
  bool is_shared() const { return member.team; }

  // For what is too small to be shared.
  template <class F>
  void once(const F& f) const {
    if (leads()) f();
    barrier();
  }

  template <class F>
  void each(long size, const F& f) const {
    const Share packs = share((size + lanes - 1) / lanes);
    for (long i = packs.first * lanes; i < packs.end * lanes; i += lanes) f(i);
    barrier();
  }

  // f() does several things of which none reads what another one writes.
  template <class F>
  void together(const F& f) const {
    f();
  }

  // f(channel) gives what is done at each pixel. Pixels go in blocks that stay in the first-level cache.
  template <class F>
  void channels(long rows, int ld, const F& f) const {
    const Share mine = share(rows);
    for (long block = mine.first; block < mine.end; block += block_rows) {
      const long end = block + block_rows < mine.end ? block + block_rows : mine.end;
      for (int ch = 0; ch < ld; ch += lanes) {
        const auto at_pixel = f(ch);
        for (long row = block; row < end; ++row) at_pixel(row * ld + ch);
      }
    }
    barrier();
  }

  // out[k][channel] = sum over pixels of K quantities. Blocks are summed in the real type, their sums in double.
  template <int K, class F>
  void reduce(long rows, int ld, T* out, bool add, const F& f) const {
    const Descent way = part_of_descent(out);
    reduce<K>(rows, ld, f, [=](long i, Pack sum) {
      if (way.of) {
        Simd<T>::store(way.to + i, Simd<T>::load(way.from + i) - way.rate * sum);
      } else {
        Simd<T>::put(out + i, sum, add);
      }
    });
  }

  // f(machine, sample): a machine runs the maps and sums of one sample, here one core.
  template <class F>
  void samples(int n, const F& f) const {
    CoreMachine alone = *this;
    alone.member = {};
    each_sample(n, [&](int s) { f(alone, s); });
  }

  // A single element of any type.
  template <class E>
  static E load_one(const E* p) {
    return *p;
  }
  template <class E>
  static void store_one(E* p, E value) {
    *p = value;
  }
  static void set(T* to, T value) { *to = value; }

  // f(sample, task), for what is a few scalars a sample.
  template <class F>
  void rows(int n, const F& f) const {
    each_sample(n, [&](int s) { f(s, 0); });
  }

  template <class F>
  double sum_rows(int n, const F& f) const {
    return from_leader([&] {
      double sum = 0;
      for (int s = 0; s < n; ++s) sum += f(s, 0);
      return sum;
    });
  }

  // The sum over all elements of f(i), in rows of any length.
  template <class F>
  T total(long size, int, const F& f) const {
    return total(size, f);
  }

  template <class F>
  T total(long size, const F& f) const {
    return static_cast<T>(from_leader([&] {
      double sum = 0;
      for (long block = 0; block < size; block += block_rows * lanes) {
        const long end = block + block_rows * lanes < size ? block + block_rows * lanes : size;
        Pack part{};
        for (long i = block; i < end; i += lanes) part += f(i);
        sum += Simd<T>::sum(part);
      }
      return sum;
    }));
  }

  // Calls f(i, sums) for each pack, as `each` does, and gives the sums over all elements of the K quantities that f
  // adds to sums. Members share the blocks, whose sums lie in `blocks` until all are there.
  template <int K, class F>
  void totals(long size, const StepRule<T>&, double* blocks, double (&out)[K][1], const F& f) const {
    const long block = block_rows * lanes, count = total_blocks(size);
    const Share mine = share(count);
    for (long b = mine.first; b < mine.end; ++b) {
      Pack parts[K] = {};
      const long end = (b + 1) * block < size ? (b + 1) * block : size;
      for (long i = b * block; i < end; i += lanes) f(i, parts);
      for (int k = 0; k < K; ++k) blocks[b * K + k] = Simd<T>::sum(parts[k]);
    }
    barrier();
    for (int k = 0; k < K; ++k) {
      out[k][0] = 0;
      for (long b = 0; b < count; ++b) out[k][0] += blocks[b * K + k];
    }
    barrier();
  }
  static long total_blocks(long size) { return (size + block_rows * lanes - 1) / (block_rows * lanes); }

  // f(sample, offset, y, x) at each pixel.
  template <class F>
  void pixels(const Grid& grid, int n, const F& f) const {
    each_sample(n, [&](int sample) {
      for (int y = 0; y < grid.h; ++y)
        for (int x = 0; x < grid.w; ++x) f(sample, pixel(grid, sample, y, x), y, x);
    });
  }

  // f(sample, offset of the output, top, left of the window) for each window of a pooling.
  template <class F>
  void windows(const Op& op, int n, const F& f) const {
    const Window& w = op.window;
    pixels(op.y, n, [&](int sample, long out, int y, int x) { f(sample, out, y * w.sy - w.py, x * w.sx - w.px); });
  }

  // f(channel) gives what is done to each 2x2 window: of the offset of the output and the four of the input.
  template <class F>
  void windows2x2(const Op& op, int n, const F& f) const {
    const long ld = op.x.ld, across = op.x.w * ld;
    const Share lines = share(static_cast<long>(n) * op.y.h);
    for (long line = lines.first; line < lines.end; ++line) {
      const int sample = static_cast<int>(line / op.y.h), y = static_cast<int>(line % op.y.h);
      for (int ch = 0; ch < ld; ch += lanes) {
        const auto at_window = f(ch);
        long out = pixel(op.y, sample, y, 0) + ch, in = pixel(op.x, sample, 2 * y, 0) + ch;
        for (int x = 0; x < op.y.w; ++x, out += ld, in += 2 * ld) {
          const long corners[4] = {in, in + ld, in + across, in + across + ld};
          at_window(out, corners);
        }
      }
    }
    barrier();
  }

  // f(channel) gives what is done at each pixel of an odd last row or column, which no 2x2 window covers.
  template <class F>
  void outside_windows2x2(const Op& op, int n, const F& f) const {
    const Grid& g = op.x;
    if (2 * op.y.h == g.h && 2 * op.y.w == g.w) return;
    const Share packs = share((g.ld + lanes - 1) / lanes);
    for (int ch = static_cast<int>(packs.first) * lanes; ch < packs.end * lanes; ch += lanes) {
      const auto at_pixel = f(ch);
      for (int sample = 0; sample < n; ++sample) {
        for (int y = 0; y < g.h; ++y) {
          for (int x = y < 2 * op.y.h ? 2 * op.y.w : 0; x < g.w; ++x) at_pixel(pixel(g, sample, y, x) + ch);
        }
      }
    }
    barrier();
  }

  // Sets the channels behind the last one to zero.
  void clear_padding(const Grid& grid, int n, T* y) const {
    const int last = grid.ld - lanes, real = grid.c - last;
    if (real == lanes) return;
    pixels(grid, n, [&](int, long out, int, int) {
      Simd<T>::store(y + out + last, Simd<T>::first(Simd<T>::load(y + out + last), real));
    });
  }

  // y = sum of terms W * a, plus a bias.
  void correlate(const Op& op, int n, const Term* terms, int count, const T* bias, T* y) const;
  // g_x (+)= sum of terms W *' a.
  void correlate_transposed(const Op& op, int n, const Term* terms, int count, T* g_x, bool add) const;
  // g_W += sum of pairs g (x) x.
  void outer(const Op& op, int n, const Pair* pairs, int count, T* g_w) const;

  static long workspace_size(const Program& program);

  // Of a vector that all tasks share.
  static Pack load_shared(const T* p, long i) { return Simd<T>::load(p + i); }
  static double of_task(double loss, int) { return loss; }
  // The numbers f(task) of those that run at once.
  template <class F>
  static Pack by_task(const F& f) {
    return Simd<T>::broadcast(static_cast<T>(f(0)));
  }
  // One rounding, here and in lanes: a compiler that may choose would choose by what is around it.
  static void add_weighted(double& sum, double weight, double loss) { sum = __builtin_fma(weight, loss, sum); }

 protected:
  CoreMachine() = default;  // for who brings contractions of its own
  static constexpr int block_rows = 64;

  // write(k * ld + channel, sum) for each pack of the sums.
  template <int K, class F, class W>
  void reduce(long rows, int ld, const F& f, const W& write) const {
    const Share packs = share((ld + lanes - 1) / lanes);
    for (int ch = static_cast<int>(packs.first) * lanes; ch < packs.end * lanes; ch += lanes) {
      const auto at_pixel = f(ch);
      const auto block_sums = [&](long row, long end, Pack(&sums)[K]) {
        Pack odd[K] = {};
        for (; row + 1 < end; row += 2) {
          at_pixel(row * ld + ch, sums);
          at_pixel((row + 1) * ld + ch, odd);
        }
        if (row < end) at_pixel(row * ld + ch, sums);
        for (int k = 0; k < K; ++k) sums[k] += odd[k];
      };
      if (rows <= block_rows) {
        Pack sums[K] = {};
        block_sums(0, rows, sums);
        for (int k = 0; k < K; ++k) write(static_cast<long>(k) * ld + ch, sums[k]);
        continue;
      }
      double total[K][lanes] = {};
      for (long block = 0; block < rows; block += block_rows) {
        Pack sums[K] = {};
        block_sums(block, block + block_rows < rows ? block + block_rows : rows, sums);
        for (int k = 0; k < K; ++k) {
          for (int lane = 0; lane < lanes; ++lane) total[k][lane] += sums[k][lane];
        }
      }
      for (int k = 0; k < K; ++k) {
        Pack sum{};
        for (int lane = 0; lane < lanes; ++lane) sum[lane] = static_cast<T>(total[k][lane]);
        write(static_cast<long>(k) * ld + ch, sum);
      }
    }
    barrier();
  }

 private:
  // Where it leads for the elements from `of` on, a part of its vector; empty: there is none.
  Descent part_of_descent(const T* of) const {
    if (!descent.of) return {};
    const long i = of - descent.of;
    return {of, descent.to + i, descent.from + i, descent.rate};
  }

  bool shares_columns(int n, int columns) const;
  void multiply_vectors(const Grid& from, const Grid& to, int n, const Term* terms, int count, const T* bias, bool add,
                        T* y) const;

  // f(sample), for this member's samples.
  template <class F>
  void each_sample(int n, const F& f) const {
    const Share mine = share(n);
    for (int s = static_cast<int>(mine.first); s < mine.end; ++s) f(s);
    barrier();
  }

  // What f() gives the first member, handed to all members.
  template <class F>
  double from_leader(const F& f) const {
    if (!member.team) return f();
    once([&] { member.team->leader_value = f(); });
    const double value = member.team->leader_value;
    barrier();
    return value;
  }

  Member member;
  T *zeros = nullptr, *scratch = nullptr;       // this member's
  T *packed = nullptr, *transformed = nullptr;  // the team's
};

}  // namespace METAFAST_NAMESPACE
