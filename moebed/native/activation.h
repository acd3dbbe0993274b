// Activations of the gate projection and their derivatives, 16 values at a time.

#pragma once

#include <immintrin.h>

#include <string>

namespace moebed {

inline __m512 set(float value) { return _mm512_set1_ps(value); }

// exp to within 2 units in the last place: 2^n times a polynomial in the remainder, |remainder| <= ln 2 / 2.
inline __m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, set(-87.0f)), set(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  const __m512 r = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), _mm512_fnmadd_ps(n, set(0.693359375f), x));
  __m512 p = set(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, set(c));
  return _mm512_scalef_ps(p, n);
}

struct Value {
  __m512 value, slope;
};

struct Silu {
  static Value at(__m512 x) {
    const __m512 s = _mm512_div_ps(set(1.0f), _mm512_add_ps(set(1.0f), exp(_mm512_sub_ps(set(0.0f), x))));
    const __m512 value = _mm512_mul_ps(x, s);
    return {value, _mm512_fmadd_ps(value, _mm512_sub_ps(set(1.0f), s), s)};
  }
};

struct Gelu {  // erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7
  static Value at(__m512 x) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), set(0.70710678f));
    const __m512 t = _mm512_div_ps(set(1.0f), _mm512_fmadd_ps(z, set(0.3275911f), set(1.0f)));
    __m512 p = set(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f})
      p = _mm512_fmadd_ps(p, t, set(c));
    const __m512 bell = exp(_mm512_mul_ps(_mm512_mul_ps(x, x), set(-0.5f)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, bell), set(0.5f));  // the normal law beyond |x|
    const __mmask16 negative = _mm512_cmp_ps_mask(x, set(0.0f), _CMP_LT_OQ);
    const __m512 below = _mm512_mask_blend_ps(negative, _mm512_sub_ps(set(1.0f), tail), tail);
    return {_mm512_mul_ps(x, below), _mm512_fmadd_ps(_mm512_mul_ps(x, bell), set(0.39894228f), below)};
  }
};

struct GeluTanh {
  static Value at(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 z = _mm512_mul_ps(x, _mm512_fmadd_ps(square, set(0.7978845608f * 0.044715f), set(0.7978845608f)));
    // (1 + tanh z) / 2 is the logistic function of 2 z.
    const __m512 s = _mm512_div_ps(set(1.0f), _mm512_add_ps(set(1.0f), exp(_mm512_mul_ps(z, set(-2.0f)))));
    const __m512 value = _mm512_mul_ps(x, s);
    const __m512 dz = _mm512_fmadd_ps(square, set(2 * 3 * 0.7978845608f * 0.044715f), set(2 * 0.7978845608f));
    return {value, _mm512_fmadd_ps(_mm512_mul_ps(value, _mm512_sub_ps(set(1.0f), s)), dz, s)};
  }
};

}  // namespace moebed
