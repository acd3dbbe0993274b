// Operands of the products, packed as panels: lines of units, 16 columns wide (see product.h).

#pragma once

#include "product.h"

namespace moebed {

// 16 rows of 16 units, `from` bytes apart, to their transpose, `to` bytes apart.
inline void transpose(const char* in, int64_t from, char* out, int64_t to) {
#ifdef __AVX512F__
  __m512i a[LANES], b[LANES];
  for (int i = 0; i < LANES; ++i) a[i] = _mm512_loadu_si512(in + i * from);
  for (int i = 0; i < LANES; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
      a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
    }
  for (int i = 0; i < 4; ++i) {  // a[4 r + i] holds column i of each quarter of rows 4 r to 4 r + 3
    const __m512i low01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(out + i * to, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(out + (4 + i) * to, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(out + (8 + i) * to, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(out + (12 + i) * to, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
#else
  constexpr int HALF = 8;
  for (int r = 0; r < LANES; r += HALF)
    for (int c = 0; c < LANES; c += HALF) {
      __m256 a[HALF], b[HALF];
      for (int i = 0; i < HALF; ++i) a[i] = _mm256_loadu_ps((const float*)(in + (r + i) * from) + c);
      for (int i = 0; i < HALF; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < HALF; i += 4)
        for (int h = 0; h < 2; ++h) {
          a[i + 2 * h] = _mm256_shuffle_ps(b[i + h], b[i + h + 2], 0x44);
          a[i + 2 * h + 1] = _mm256_shuffle_ps(b[i + h], b[i + h + 2], 0xee);
        }
      for (int i = 0; i < 4; ++i) {  // a[4 r + i] holds columns i and 4 + i of rows 4 r to 4 r + 3
        _mm256_storeu_ps((float*)(out + (c + i) * to) + r, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
        _mm256_storeu_ps((float*)(out + (c + 4 + i) * to) + r, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
      }
    }
#endif
}

// Values of one type as those of another.
template <class From, class To>
void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i));
}
template <class Same>
void convert(const Same* from, Same* to, int64_t count) {
  memcpy(to, from, count * sizeof(Same));
}

// 16 rows of a matrix, each of which becomes a column, as one panel; depth, in units, is a multiple of 16.
template <class T, class E>
void pack_transposed(const T* from, int64_t depth, E* out) {
  constexpr int64_t GROUP = UNIT / sizeof(E), WIDE = LANES * GROUP;
  const int64_t stride = depth * GROUP;
  for (int64_t u = 0; u < depth; u += LANES) {
    char* to = (char*)out + u * LINE;
    if constexpr (sizeof(T) == sizeof(E)) {
      transpose((const char*)(from + u * GROUP), stride * sizeof(T), to, LINE);
    } else {
      alignas(64) E rows[LANES * WIDE];
      for (int i = 0; i < LANES; ++i) convert(from + i * stride + u * GROUP, rows + i * WIDE, WIDE);
      transpose((const char*)rows, LINE, to, LINE);
    }
  }
}

// The rows of one unit become a line in each of columns / 16 panels that lie `panel` bytes apart; a second row that is
// not there counts as 0.
template <class T>
void pack_line(const T* first, const T*, int64_t columns, float* out, int64_t panel) {
  char* to = (char*)out;
  for (int64_t c = 0; c < columns; c += LANES, to += panel) store((float*)to, load(first + c));
}

#ifdef __AVX512BF16__
inline __m256i load_bf16(const BFloat16* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline __m256i load_bf16(const float* from) { return rounded(load(from)); }

template <class T>
void pack_line(const T* first, const T* second, int64_t columns, BFloat16* out, int64_t panel) {
  alignas(64) static constexpr std::array<int16_t, 32> SHUFFLE = [] {
    std::array<int16_t, 32> at{};
    for (int i = 0; i < LANES; ++i) at[2 * i] = i, at[2 * i + 1] = LANES + i;
    return at;
  }();
  const __m512i shuffle = _mm512_load_si512(SHUFFLE.data());
  char* to = (char*)out;
  for (int64_t c = 0; c < columns; c += LANES, to += panel) {
    const __m256i low = load_bf16(first + c), high = second ? load_bf16(second + c) : _mm256_setzero_si256();
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(shuffle, both));
  }
}
#endif

}  // namespace moebed
