#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace kx {
namespace {

// Whether the environment leaves this instruction set, built here and known to this machine, to be chosen.
[[maybe_unused]] bool allows(const char* name) {
  const char* wanted = std::getenv("KX_CPU_ISA");
  return wanted == nullptr || std::strcmp(wanted, name) == 0;
}

Isa detect() {
#ifdef KX_HAS_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512bf16") && allows("avx512_bf16")) {
      return Isa::kAvx512Bf16;
    }
    if (allows("avx512")) {
      return Isa::kAvx512;
    }
  }
#endif
#ifdef KX_HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      allows("avx2")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kPortable;
}

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "unknown";
}

}  // namespace kx
