// bfloat16 and float16 as the bits they are, with conversions that round to nearest even. The functions are static:
// each instruction set that includes them keeps a copy of its own (see cpu/isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace kx {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

static inline float to_float(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

static inline bfloat16 to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // a quiet NaN stays one
  }
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

static inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude >= 0x0400u) {
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
  }
  const float subnormal = static_cast<float>(magnitude) * float_of(103u << 23);  // · 2^-24
  return float_of(sign | bits_of(subnormal));
}

static inline float16 to_float16(float x) {
  const uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu))};
  }
  if (magnitude >= 0x477ff000u) {  // rounds past 65504
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude >= 0x38800000u) {  // normal
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
  }
  // Adding 0.5 leaves the subnormal's 10 bits, rounded, at the bottom of the mantissa.
  const uint32_t shifted = bits_of(float_of(magnitude) + 0.5f);
  return {static_cast<uint16_t>(sign | (shifted - 0x3f000000u))};
}

// visit(x), x of the type that `dtype` names. (A visitor's own type makes each of these a function of its caller's.)
template <class Visit>
static inline void with_float(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(double{});
    case DType::kBFloat16:
      return visit(bfloat16{});
    case DType::kFloat16:
      return visit(float16{});
    default:
      return visit(float{});
  }
}

}  // namespace kx
