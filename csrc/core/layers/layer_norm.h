// The formulas of batch_norm.h with means over the features of each sample, and parameters a feature.
#pragma once
#include "frame.h"

namespace METAFAST_NAMESPACE {

struct LayerNorm {
  enum Saved { mean, r, mean_gh, mean_ghxh, mean_xd, c, mean_ghd, bend, saved };

  template <class M>
  METAFAST_DEVICE static void forward(const Frame<M>& f) {
    using T = typename M::Real;
    f.m.samples(f.n, [&](const auto& team, int s) {
      const T* x = f.x[0] + s * width(f);
      T sum = team.total(width(f), [=](long i) { return M::load(x + i); });
      const T mu = sum / features(f);
      sum = team.total(width(f), [&](long i) {
        const auto d = real(f, M::load(x + i) - mu, i);
        return d * d;
      });
      team.set(place(f, s, mean), mu);
      team.set(place(f, s, r), M::rsqrt(sum / features(f) + T(f.op.eps)));
      T* y = f.y + s * width(f);
      team.each(width(f), [&](long i) {
        const auto value = value_of(f, f.op.weight, f.theta, i, 1) * standard(f, s, i);
        M::store(y + i, real(f, value + value_of(f, f.op.bias, f.theta, i, 0), i));
      });
    });
  }

