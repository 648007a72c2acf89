// Vectors of float and double for the instruction set that this source is compiled for. A load widens from the type in
// memory, a store rounds to it (nearest, ties to even); `n` limits either to the first n lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/half.h"

#if defined(KX_ISA_avx2) || defined(KX_ISA_avx512)
#include <immintrin.h>
#endif

namespace kx::KX_ISA {
namespace {

// The type that arithmetic on T is done in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return to_float(x); }
inline float widen(float16 x) { return to_float(x); }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, bfloat16* to) { *to = to_bfloat16(x); }
inline void narrow(float x, float16* to) { *to = to_float16(x); }

#if defined(KX_ISA_avx512)

struct Floats {
  static constexpr int kLanes = 16;
  __m512 v;
};
struct Doubles {
  static constexpr int kLanes = 8;
  __m512d v;
};

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline __m512 from_bits(__m256i bits, bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 from_bits(__m256i bits, float16) { return _mm512_cvtph_ps(bits); }

inline __m256i to_bits(__m512 x, bfloat16) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
}
inline __m256i to_bits(__m512 x, float16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline Doubles load(const double* p, int n) { return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(first(n)), p)}; }
template <class Half>
inline Floats load(const Half* p) {
  return {from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{})};
}
template <class Half>
inline Floats load(const Half* p, int n) {
  return {from_bits(_mm256_maskz_loadu_epi16(first(n), p), Half{})};
}

inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, Floats x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline void store(double* p, Doubles x) { _mm512_storeu_pd(p, x.v); }
inline void store(double* p, Doubles x, int n) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), x.v); }
template <class Half>
inline void store(Half* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(x.v, Half{}));
}
template <class Half>
inline void store(Half* p, Floats x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), to_bits(x.v, Half{}));
}

// Past the caches; p is aligned to the vector as stored.
inline void stream(float* p, Floats x) { _mm512_stream_ps(p, x.v); }
inline void stream(double* p, Doubles x) { _mm512_stream_pd(p, x.v); }
template <class Half>
inline void stream(Half* p, Floats x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bits(x.v, Half{}));
}
inline void stream_fence() { _mm_sfence(); }

inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Doubles all(double x) { return {_mm512_set1_pd(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
// max and min of a NaN and b give b.
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Doubles max(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Doubles min(Doubles a, Doubles b) { return {_mm512_min_pd(a.v, b.v)}; }
// 2^n · x for whole n.
inline Floats scale_by_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline Floats nearest(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Doubles mul(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Doubles div(Doubles a, Doubles b) { return {_mm512_div_pd(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline Floats fms(Floats a, Floats b, Floats c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Doubles fms(Doubles a, Doubles b, Doubles c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
// Lane i is lane i ^ kApart of a.
template <int kApart>
inline Floats swap_lanes(Floats a) {
  if constexpr (kApart >= 4) {
    return {_mm512_shuffle_f32x4(a.v, a.v, kApart == 8 ? 0x4e : 0xb1)};
  } else {
    return {_mm512_permute_ps(a.v, kApart == 2 ? 0x4e : 0xb1)};
  }
}
template <int kApart>
inline Doubles swap_lanes(Doubles a) {
  return {_mm512_castps_pd(swap_lanes<2 * kApart>(Floats{_mm512_castpd_ps(a.v)}).v)};
}

#elif defined(KX_ISA_avx2)

struct Floats {
  static constexpr int kLanes = 8;
  __m256 v;
};
struct Doubles {
  static constexpr int kLanes = 4;
  __m256d v;
};

inline __m256 from_bits(__m128i bits, bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 from_bits(__m128i bits, float16) { return _mm256_cvtph_ps(bits); }

inline __m128i to_bits(__m256 x, bfloat16) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i to_bits(__m256 x, float16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
template <class Half>
inline Floats load(const Half* p) {
  return {from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{})};
}

inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.v); }
inline void store(double* p, Doubles x) { _mm256_storeu_pd(p, x.v); }
template <class Half>
inline void store(Half* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(x.v, Half{}));
}

inline void stream(float* p, Floats x) { _mm256_stream_ps(p, x.v); }
inline void stream(double* p, Doubles x) { _mm256_stream_pd(p, x.v); }
template <class Half>
inline void stream(Half* p, Floats x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bits(x.v, Half{}));
}
inline void stream_fence() { _mm_sfence(); }

inline Floats all(float x) { return {_mm256_set1_ps(x)}; }
inline Doubles all(double x) { return {_mm256_set1_pd(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Doubles max(Doubles a, Doubles b) { return {_mm256_max_pd(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Doubles min(Doubles a, Doubles b) { return {_mm256_min_pd(a.v, b.v)}; }
// 2^n · x for whole n, in two steps: either may leave the range of normal numbers.
inline Floats scale_by_power(Floats x, Floats n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), low = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, power(low)), power(_mm256_sub_epi32(whole, low)))};
}
inline Floats nearest(Floats x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Doubles mul(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Doubles div(Doubles a, Doubles b) { return {_mm256_div_pd(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Floats fms(Floats a, Floats b, Floats c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline Doubles fms(Doubles a, Doubles b, Doubles c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
template <int kApart>
inline Floats swap_lanes(Floats a) {
  if constexpr (kApart == 4) {
    return {_mm256_permute2f128_ps(a.v, a.v, 1)};
  } else {
    return {_mm256_permute_ps(a.v, kApart == 2 ? 0x4e : 0xb1)};
  }
}
template <int kApart>
inline Doubles swap_lanes(Doubles a) {
  return {_mm256_castps_pd(swap_lanes<2 * kApart>(Floats{_mm256_castpd_ps(a.v)}).v)};
}

#else

template <class A, int N>
struct Lanes {
  static constexpr int kLanes = N;
  A v[N];
};
using Floats = Lanes<float, 8>;
using Doubles = Lanes<double, 4>;

// Applies an expression to each lane.
#define KX_EACH_LANE(A, expression)     \
  A r;                                  \
  for (int i = 0; i < A::kLanes; ++i) { \
    r.v[i] = expression;                \
  }                                     \
  return r

template <class A, class T>
inline A load_lanes(const T* p) {
  KX_EACH_LANE(A, widen(p[i]));
}
inline Doubles load(const double* p) { return load_lanes<Doubles>(p); }
template <class T>
inline Floats load(const T* p) {
  return load_lanes<Floats>(p);
}

template <class T, class A>
inline void store(T* p, A x) {
  for (int i = 0; i < A::kLanes; ++i) {
    narrow(x.v[i], p + i);
  }
}

// No hint for the caches is portable.
template <class T, class A>
inline void stream(T* p, A x) {
  store(p, x);
}
inline void stream_fence() {}

inline Floats all(float x) { KX_EACH_LANE(Floats, x); }
inline Doubles all(double x) { KX_EACH_LANE(Doubles, x); }
template <class A>
inline A add(A a, A b) {
  KX_EACH_LANE(A, a.v[i] + b.v[i]);
}
template <class A>
inline A max(A a, A b) {
  KX_EACH_LANE(A, a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
template <class A>
inline A min(A a, A b) {
  KX_EACH_LANE(A, a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
inline Floats scale_by_power(Floats x, Floats n) { KX_EACH_LANE(Floats, std::ldexp(x.v[i], static_cast<int>(n.v[i]))); }
inline Floats nearest(Floats x) { KX_EACH_LANE(Floats, std::nearbyint(x.v[i])); }
template <class A>
inline A mul(A a, A b) {
  KX_EACH_LANE(A, a.v[i] * b.v[i]);
}
template <class A>
inline A div(A a, A b) {
  KX_EACH_LANE(A, a.v[i] / b.v[i]);
}
#if defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
template <class A>
inline A fma(A a, A b, A c) {
  KX_EACH_LANE(A, std::fma(a.v[i], b.v[i], c.v[i]));
}
template <class A>
inline A fms(A a, A b, A c) {
  KX_EACH_LANE(A, std::fma(a.v[i], b.v[i], -c.v[i]));
}
#else
// Rounds twice: without a fused instruction, a fused result would take a call per lane.
template <class A>
inline A fma(A a, A b, A c) {
  KX_EACH_LANE(A, a.v[i] * b.v[i] + c.v[i]);
}
template <class A>
inline A fms(A a, A b, A c) {
  KX_EACH_LANE(A, a.v[i] * b.v[i] - c.v[i]);
}
#endif
template <int kApart, class A>
inline A swap_lanes(A a) {
  KX_EACH_LANE(A, a.v[i ^ kApart]);
}

#undef KX_EACH_LANE

#endif

#if !defined(KX_ISA_avx512)

// The first n lanes by way of a whole vector, so that a tail has the bits that it would have inside one.
template <class T>
inline auto load(const T* p, int n) {
  T whole[decltype(load(p))::kLanes] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T, class A>
inline void store(T* p, A x, int n) {
  T whole[A::kLanes];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(T));
}

#endif

// The vector for arithmetic in A.
template <class A>
using vector_t = decltype(all(A{}));

// In every lane, what all are together: the upper half onto the lower until one is left.
template <int kApart, class V, class Join>
inline V fold(V x, Join&& join) {
  x = join(x, swap_lanes<kApart>(x));
  if constexpr (kApart > 1) {
    x = fold<kApart / 2>(x, join);
  }
  return x;
}
template <class V>
inline V sum(V x) {
  return fold<V::kLanes / 2>(x, [](V a, V b) { return add(a, b); });
}
template <class V>
inline V largest(V x) {
  return fold<V::kLanes / 2>(x, [](V a, V b) { return max(a, b); });
}

// f of each lane.
template <class V, class F>
inline V each_lane(V x, F&& f) {
  std::conditional_t<std::is_same_v<V, Floats>, float, double> lanes[V::kLanes];
  store(lanes, x);
  for (auto& lane : lanes) {
    lane = f(lane);
  }
  return load(lanes);
}

// e^x to about one unit in the last place: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by its Taylor series. Above 88.8
// infinity, below -104 zero; NaN stays NaN.
inline Floats exp(Floats x) {
  x = min(all(130.0f), max(all(-110.0f), x));
  const Floats n = nearest(mul(x, all(1.44269504f)));
  Floats r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in products with n
  r = fma(n, all(2.12194440e-4f), r);
  Floats p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  return scale_by_power(p, n);
}
inline Doubles exp(Doubles x) {
  return each_lane(x, [](double lane) { return std::exp(lane); });
}

}  // namespace
}  // namespace kx::KX_ISA
