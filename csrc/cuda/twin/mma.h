// Tensor cores on the CPU, as the PTX ISA describes them, written without a look at mma.cuh: a product of what 32 lanes
// hold. They read the leading 19 bits of a TF32 word. Sums are those of float32 in the order of the indices; the order
// and the rounding of a GPU's own are not told.
#pragma once
#include <cstring>

namespace METAFAST_NAMESPACE {

inline uint32_t twin_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float twin_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// To the nearest with 10 bits behind the leading one, ties away from zero; infinities and NaN as they are.
inline uint32_t twin_tf32(float x) {
  const uint32_t bits = twin_bits(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// To the nearest with 7 bits behind the leading one, ties to even.
inline uint32_t twin_bf16(float x) {
  const uint32_t bits = twin_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <int depth>
void twin_product(const float (&a)[16][depth], const float (&b)[depth][8], Accumulators* sums) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    for (int upper = 0; upper < 2; ++upper) {
      for (int odd = 0; odd < 2; ++odd) {
        float& c = sums[lane].c[2 * upper + odd];
        for (int k = 0; k < depth; ++k) c += a[group + 8 * upper][k] * b[k][2 * in_group + odd];
      }
    }
  }
}

inline void twin_m16n8k8(Accumulators* sums, const Words* words) {
  const auto read = [](uint32_t word) { return twin_float(word & 0xffffe000); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    const Words& w = words[lane];
    a[group][in_group] = read(w.a[0]);
    a[group + 8][in_group] = read(w.a[1]);
    a[group][in_group + 4] = read(w.a[2]);
    a[group + 8][in_group + 4] = read(w.a[3]);
    b[in_group][group] = read(w.b[0]);
    b[in_group + 4][group] = read(w.b[1]);
  }
  twin_product<8>(a, b, sums);
}

inline void twin_m16n8k16(Accumulators* sums, const Words* words) {
  const auto low = [](uint32_t word) { return twin_float(word << 16); };
  const auto high = [](uint32_t word) { return twin_float(word & 0xffff0000); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, first = (lane & 3) * 2;
    const Words& w = words[lane];
    for (int half = 0; half < 2; ++half) {
      const int k = first + 8 * half;
      a[group][k] = low(w.a[2 * half]);
      a[group][k + 1] = high(w.a[2 * half]);
      a[group + 8][k] = low(w.a[2 * half + 1]);
      a[group + 8][k + 1] = high(w.a[2 * half + 1]);
      b[k][group] = low(w.b[half]);
      b[k + 1][group] = high(w.b[half]);
    }
  }
  twin_product<16>(a, b, sums);
}

}  // namespace METAFAST_NAMESPACE
