// Matrix products of packed operands, summed in float32, one way for each instruction set.
//
// The summed dimension is counted in units of 32 bits: one float32 value, or a pair of bf16 values as vdpbf16ps and
// tdpbf16ps take it. D units are summed.
//
// A panel holds 16 columns of the right operand: for each unit one 64-byte line, the units of the columns side by side.
// The left operand is rows in memory, one address a row and a step from unit to unit, so gathered rows need no copy; a
// panel's columns can serve as its rows. Rows may lie in pieces of 16 units, with as many bytes to the next one for each
// row: so can the rows that were packed. Tiles take rows that follow one another.

#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "vector.h"

namespace moebed {

constexpr int STRIP = 64;          // columns of a strip
constexpr int ROW = STRIP + 16;    // row length of its float32 buffer: the rows' lines fall into all sets of a cache
constexpr int BLOCK = 96;          // rows of a block: a strip's buffer takes 24 KB of the first-level cache
constexpr int LINE = 64;           // bytes of a panel's line
constexpr int UNIT = 4;            // bytes
constexpr int AHEAD = 16 * LINE;   // how far ahead of the products a panel is fetched
constexpr int PIECE = 16;          // units of a piece of a row; for each, a tile fetches a line of the next panel
constexpr int64_t DEPTH = 256;     // units between visits to the buffer: a strip's panels take 64 KB of the second level
constexpr int TILE = 6;            // rows whose sums stay in registers
constexpr int PANELS = REGISTERS == 1 ? 4 : 1;  // and panels

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- float32 values, and bf16 pairs with AVX512-BF16

struct Fma {
  using Element = float;
  static constexpr int GROUP = 1;  // elements of a unit
  static constexpr int MULTIPLE = 1;  // of units
  static constexpr bool CONSECUTIVE = false;
  static Register unit(const char* at) { return broadcast(at); }
  static Register add(Register sum, Register left, Register right) { return multiply_add(left, right, sum); }
};

#ifdef __AVX512BF16__
struct Dot {
  using Element = BFloat16;
  static constexpr int GROUP = 2;
  static constexpr int MULTIPLE = 1;
  static constexpr bool CONSECUTIVE = false;
  static Register unit(const char* at) { return broadcast(at); }
  static Register add(Register sum, Register left, Register right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};
#endif

// M rows, `gap` bytes between their pieces, times N panels that lie `panel` bytes apart, units begin to end, into rows of
// `out` that lie `apart` values apart, or added to what is there. What is at `next` is fetched meanwhile. The pragmas
// unroll early enough for the sums to stay in registers.
template <class P, int STEP, int M, int N>
void tile(const char* const* rows, int64_t gap, const char* panels, int64_t panel, int64_t begin, int64_t end, bool add,
          const char* next, float* out, int64_t apart) {
  constexpr int WIDE = N * REGISTERS, EACH = LANES / REGISTERS;
  Register sum[M][WIDE];
  const char* row[M];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    row[i] = rows[i] + begin * STEP + begin / PIECE * gap;
#pragma GCC unroll 8
    for (int j = 0; j < WIDE; ++j) sum[i][j] = add ? load_register(out + i * apart + j * EACH) : Register{};
  }
  const char* line = panels + begin * LINE;
  int64_t offset = 0;
  const auto add_unit = [&]() __attribute__((always_inline)) {
    Register right[WIDE];
#pragma GCC unroll 8
    for (int j = 0; j < WIDE; ++j) {
      const char* at = line + j / REGISTERS * panel + j % REGISTERS * sizeof(Register);
      if (j % REGISTERS == 0) _mm_prefetch(at + AHEAD, _MM_HINT_T0);
      right[j] = load_register((const float*)at);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto left = P::unit(row[i] + offset);
#pragma GCC unroll 8
      for (int j = 0; j < WIDE; ++j) sum[i][j] = P::add(sum[i][j], left, right[j]);
    }
    line += LINE;
    offset += STEP;
  };
  int64_t u = begin;
  for (; u + PIECE <= end; u += PIECE, next += LINE, offset += gap) {
    _mm_prefetch(next, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int i = 0; i < PIECE; ++i) add_unit();
  }
  for (; u < end; ++u) add_unit();
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < WIDE; ++j) store_register(out + i * apart + j * EACH, sum[i][j]);
}

using Tile = decltype(&tile<Fma, UNIT, 1, 1>);

template <class P, int STEP, size_t... I>
constexpr std::array<Tile, sizeof...(I)> tiles(std::index_sequence<I...>) {
  return {tile<P, STEP, int(I / PANELS) + 1, int(I % PANELS) + 1>...};
}

