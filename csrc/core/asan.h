// Forbidden gaps between what shares one piece of memory, where AddressSanitizer is built in to watch them. Elsewhere
// they have no size, and nothing here does anything. Static: see program.h.
#pragma once
#include "program.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace metafast {

#ifdef __SANITIZE_ADDRESS__
constexpr int64_t gap = 16;  // in elements
[[maybe_unused]] static void allow(const void* from, int64_t bytes) { __asan_unpoison_memory_region(from, bytes); }
[[maybe_unused]] static void forbid(const void* from, int64_t bytes) { __asan_poison_memory_region(from, bytes); }
#else
constexpr int64_t gap = 0;
[[maybe_unused]] static void allow(const void*, int64_t) {}
[[maybe_unused]] static void forbid(const void*, int64_t) {}
#endif

template <class T>
[[maybe_unused]] static void forbid_gaps(const T* base, const int64_t* offsets, int count) {
  for (int i = 0; gap > 0 && i < count; ++i) {
    if (offsets[i] >= 0) forbid(base + offsets[i] - gap, gap * sizeof(T));
  }
}

// To be called before a pass uses the memory.
template <class T>
[[maybe_unused]] static void fence_tape(const Program& program, const PassLayout& layout, const T* base) {
  allow(base, layout.tape * sizeof(T));
  forbid_gaps(base, layout.value, program.n_values);
  forbid_gaps(base, layout.adjoint, program.n_values);
  forbid_gaps(base, layout.saved, program.n_ops + 1);
}

template <class T>
[[maybe_unused]] static void fence_scratch(const Program& program, const PassLayout& layout, const T* base) {
  allow(base, layout.scratch * sizeof(T));
  forbid_gaps(base, layout.tangent, program.n_values);
  forbid_gaps(base, layout.d_adjoint, program.n_values);
}

}  // namespace metafast
