// Packs of lanes through the compiler's vector extensions: one source for SSE, AVX2, AVX-512 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#if !defined(METAFAST_NAMESPACE) || !defined(METAFAST_VECTOR_BYTES)
#error "inner_loop.cpp is built once for each instruction set with METAFAST_NAMESPACE and METAFAST_VECTOR_BYTES"
#endif

// On the innermost loops: inlined into their callers they share its registers, and sums spill to memory.
#define METAFAST_KERNEL [[gnu::noinline]]
#define METAFAST_INLINE [[gnu::always_inline]]

namespace METAFAST_NAMESPACE {

// The vector types, spelt out: attributes on dependent types do not survive overload resolution.
template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  using Integer = int32_t;
  typedef float Pack __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
  typedef float Half __attribute__((vector_size(METAFAST_VECTOR_BYTES / 2)));
  typedef int32_t Index __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(METAFAST_VECTOR_BYTES / 4)));
};
template <>
struct VectorTypes<double> {
  using Integer = int64_t;
  typedef double Pack __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
  typedef double Half __attribute__((vector_size(METAFAST_VECTOR_BYTES / 2)));
  typedef int64_t Index __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(METAFAST_VECTOR_BYTES / 8)));
};

// The root is one instruction, which compilers do not make of a loop over lanes: it would have to set errno.
#ifdef __x86_64__
#if METAFAST_VECTOR_BYTES == 64
#define METAFAST_ROOT(type) _mm512_sqrt_##type
#elif METAFAST_VECTOR_BYTES == 32
#define METAFAST_ROOT(type) _mm256_sqrt_##type
#else
#define METAFAST_ROOT(type) _mm_sqrt_##type
#endif
METAFAST_INLINE static inline VectorTypes<float>::Pack root(VectorTypes<float>::Pack v) { return METAFAST_ROOT(ps)(v); }
METAFAST_INLINE static inline VectorTypes<double>::Pack root(VectorTypes<double>::Pack v) {
  return METAFAST_ROOT(pd)(v);
}
#undef METAFAST_ROOT
#else
template <class Pack>
static Pack root(Pack v) {
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}
#endif

// Elements first .. end - 1.
struct Share {
  long first, end;
};

template <class T>
struct Simd {
  using Real = T;
  using Integer = typename VectorTypes<T>::Integer;
  using Pack = typename VectorTypes<T>::Pack;
  using Index = typename VectorTypes<T>::Index;
  using Bytes = typename VectorTypes<T>::Bytes;
  static constexpr int lanes = METAFAST_VECTOR_BYTES / sizeof(T);

  static Pack load(const T* p) {
    Pack v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, Pack v) { std::memcpy(p, &v, sizeof v); }
  static void put(T* p, Pack v, bool add) { store(p, add ? load(p) + v : v); }
  static Pack broadcast(T x) { return x - Pack{}; }
  static Pack lowest() { return broadcast(-std::numeric_limits<T>::infinity()); }

  static Pack select(Index mask, Pack a, Pack b) { return mask ? a : b; }

  static Index no_winner() { return Index{}; }
  static Index choose(Index mask, Integer a, Index b) { return mask ? Index{} + a : b; }
  // A byte a lane. Shuffles, since compilers convert between such vectors one element at a time.
  static Index load_winner(const uint8_t* p) { return widen(p, std::make_index_sequence<METAFAST_VECTOR_BYTES>{}); }
  static void store_winner(uint8_t* p, Index v) {
    const Bytes bytes = narrow(reinterpret_cast<Raw>(v), std::make_index_sequence<lanes>{});
    std::memcpy(p, &bytes, sizeof bytes);
  }

  // The first `count` lanes, zeros behind them.
  static Pack first(Pack v, int count) {
    if (count >= lanes) return v;
    for (int i = count < 0 ? 0 : count; i < lanes; ++i) v[i] = 0;
    return v;
  }

  static T sum(Pack v) {
    T total = 0;
    for (int i = 0; i < lanes; ++i) total += v[i];
    return total;
  }

