// A warp's product of small matrices on tensor cores, C += A B, A 16 x k and B k x 8. Which elements a lane holds: PTX
// ISA, "Matrix Fragments for mma.m16n8k8" and "... mma.m16n8k16" (the rows i and columns j of elements a_i, b_i, c_i).
// The twin's tensor cores are in mma_twin.h.
#pragma once
#include <cstdint>

#include "threads.h"

namespace METAFAST_NAMESPACE {

// Rounded elements of A and B, in the registers that the instruction reads.
struct Words {
  uint32_t a[4], b[2];
};

// The elements of A from the one, of B from the other.
METAFAST_DEVICE inline Words combined(const Words& a, const Words& b) {
  return {{a.a[0], a.a[1], a.a[2], a.a[3]}, {b.b[0], b.b[1]}};
}

struct Accumulators {
  float c[4];
};

}  // namespace METAFAST_NAMESPACE

#ifndef __CUDACC__
#include "twin/mma.h"
#endif

namespace METAFAST_NAMESPACE {

// What each lane of a warp holds.
template <class Held>
class PerLane {
 public:
  // f(lane, what it holds)
  template <class F>
  METAFAST_DEVICE void each(const F& f) {
#ifdef __CUDACC__
    f(static_cast<int>(threadIdx.x) % warp_size, held);
#else
    for (int lane = 0; lane < warp_size; ++lane) {
      RaceChecker::enter_lane(lane);
      f(lane, held[lane]);
    }
#endif
  }

#ifdef __CUDACC__
  __device__ Held& of(int) { return held; }
  Held held;
#else
  Held& of(int lane) { return held[lane]; }
  Held held[warp_size];
#endif
};

METAFAST_DEVICE inline int c_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
METAFAST_DEVICE inline int c_column(int lane, int i) { return lane % 4 * 2 + i % 2; }
METAFAST_DEVICE inline int b_column(int lane) { return lane / 4; }

METAFAST_DEVICE inline uint32_t round_to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
#else
  return twin_tf32(x);
#endif
}

METAFAST_DEVICE inline uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return twin_bf16(low) | twin_bf16(high) << 16;
#endif
}

METAFAST_DEVICE inline float as_float(uint32_t word) {
#ifdef __CUDACC__
  return __uint_as_float(word);
#else
  return twin_float(word);
#endif
}

// The assembler's text must be a literal. Volatile: all lanes of a warp take part, so it stays on the path that all of
// them go.
#define METAFAST_MMA(shape, c, w)                                                                           \
  asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3])                                     \
               : "r"((w).a[0]), "r"((w).a[1]), "r"((w).a[2]), "r"((w).a[3]), "r"((w).b[0]), "r"((w).b[1]))

// 8 bits of exponent and 11 of significand.
struct Tf32 {
  static constexpr int k = 8, of_a = 4, of_b = 2;
  static constexpr bool splits = true;

  static METAFAST_DEVICE int a_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
  static METAFAST_DEVICE int a_column(int lane, int i) { return lane % 4 + i / 2 * 4; }
  static METAFAST_DEVICE int b_row(int lane, int i) { return lane % 4 + i * 4; }

  static METAFAST_DEVICE Words round(const float* a, const float* b) {
    Words words;
    for (int i = 0; i < of_a; ++i) words.a[i] = round_to_tf32(a[i]);
    for (int i = 0; i < of_b; ++i) words.b[i] = round_to_tf32(b[i]);
    return words;
  }

  // What rounding took away, rounded in turn.
  static METAFAST_DEVICE Words rest(const Words& upper, const float* a, const float* b) {
    Words words;
    for (int i = 0; i < of_a; ++i) words.a[i] = round_to_tf32(a[i] - as_float(upper.a[i]));
    for (int i = 0; i < of_b; ++i) words.b[i] = round_to_tf32(b[i] - as_float(upper.b[i]));
    return words;
  }

  static METAFAST_DEVICE void multiply(PerLane<Accumulators>& sums, const PerLane<Words>& words) {
#ifdef __CUDACC__
    METAFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", sums.held.c, words.held);
#else
    twin_m16n8k8(sums.held, words.held);
#endif
  }
};

// 8 bits of each.
struct Bf16 {
  static constexpr int k = 16, of_a = 8, of_b = 4;
  static constexpr bool splits = false;

  static METAFAST_DEVICE int a_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
  static METAFAST_DEVICE int a_column(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }
  static METAFAST_DEVICE int b_row(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }

  static METAFAST_DEVICE Words round(const float* a, const float* b) {
    Words words;
    for (int i = 0; i < 4; ++i) words.a[i] = pack_bf16(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; ++i) words.b[i] = pack_bf16(b[2 * i], b[2 * i + 1]);
    return words;
  }

  static METAFAST_DEVICE void multiply(PerLane<Accumulators>& sums, const PerLane<Words>& words) {
#ifdef __CUDACC__
    METAFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", sums.held.c, words.held);
#else
    twin_m16n8k16(sums.held, words.held);
#endif
  }
};

}  // namespace METAFAST_NAMESPACE