  template <class M>
  METAFAST_DEVICE static void backward(const Frame<M>& f) {
    add_adjoints(f, f.g_y, [&](int s, long i) { return M::load(f.g_y + s * width(f) + i) * standard(f, s, i); });
    f.m.samples(f.n, [&](const auto& team, int s) {
      const auto* g = f.g_y + s * width(f);
      const auto gh = [&](long i) { return value_of(f, f.op.weight, f.theta, i, 1) * M::load(g + i); };
      team.set(place(f, s, mean_gh), team.total(width(f), gh) / features(f));
      team.set(place(f, s, mean_ghxh),
               team.total(width(f), [&](long i) { return gh(i) * standard(f, s, i); }) / features(f));
      if (!f.g_x[0]) return;
      auto* g_x = f.g_x[0] + s * width(f);
      team.each(width(f),
                [&](long i) { M::put(g_x + i, at(f, s, r) * real(f, project(f, s, i, gh(i)), i), f.op.add[0]); });
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_forward(const Frame<M>& f) {
    f.m.samples(f.n, [&](const auto& team, int s) {
      if (f.xd[0]) {
        const auto* xd = f.xd[0] + s * width(f);
        team.set(place(f, s, mean_xd), team.total(width(f), [=](long i) { return M::load(xd + i); }) / features(f));
        team.set(place(f, s, c),
                 team.total(width(f), [&](long i) { return M::load(xd + i) * standard(f, s, i); }) / features(f));
      }
      auto* yd = f.yd + s * width(f);
      team.each(width(f), [&](long i) {
        auto value = direction(f, f.op.weight, i) * standard(f, s, i) + direction(f, f.op.bias, i);
        if (f.xd[0]) value += value_of(f, f.op.weight, f.theta, i, 1) * tangent(f, s, i);
        M::store(yd + i, real(f, value, i));
      });
    });
  }

  template <class M>
  METAFAST_DEVICE static void tangent_backward(const Frame<M>& f) {
    add_adjoints(f, f.gd_y, [&](int s, long i) {
      const long at = s * width(f) + i;
      const auto product = M::load(f.gd_y + at) * standard(f, s, i);
      return f.xd[0] ? product + M::load(f.g_y + at) * tangent(f, s, i) : product;
    });
    if (!f.gd_x[0]) return;
    f.m.samples(f.n, [&](const auto& team, int s) {
      const auto* gd = f.gd_y + s * width(f);
      const auto* g = f.g_y ? f.g_y + s * width(f) : nullptr;
      const auto gh = [&](long i) { return value_of(f, f.op.weight, f.theta, i, 1) * M::load(g + i); };
      const auto ghd = [&](long i) {
        const auto value = value_of(f, f.op.weight, f.theta, i, 1) * M::load(gd + i);
        return g ? value + direction(f, f.op.weight, i) * M::load(g + i) : value;
      };
      team.set(place(f, s, mean_ghd), team.total(width(f), ghd) / features(f));
      team.set(place(f, s, bend), team.total(width(f), [&](long i) {
        const auto product = ghd(i) * standard(f, s, i);
        return f.xd[0] ? product + gh(i) * tangent(f, s, i) : product;
      }) / features(f));
      auto* gd_x = f.gd_x[0] + s * width(f);
      team.each(width(f), [&](long i) {
        auto inner = ghd(i) - at(f, s, mean_ghd) - standard(f, s, i) * at(f, s, bend);
        if (f.xd[0]) {
          inner -= tangent(f, s, i) * at(f, s, mean_ghxh);
          inner -= (at(f, s, c) * at(f, s, r)) * project(f, s, i, gh(i));
        }
        M::put(gd_x + i, at(f, s, r) * real(f, inner, i), f.op.add[0]);
      });
    });
  }

 private:
  template <class M>
  METAFAST_DEVICE static long width(const Frame<M>& f) {
    return static_cast<long>(f.op.x.h) * f.op.x.w * f.op.x.ld;
  }

  template <class M>
  METAFAST_DEVICE static typename M::Real features(const Frame<M>& f) {
    return static_cast<typename M::Real>(f.op.x.h * f.op.x.w * f.op.x.c);
  }

  template <class M>
  METAFAST_DEVICE static typename M::Real* place(const Frame<M>& f, int sample, Saved which) {
    return f.saved + static_cast<long>(sample) * saved + which;
  }

  template <class M>
  METAFAST_DEVICE static typename M::Real at(const Frame<M>& f, int sample, Saved which) {
    return M::load_one(place(f, sample, which));
  }

  // A pack with its padding channels set to zero.
  template <class M>
  METAFAST_DEVICE static auto real([[maybe_unused]] const Frame<M>& f, typename M::Pack pack, long i) {
    return M::first(pack, f.op.x.c - static_cast<int>(i % f.op.x.ld));
  }

  template <class M>
  METAFAST_DEVICE static auto standard(const Frame<M>& f, int s, long i) {
    return (M::load(f.x[0] + s * width(f) + i) - at(f, s, mean)) * at(f, s, r);
  }

  template <class M>
  METAFAST_DEVICE static auto project(const Frame<M>& f, int s, long i, typename M::Pack gh) {
    return gh - at(f, s, mean_gh) - standard(f, s, i) * at(f, s, mean_ghxh);
  }

  template <class M>
  METAFAST_DEVICE static auto tangent(const Frame<M>& f, int s, long i) {
    const auto xd = M::load(f.xd[0] + s * width(f) + i);
    return at(f, s, r) * (xd - at(f, s, mean_xd) - standard(f, s, i) * at(f, s, c));
  }

  template <class M>
  METAFAST_DEVICE static auto value_of(const Frame<M>&, const Slot& slot, const typename M::Real* params, long i,
                                       int otherwise) {
    return slot.at < 0 ? M::broadcast(otherwise) : M::load(params + slot.at + i);
  }

  template <class M>
  METAFAST_DEVICE static auto direction(const Frame<M>& f, const Slot& slot, long i) {
    return f.moves(slot) ? M::load(f.u + slot.at + i) : M::broadcast(0);
  }

  // Adds g to the adjoint of beta and product(sample, feature) to that of gamma, sample after sample.
  template <class M, class G>
  METAFAST_DEVICE static void add_adjoints(const Frame<M>& f, const typename M::Real* g, const G& product) {
    if (f.wants(f.op.weight)) {
      auto* out = f.grad + f.op.weight.at;
      f.m.each(width(f), [&](long i) {
        for (int s = 0; s < f.n; ++s) M::put(out + i, real(f, product(s, i), i), true);
      });
    }
    if (f.wants(f.op.bias)) {
      auto* out = f.grad + f.op.bias.at;
      f.m.each(width(f), [&](long i) {
        for (int s = 0; s < f.n; ++s) M::put(out + i, M::load(g + s * width(f) + i), true);
      });
    }
  }
};

}  // namespace METAFAST_NAMESPACE
