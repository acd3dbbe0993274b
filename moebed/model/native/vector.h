// Sixteen float32 values and the bf16 type, on the instruction set that the compiler was given: one register with
// AVX-512, two with AVX2.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moebed {

constexpr int LANES = 16;

struct BFloat16 {
  uint16_t bits;
};

#ifdef __AVX512F__

using Register = __m512;
using Vector = __m512;  // GCC gives it + - * /
using Mask = __mmask16;

inline Register load_register(const float* from) { return _mm512_loadu_ps(from); }
inline void store_register(float* to, Register value) { _mm512_storeu_ps(to, value); }
inline Register broadcast(const char* from) { return _mm512_set1_ps(*(const float*)from); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }

inline Vector set(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256((const __m256i*)from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m256i rounded(Vector value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_set1_epi32(up, nan, 0x7fc00000), 16));
#endif
}
inline void store(BFloat16* to, Vector value) { _mm256_storeu_si256((__m256i*)to, rounded(value)); }
inline void store_past(float* to, Vector value) { _mm512_stream_ps(to, value); }
inline void store_past(BFloat16* to, Vector value) { _mm256_stream_si256((__m256i*)to, rounded(value)); }

inline Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector abs(Vector a) { return _mm512_abs_ps(a); }
inline Vector sqrt(Vector a) { return _mm512_sqrt_ps(a); }
inline Vector round(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Vector times_power_of_two(Vector a, Vector n) { return _mm512_scalef_ps(a, n); }
inline Mask negative(Vector a) { return _mm512_cmp_ps_mask(a, set(0.0f), _CMP_LT_OQ); }
inline Vector where(Mask mask, Vector yes, Vector no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline float sum(Vector a) { return _mm512_reduce_add_ps(a); }

#else

using Register = __m256;
struct Vector {
  __m256 low, high;
};
using Mask = Vector;

inline Register load_register(const float* from) { return _mm256_loadu_ps(from); }
inline void store_register(float* to, Register value) { _mm256_storeu_ps(to, value); }
inline Register broadcast(const char* from) { return _mm256_broadcast_ss((const float*)from); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }

inline Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
inline Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
inline Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }
inline Vector operator/(Vector a, Vector b) { return {a.low / b.low, a.high / b.high}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Vector set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Vector value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
inline __m256 widened(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128((const __m128i*)from);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vector load(const BFloat16* from) { return {widened(from), widened(from + 8)}; }
inline __m256i rounded(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  const __m256 safe = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(safe), 16);
}
inline void store_past(float* to, Vector value) {
  _mm256_stream_ps(to, value.low);
  _mm256_stream_ps(to + 8, value.high);
}
inline __m256i rounded(Vector value) {
  const __m256i packed = _mm256_packus_epi32(rounded(value.low), rounded(value.high));  // quarters 0 2 1 3
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
inline void store(BFloat16* to, Vector value) { _mm256_storeu_si256((__m256i*)to, rounded(value)); }
inline void store_past(BFloat16* to, Vector value) { _mm256_stream_si256((__m256i*)to, rounded(value)); }

inline Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vector abs(Vector a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Vector sqrt(Vector a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline Vector round(Vector a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
inline __m256 times_power_of_two(__m256 a, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Vector times_power_of_two(Vector a, Vector n) {
  return {times_power_of_two(a.low, n.low), times_power_of_two(a.high, n.high)};
}
inline Mask negative(Vector a) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_cmp_ps(a.low, zero, _CMP_LT_OQ), _mm256_cmp_ps(a.high, zero, _CMP_LT_OQ)};
}
inline Vector where(Mask mask, Vector yes, Vector no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
inline float sum(Vector a) {
  const __m256 eight = a.low + a.high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}

#endif

constexpr int REGISTERS = LANES * sizeof(float) / sizeof(Register);  // of a vector

}  // namespace moebed