template <class P, int STEP>
Tile tile_of(int64_t rows, int64_t panels) {  // as many of each as there are, up to TILE and PANELS
  static constexpr auto TILES = tiles<P, STEP>(std::make_index_sequence<TILE * PANELS>());
  return TILES[(smaller(TILE, rows) - 1) * PANELS + smaller(PANELS, panels) - 1];
}

// Rows times up to a strip of panels that lie D lines apart, units begin to end, into rows of out that lie `apart` values
// apart, or added to what is there. What comes after the last panel is at `after`.
template <class P, int STEP>
void strip_of_units(const char* const* rows, int64_t gap, int count, const char* panels, int64_t depth, int64_t begin,
                    int64_t end, int width, bool add, float* out, int64_t apart, const char* after) {
  for (int j = 0; j < width; j += PANELS * LANES) {
    const int across = smaller(PANELS, (width - j) / LANES);
    const char* at = panels + j / LANES * depth * LINE;
    const char* next = j + PANELS * LANES < width ? at + (across * depth + begin) * LINE : after;
    for (int i = 0; i < count; i += TILE, next += (end - begin) / PIECE * LINE)
      tile_of<P, STEP>(count - i, across)(rows + i, gap, at, depth * LINE, begin, end, add, next,
                                          out + i * apart + j, apart);
  }
}

// The same of all D units, followed in memory by the next strip.
template <class P, int STEP>
void strip(const char* const* rows, int64_t gap, int count, const void* panels_, int64_t depth, int width, float* out,
           int64_t apart) {
  const char* const panels = (const char*)panels_;
  int64_t begin = 0;
  do {  // once even if there is nothing to sum: the output is then 0
    const int64_t end = smaller(begin + DEPTH, depth);
    const char* const after = panels + (end < depth ? end : width / LANES * depth) * LINE;
    strip_of_units<P, STEP>(rows, gap, count, panels, depth, begin, end, width, begin > 0, out, apart, after);
    begin = end;
  } while (begin < depth);
}

// ---- bf16 pairs with AMX

#ifdef __AMX_BF16__
// A left tile takes 16 rows, 16 units of each; a right one 16 lines of a panel. Rows after the last are read and their
// sums thrown away. Depths are multiples of 16 units.
struct Amx {
  using Element = BFloat16;
  static constexpr int GROUP = 2;
  static constexpr int MULTIPLE = 16;
  static constexpr bool CONSECUTIVE = true;  // the rows of the left operand
  static constexpr int SIDE = 16;            // rows of a tile

  struct Configured {  // for as long as it lives, on this thread
    Configured() {
      alignas(64) struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; ++i) config.bytes[i] = LINE, config.rows[i] = SIDE;
      asm volatile("" : : "m"(config));  // GCC's intrinsic names 8 bytes of it, and it may leave the other stores out
      _tile_loadconfig(&config);
    }
    ~Configured() { _tile_release(); }
  };

  template <bool SECOND>  // whether there is a second tile of rows
  static void square(const char* rows, int64_t stride, const char* panels, int64_t depth, float* out, int64_t apart) {
    const char *below = rows + SIDE * stride, *beside = panels + depth * LINE;
    _tile_zero(0);
    _tile_zero(1);
    if (SECOND) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t u = 0; u < depth; u += MULTIPLE) {
      _tile_loadd(4, rows + u * UNIT, stride);
      _tile_loadd(6, panels + u * LINE, LINE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, beside + u * LINE, LINE);
      _tile_dpbf16ps(1, 4, 7);
      if (SECOND) {
        _tile_loadd(5, below + u * UNIT, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    const int64_t bytes = apart * sizeof(float);
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + LANES, bytes);
    if (SECOND) {
      _tile_stored(2, out + SIDE * apart, bytes);
      _tile_stored(3, out + SIDE * apart + LANES, bytes);
    }
  }

  static void strip(const char* rows, int64_t stride, int count, const char* panels, int64_t depth, int width,
                    float* out, int64_t apart) {
    const Configured configured;
    for (int j = 0; j < width; j += 2 * LANES)
      for (int i = 0; i < count; i += 2 * SIDE) {
        const auto square_ = i + SIDE < count ? square<true> : square<false>;
        square_(rows + i * stride, stride, panels + j / LANES * depth * LINE, depth, out + i * apart + j, apart);
      }
  }
};

template <>
inline void strip<Amx, UNIT>(const char* const* rows, int64_t, int count, const void* panels, int64_t depth, int width,
                             float* out, int64_t apart) {
  const int64_t stride = count > 1 ? rows[1] - rows[0] : depth * UNIT;
  Amx::strip(rows[0], stride, count, (const char*)panels, depth, width, out, apart);
}
#endif

}  // namespace moebed
