// The threads of one block. On a GPU they run side by side; elsewhere (the twin) they are gone through one after
// another, and a RaceChecker notices what a GPU would not forgive.
#pragma once
#include <cstdint>

#include "../core/layers/context.h"
#ifndef __CUDACC__
#include "twin/race_checker.h"
#endif

namespace METAFAST_NAMESPACE {

constexpr int warp_size = 32;

// The sum over the lanes of a warp, in the same order in all of them.
#ifdef __CUDACC__
__device__ inline float sum_lanes(float part) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2) part += __shfl_xor_sync(~0u, part, distance);
  return part;
}
#else
template <class T>
T sum_lanes(const T* parts) {
  T sum[warp_size], next[warp_size];
  for (int lane = 0; lane < warp_size; ++lane) sum[lane] = parts[lane];
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < warp_size; ++lane) next[lane] = sum[lane] + sum[lane ^ distance];
    for (int lane = 0; lane < warp_size; ++lane) sum[lane] = next[lane];
  }
  return sum[0];
}
#endif

// One warp as a machine for a single sample.
template <class T>
struct Warp {
  template <class F>
  METAFAST_DEVICE void each(long size, const F& f) const {
#ifdef __CUDACC__
    for (long i = threadIdx.x % warp_size; i < size; i += warp_size) f(i);
    __syncwarp();
#else
    for (long i = 0; i < size; ++i) {
      RaceChecker::enter_lane(i % warp_size);
      f(i);
    }
    RaceChecker::warp_barrier();
#endif
  }

  template <class F>
  METAFAST_DEVICE T total(long size, const F& f) const {
#ifdef __CUDACC__
    T part = 0;
    for (long i = threadIdx.x % warp_size; i < size; i += warp_size) part += f(i);
    return sum_lanes(part);
#else
    T parts[warp_size] = {};
    for (long i = 0; i < size; ++i) {
      RaceChecker::enter_lane(i % warp_size);
      parts[i % warp_size] += f(i);
    }
    return sum_lanes(parts);
#endif
  }

  METAFAST_DEVICE void set(T* to, T value) const {
    each(1, [&](long) {
#ifndef __CUDACC__
      RaceChecker::write(to, sizeof(T));
#endif
      *to = value;
    });
  }
};

template <class T>
class Threads {
 public:
  // `partials` holds one element for each warp that a block can have.
#ifdef __CUDACC__
  __device__ Threads(int, T* partials) : partials(partials) {}
  __device__ int count() const { return static_cast<int>(blockDim.x); }
#else
  Threads(int count, T* partials) : partials(partials), count_(count) {}
  int count() const { return count_; }
#endif

  // Calls f(thread) in every thread, then waits at a barrier.
  template <class F>
  METAFAST_DEVICE void run(const F& f) const {
#ifdef __CUDACC__
    f(static_cast<int>(threadIdx.x));
#else
    for (int thread = 0; thread < count_; ++thread) {
      RaceChecker::enter(thread);
      f(thread);
    }
#endif
    barrier();
  }

  // Calls f(warp, sample): each warp takes its samples whole.
  template <class F>
  METAFAST_DEVICE void run_warps(int samples, const F& f) const {
    const int warps = count() / warp_size;
#ifdef __CUDACC__
    __syncwarp();  // without a barrier, what ran before may have left the lanes apart
    for (int s = static_cast<int>(threadIdx.x) / warp_size; s < samples; s += warps) f(Warp<T>{}, s);
#else
    for (int s = 0; s < samples; ++s) {
      RaceChecker::enter(s % warps * warp_size);
      f(Warp<T>{}, s);
    }
#endif
    barrier();
  }

  // Calls f() without barriers behind what it runs.
  template <class F>
  METAFAST_DEVICE void without_barriers(const F& f) const {
    waits = false;
    f();
    waits = true;
  }

  METAFAST_DEVICE void barrier() const {
    if (!waits) return;
#ifdef __CUDACC__
    __syncthreads();
#else
    RaceChecker::barrier();
#endif
  }

  // Returns the sum of f(thread), the same in every thread.
  template <class F>
  METAFAST_DEVICE T sum(const F& f) const {
    const int warps = count() / warp_size;
    T total = 0;
#ifdef __CUDACC__
    const T part = sum_lanes(f(static_cast<int>(threadIdx.x)));
    if (threadIdx.x % warp_size == 0) partials[threadIdx.x / warp_size] = part;
    __syncthreads();
    for (int w = 0; w < warps; ++w) total += partials[w];
    __syncthreads();
#else
    for (int w = 0; w < warps; ++w) {
      T parts[warp_size];
      for (int lane = 0; lane < warp_size; ++lane) {
        RaceChecker::enter(w * warp_size + lane);
        parts[lane] = f(w * warp_size + lane);
      }
      RaceChecker::enter(w * warp_size);
      RaceChecker::write(partials + w, sizeof(T));
      partials[w] = sum_lanes(parts);
    }
    RaceChecker::barrier();
    run([&](int) {
      total = 0;
      for (int w = 0; w < warps; ++w) {
        RaceChecker::read(partials + w, sizeof(T));
        total += partials[w];
      }
    });
#endif
    return total;
  }

  // Gives the sums over all threads of what each f(thread, parts) adds to its parts, the same in every thread.
  template <int K, class F>
  METAFAST_DEVICE void sums(T (&out)[K], const F& f) const {
#ifdef __CUDACC__
    T parts[K] = {};
    f(static_cast<int>(threadIdx.x), parts);
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] = sum([&](int) { return parts[k]; });
#else
    std::vector<T> parts(count_ * K);
    for (int thread = 0; thread < count_; ++thread) {
      RaceChecker::enter(thread);
      f(thread, &parts[thread * K]);
    }
    for (int k = 0; k < K; ++k) out[k] = sum([&](int thread) { return parts[thread * K + k]; });
#endif
  }

 private:
  T* partials;
  mutable bool waits = true;  // is each thing that is run followed by a barrier?
#ifndef __CUDACC__
  int count_;
#endif
};

}  // namespace METAFAST_NAMESPACE
