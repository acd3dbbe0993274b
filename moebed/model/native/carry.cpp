// Vectors times a bf16 matrix, V W, with AMX, and a bf16 matrix transposed. On the caller's thread.
//
// A float32 number is split into two of bf16, which leave out a share of 2^-17 at most; products of those with bf16 are
// exact in float32, and are summed there.
//
// R vectors, at most 16; N rows, K columns, both multiples of 32.

#include "rows.h"

namespace moebed {

// What Python hands over.
struct CarryCall {
  int64_t vectors, rows, columns;
  const float* given;      // (R, N)
  const BFloat16* values;  // (N, K)
  float* out;              // (R, K)
  char* workspace;
};

struct TransposeCall {
  int64_t rows, columns;
  const BFloat16* values;  // (N, K)
  BFloat16* out;           // (K, N)
  char* workspace;
};

#ifdef __AMX_BF16__

namespace {

constexpr int64_t SIDE = 2 * Amx::SIDE;  // of a square of tiles
constexpr int64_t MOST = 4 * SIDE;       // columns whose panels are made together
constexpr int64_t CACHED = 1 << 19;      // of their numbers, which stay in the second-level cache
constexpr int64_t ROWS_AHEAD = 16;       // how far ahead rows are fetched, too far apart for a processor to

inline void fetch(const BFloat16* from, int64_t count) {
  for (int64_t c = 0; c < count; c += LINE / sizeof(BFloat16)) _mm_prefetch(from + c, _MM_HINT_T0);
}

struct Carried {
  const CarryCall& call;
  const int64_t depth = call.rows / Amx::GROUP;
  const int64_t together = smaller(MOST, CACHED / call.rows / SIDE * SIDE + SIDE);

  // High parts in the first 16 rows, low ones in the others.
  void split(BFloat16* parts) const {
    memset(parts, 0, SIDE * call.rows * sizeof(BFloat16));
    for (int64_t v = 0; v < call.vectors; ++v) {
      BFloat16 *const high = parts + v * call.rows, *const low = high + Amx::SIDE * call.rows;
      for (int64_t n = 0; n < call.rows; n += LANES) {
        const Vector value = load(call.given + v * call.rows + n);
        store(high + n, value);
        store(low + n, value - load(high + n));
      }
    }
  }

  int64_t forward(Room room) const {
    BFloat16* const parts = room.take<BFloat16>(SIDE * call.rows);
    BFloat16* const panels = room.take<BFloat16>(together * call.rows);
    if (room.base == nullptr) return room.used;
    split(parts);
    const Amx::Configured configured;
    for (int64_t first = 0; first < call.columns; first += together) {
      const int64_t width = smaller(together, call.columns - first);
      for (int64_t n = 0; n < call.rows; n += Amx::GROUP) {
        const BFloat16* const row = call.values + n * call.columns + first;
        if (n + ROWS_AHEAD < call.rows)
          for (int i = 0; i < Amx::GROUP; ++i) fetch(row + (ROWS_AHEAD + i) * call.columns, width);
        pack_line(row, row + call.columns, width, panels + n * LANES, depth * LINE);
      }
      for (int64_t c = 0; c < width; c += SIDE) {
        alignas(LINE) float sums[SIDE * ROW];
        const char* const at = (const char*)(panels + c * call.rows);
        Amx::square<true>((const char*)parts, call.rows * sizeof(BFloat16), at, depth, sums, ROW);
        for (int64_t v = 0; v < call.vectors; ++v)
          for (int64_t k = 0; k < SIDE; k += LANES)
            store(call.out + v * call.columns + first + c + k,
                  load(sums + v * ROW + k) + load(sums + (Amx::SIDE + v) * ROW + k));
      }
    }
    return 0;
  }
};

// Pairs of rows become lines; a square of those is transposed as units.
void transpose_all(const TransposeCall& call) {
  alignas(LINE) BFloat16 lines[2 * LANES * SIDE];
  for (int64_t n = 0; n < call.rows; n += SIDE)
    for (int64_t k = 0; k < call.columns; k += SIDE) {
      const BFloat16* const from = call.values + n * call.columns + k;
      for (int64_t i = 0; i < LANES; ++i)
        pack_line(from + 2 * i * call.columns, from + (2 * i + 1) * call.columns, SIDE, lines + i * SIDE,
                  LANES * LINE);
      for (int64_t half = 0; half < SIDE; half += LANES)
        transpose((const char*)(lines + half * SIDE), LINE, (char*)(call.out + (k + half) * call.rows + n),
                  call.rows * sizeof(BFloat16));
    }
}

}  // namespace

#endif

// Computes it and returns 0; without a workspace, the bytes that it needs. Below 0: it needs AMX.
extern "C" __attribute__((visibility("default"))) int64_t moebed_carry(const CarryCall* call, int64_t) {
#ifdef __AMX_BF16__
  return Carried{*call}.forward(Room{call->workspace});
#else
  return -1;
#endif
}

// Likewise.
extern "C" __attribute__((visibility("default"))) int64_t moebed_transpose(const TransposeCall* call, int64_t) {
#ifdef __AMX_BF16__
  if (call->workspace != nullptr) transpose_all(*call);
  return 0;
#else
  return -1;
#endif
}

}  // namespace moebed
