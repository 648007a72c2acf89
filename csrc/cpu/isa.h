// A CPU kernel's source is compiled once per instruction set, each time in a namespace of that name (KX_ISA is
// portable, avx2 or avx512). Whatever such a source includes has to be static or in that namespace: of an inline
// function with one name, the linker keeps one copy for all, perhaps one that the machine cannot run.
#pragma once

namespace kx {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The widest instruction set that this machine runs, or the one that KX_CPU_ISA names if it runs that. kAvx512Bf16 is
// kAvx512 where products of bfloat16 have instructions of their own (pairs.h), in one namespace.
Isa isa();
const char* isa_name();  // "portable", "avx2", "avx512" or "avx512_bf16", of isa()

}  // namespace kx

// Declares a function of the namespaces that are compiled elsewhere.
#define KX_DECLARE_FOR_ISAS(...) \
  namespace avx2 {               \
  __VA_ARGS__                    \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__                    \
  }

// Calls `function` of the namespace that this machine should run.
#ifdef KX_HAS_avx2
#define KX_CASE_AVX2(function, ...) \
  case ::kx::Isa::kAvx2:            \
    return avx2::function(__VA_ARGS__);
#else
#define KX_CASE_AVX2(function, ...)
#endif
#ifdef KX_HAS_avx512
#define KX_CASE_AVX512(function, ...) \
  case ::kx::Isa::kAvx512:            \
  case ::kx::Isa::kAvx512Bf16:        \
    return avx512::function(__VA_ARGS__);
#else
#define KX_CASE_AVX512(function, ...)
#endif
#define KX_DISPATCH(function, ...)            \
  switch (::kx::isa()) {                      \
    KX_CASE_AVX512(function, __VA_ARGS__)     \
    KX_CASE_AVX2(function, __VA_ARGS__)       \
    default:                                  \
      return portable::function(__VA_ARGS__); \
  }
