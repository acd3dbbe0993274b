// Activations of the gate projection and their derivatives, 16 values at a time.

#pragma once

#include <initializer_list>

#include "vector.h"

namespace moebed {

// exp to within 2 units in the last place: 2^n times a polynomial in the remainder, |remainder| <= ln 2 / 2.
inline Vector exp(Vector x) {
  x = min(max(x, set(-87.0f)), set(88.0f));
  const Vector n = round(x * set(1.44269504f));
  const Vector r = multiply_add(n, set(2.12194440e-4f), multiply_add(n, set(-0.693359375f), x));
  Vector p = set(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = multiply_add(p, r, set(c));
  return times_power_of_two(p, n);
}

struct Value {
  Vector value, slope;
};

struct Silu {
  static Value at(Vector x) {
    const Vector s = set(1.0f) / (set(1.0f) + exp(set(0.0f) - x));
    const Vector value = x * s;
    return {value, multiply_add(value, set(1.0f) - s, s)};
  }
};

struct Gelu {  // erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7
  static Value at(Vector x) {
    const Vector z = abs(x) * set(0.70710678f);
    const Vector t = set(1.0f) / multiply_add(z, set(0.3275911f), set(1.0f));
    Vector p = set(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f}) p = multiply_add(p, t, set(c));
    const Vector bell = exp(x * x * set(-0.5f));
    const Vector tail = p * bell * set(0.5f);  // the normal law beyond |x|
    const Vector below = where(negative(x), tail, set(1.0f) - tail);
    return {x * below, multiply_add(x * bell, set(0.39894228f), below)};
  }
};

struct GeluTanh {
  static Value at(Vector x) {
    const Vector square = x * x;
    const Vector z = x * multiply_add(square, set(0.7978845608f * 0.044715f), set(0.7978845608f));
    // (1 + tanh z) / 2 is the logistic function of 2 z.
    const Vector s = set(1.0f) / (set(1.0f) + exp(z * set(-2.0f)));
    const Vector value = x * s;
    const Vector dz = multiply_add(square, set(2 * 3 * 0.7978845608f * 0.044715f), set(2 * 0.7978845608f));
    return {value, multiply_add(value * (set(1.0f) - s), dz, s)};
  }
};

}  // namespace moebed
