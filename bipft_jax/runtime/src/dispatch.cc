#include "dispatch.h"

#include <cstring>

namespace bipft {
namespace {

struct Supported {
  const Kernels* sets[4] = {nullptr, nullptr, nullptr, nullptr};

  Supported() {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // What x86-64-v3 and -v4 consist of, as far as processors differ in it.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && __builtin_cpu_supports("avx512vpopcntdq")) sets[count++] = &kAvx512Kernels;
    if (v3) sets[count++] = &kAvx2Kernels;
#elif defined(__aarch64__)
    sets[count++] = &kNeonKernels;
#endif
    sets[count] = &kPortableKernels;
  }
};

}  // namespace

const Kernels* const* supported_kernels() {
  static const Supported supported;
  return supported.sets;
}

const Kernels* kernels_named(const char* name) {
  const Kernels* const* sets = supported_kernels();
  if (!name || !*name) return sets[0];
  for (; *sets; sets++)
    if (!std::strcmp((*sets)->name, name)) return *sets;
  return nullptr;
}

}  // namespace bipft
