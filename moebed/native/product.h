// bf16 matrix products of packed operands with AVX512-BF16, accumulated in float32.
//
// M rows of the output, N columns, P pairs: the summed dimension, two at a time as vdpbf16ps takes it.
//
// A panel holds 16 columns: for each pair one 64-byte line, the two values of a column side by side. Both operands may
// be panels. The left one may also be plain rows in memory, since a row's pairs follow one another there: it is given
// as one address a row and a step from pair to pair, so gathered rows need no copy.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include <c10/util/BFloat16.h>

namespace moebed {

using c10::BFloat16;

constexpr int LANES = 16;             // columns of a panel
constexpr int PANELS = 4;             // panels of a strip
constexpr int STRIP = 64;             // columns of a strip, and row length of its float32 buffer
constexpr int TILE = 6;               // rows whose TILE x PANELS sums stay in registers
constexpr int BLOCK = 96;             // rows of a block: a strip's buffer takes 24 KB of the first-level cache
constexpr int64_t DEPTH = 256;        // pairs between visits to that buffer: a strip's panels take 64 KB of the second
constexpr int64_t LINE = 2 * LANES;   // elements of a panel's line
constexpr int64_t AHEAD = 16 * LINE;  // how far ahead of the products a panel is fetched

// ---- one tile

template <int M, int N>
void tile(const char* const* rows, int64_t step, const BFloat16* panels, int64_t panel, int64_t begin, int64_t end,
          float* out) {
  __m512 sum[M][N];
  const char* row[M];
  for (int i = 0; i < M; ++i) row[i] = rows[i] + begin * step;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      sum[i][j] = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + i * STRIP + j * LANES);
  const BFloat16* line = panels + begin * LINE;
  int64_t offset = 0;
  for (int64_t p = begin; p < end; ++p, line += LINE, offset += step) {
    __m512bh right[N];
    for (int j = 0; j < N; ++j) {
      _mm_prefetch(line + j * panel + AHEAD, _MM_HINT_T0);
      right[j] = (__m512bh)_mm512_loadu_si512(line + j * panel);
    }
    for (int i = 0; i < M; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, row[i] + offset, sizeof pair);
      const auto left = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < N; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) _mm512_storeu_ps(out + i * STRIP + j * LANES, sum[i][j]);
}

using Tile = void (*)(const char* const*, int64_t, const BFloat16*, int64_t, int64_t, int64_t, float*);

template <size_t... I>
constexpr std::array<Tile, sizeof...(I)> tiles(std::index_sequence<I...>) {
  return {tile<int(I / PANELS) + 1, int(I % PANELS) + 1>...};
}

constexpr auto TILES = tiles(std::make_index_sequence<TILE * PANELS>());

// Rows times up to PANELS panels that lie `pairs` lines apart, into out (rows, STRIP).
inline void strip(const char* const* rows, int count, int64_t step, const BFloat16* panels, int64_t pairs, int width,
                  float* out) {
  int64_t begin = 0;
  do {  // once even if there is nothing to sum: the output is then 0
    const int64_t end = std::min(begin + DEPTH, pairs);
    for (int i = 0; i < count; i += TILE)
      TILES[(std::min(TILE, count - i) - 1) * PANELS + width / LANES - 1](rows + i, step, panels, pairs * LINE, begin,
                                                                         end, out + i * STRIP);
    begin = end;
  } while (begin < pairs);
}

// ---- conversions

inline __m256i load_bf16(const BFloat16* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline __m256i load_bf16(const float* from) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)); }
inline __m512i load_line(const BFloat16* from) { return _mm512_loadu_si512(from); }
inline __m512i load_line(const float* from) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + LANES), _mm512_loadu_ps(from));
}
inline __m512 widen(const BFloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bf16(from)), 16));
}
inline void store(BFloat16* to, __m512 value) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value));
}
inline void store(float* to, __m512 value) { _mm512_storeu_ps(to, value); }

// ---- packing

// Two rows side by side become one line in each of columns / LANES panels, `panel` elements apart.
template <class T>
void pack_pair(const T* first, const T* second, int64_t columns, BFloat16* out, int64_t panel) {
  alignas(64) static constexpr std::array<int16_t, 32> SHUFFLE = [] {
    std::array<int16_t, 32> at{};
    for (int i = 0; i < LANES; ++i) at[2 * i] = i, at[2 * i + 1] = LANES + i;
    return at;
  }();
  const __m512i shuffle = _mm512_load_si512(SHUFFLE.data());
  for (int64_t c = 0; c < columns; c += LANES, out += panel) {
    const __m256i low = load_bf16(first + c), high = second ? load_bf16(second + c) : _mm256_setzero_si256();
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(shuffle, both));
  }
}

// 16 rows of a matrix (N, 2P), each of which becomes a column, as one panel of P lines; P a multiple of 16.
template <class T>
void pack_transposed(const T* from, int64_t pairs, BFloat16* out) {
  for (int64_t p = 0; p < pairs; p += LANES) {
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) a[i] = load_line(from + (i * pairs + p) * 2);
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
      BFloat16* line = out + (p + i) * LINE;
      _mm512_storeu_si512(line, _mm512_shuffle_i32x4(low01, low23, 0x88));
      _mm512_storeu_si512(line + 4 * LINE, _mm512_shuffle_i32x4(high01, high23, 0x88));
      _mm512_storeu_si512(line + 8 * LINE, _mm512_shuffle_i32x4(low01, low23, 0xdd));
      _mm512_storeu_si512(line + 12 * LINE, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
  }
}

}  // namespace moebed