  static T exp(T x) { return std::exp(x); }
  static T log(T x) { return std::log(x); }
  static T rsqrt(T x) { return 1 / std::sqrt(x); }
  static Pack exp(Pack v) {
    return by_lane(v, [](T x) { return std::exp(x); });
  }
  static Pack log(Pack v) {
    return by_lane(v, [](T x) { return std::log(x); });
  }
  static Pack sqrt(Pack v) { return root(v); }
  static Pack tanh(Pack v) {
    return by_lane(v, [](T x) { return std::tanh(x); });
  }
  static Pack erf(Pack v) {
    return by_lane(v, [](T x) { return std::erf(x); });
  }
  static Pack rsqrt(Pack v) {
    return by_lane(v, [](T x) { return 1 / std::sqrt(x); });
  }

  // The columns of the `lanes` rows that lie at at(i): blocks of 2^k across the diagonal change places, from the
  // largest (while they are read) to single lanes.
  template <class F>
  static void transposed(const F& at, Pack (&columns)[lanes]) {
    constexpr int half = lanes / 2;
    for (int i = 0; i < half; ++i) {
      const T *a = at(i), *b = at(i + half);
      columns[i] = join(a, b, std::make_index_sequence<lanes>{});
      columns[i + half] = join(a + half, b + half, std::make_index_sequence<lanes>{});
    }
    swap_blocks<lanes / 4>(columns);
  }

 private:
  typedef uint8_t Raw __attribute__((vector_size(METAFAST_VECTOR_BYTES)));

  template <size_t... B>
  static Index widen(const uint8_t* p, std::index_sequence<B...>) {
    typedef uint8_t Part __attribute__((vector_size(16)));
    typedef int64_t Two __attribute__((vector_size(16)));
    Two two{};
    if constexpr (lanes > 8) {
      std::memcpy(&two, p, lanes);
    } else {
      int64_t all = 0;
      std::memcpy(&all, p, lanes);
      two[0] = all;
    }
    // Every 16 bytes hold all the winners, so that the second shuffle moves none across.
    const Part part = reinterpret_cast<Part>(two);
    const Raw copies = __builtin_shufflevector(part, part, static_cast<int>(B % 16)...);
    const Raw spread = __builtin_shufflevector(copies, copies, static_cast<int>(B / 16 * 16 + B / sizeof(T))...);
    return reinterpret_cast<Index>(spread) & 0xff;
  }

  template <size_t... L>
  static Bytes narrow(Raw raw, std::index_sequence<L...>) {
    return __builtin_shufflevector(raw, raw, static_cast<int>(L * sizeof(T))...);
  }

  template <class F>
  static Pack by_lane(Pack v, const F& f) {
    for (int i = 0; i < lanes; ++i) v[i] = f(v[i]);
    return v;
  }

  template <size_t... L>
  static Pack join(const T* a, const T* b, std::index_sequence<L...>) {
    typedef typename VectorTypes<T>::Half Half;
    Half low, high;
    std::memcpy(&low, a, sizeof low);
    std::memcpy(&high, b, sizeof high);
    return __builtin_shufflevector(low, high, static_cast<int>(L)...);
  }

  template <int B>
  static void swap_blocks(Pack (&rows)[lanes]) {
    if constexpr (B == 0) return;
    for (int i = 0; i < lanes; ++i) {
      if (i & B) continue;
      const Pack a = rows[i], b = rows[i + B];
      rows[i] = upper<B>(a, b, std::make_index_sequence<lanes>{});
      rows[i + B] = lower<B>(a, b, std::make_index_sequence<lanes>{});
    }
    if constexpr (B > 1) swap_blocks<B / 2>(rows);
  }

  template <int B, size_t... L>
  static Pack upper(Pack a, Pack b, std::index_sequence<L...>) {
    return __builtin_shufflevector(
        a, b, (static_cast<int>(L) & B ? lanes + static_cast<int>(L) - B : static_cast<int>(L))...);
  }

  template <int B, size_t... L>
  static Pack lower(Pack a, Pack b, std::index_sequence<L...>) {
    return __builtin_shufflevector(
        a, b, (static_cast<int>(L) & B ? lanes + static_cast<int>(L) : static_cast<int>(L) + B)...);
  }
};

}  // namespace METAFAST_NAMESPACE
