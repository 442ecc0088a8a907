#include "isa.h"

#include <cstring>

namespace metafast {

#define METAFAST_DECLARE(name) \
  namespace name {             \
  Isa<float> float_isa();      \
  Isa<double> double_isa();    \
  }
METAFAST_DECLARE(generic)
#ifdef METAFAST_AVX2
METAFAST_DECLARE(avx2)
#endif
#ifdef METAFAST_AVX512
METAFAST_DECLARE(avx512)
#endif

namespace {

struct Build {
  const char* name;
  Isa<float> in_float;
  Isa<double> in_double;
};

struct Builds {
  Build builds[3];
  const char* names[3];
  int count = 0;

  Builds() {
#ifdef METAFAST_AVX512
    if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      add("avx512", avx512::float_isa(), avx512::double_isa());
    }
#endif
#ifdef METAFAST_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      add("avx2", avx2::float_isa(), avx2::double_isa());
    }
#endif
    add("generic", generic::float_isa(), generic::double_isa());
  }

  void add(const char* name, const Isa<float>& f, const Isa<double>& d) {
    builds[count] = {name, f, d};
    names[count++] = name;
  }
};

const Builds& all() {
  static const Builds builds;
  return builds;
}

const Isa<float>& pick(const Build& b, float) { return b.in_float; }
const Isa<double>& pick(const Build& b, double) { return b.in_double; }

}  // namespace

const char* const* isa_names(int& count) {
  count = all().count;
  return all().names;
}

template <class T>
const Isa<T>* find_isa(const char* name) {
  for (int i = 0; i < all().count; ++i) {
    if (!std::strcmp(all().names[i], name)) return &pick(all().builds[i], T());
  }
  return nullptr;
}

template const Isa<float>* find_isa<float>(const char*);
template const Isa<double>* find_isa<double>(const char*);

}  // namespace metafast
