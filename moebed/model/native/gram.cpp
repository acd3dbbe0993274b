// The Gram matrix W Wᵀ of bf16 rows with AMX, summed in float32 and rounded to bf16: squares of tiles on and below the
// diagonal are computed, the others mirrored. On the caller's thread.
//
// N rows, K columns, both multiples of 32.

#include "rows.h"

namespace moebed {

// What Python hands over.
struct GramCall {
  int64_t rows, columns;
  const BFloat16* values;  // (N, K)
  BFloat16* product;       // (N, N)
  float* squares;          // (N) the diagonal, not rounded
  double* beside;          // the sum of the squares of all that is beside it, not rounded
  char* workspace;
};

#ifdef __AMX_BF16__

namespace {

constexpr int64_t SIDE = 2 * Amx::SIDE;   // of a square
constexpr int64_t TOGETHER = 8 * SIDE;    // columns whose panels stay in the second-level cache

struct GramMatrix {
  const GramCall& call;
  const int64_t depth = call.columns / Amx::GROUP;

  void put(const float* sums, int64_t row, int64_t column) const {
    for (int64_t i = 0; i < SIDE; ++i)
      for (int64_t j = 0; j < SIDE; j += LANES)
        store(call.product + (row + i) * call.rows + column + j, load(sums + i * ROW + j));
  }

  // Rows times columns, which begin at these; returns the sum of the squares beside the diagonal, mirrored ones included.
  double square(int64_t row, int64_t column, const char* panels) const {
    alignas(LINE) float sums[SIDE * ROW], mirrored[SIDE * ROW];
    Amx::square<true>((const char*)(call.values + row * call.columns), call.columns * sizeof(BFloat16), panels, depth,
                      sums, ROW);
    put(sums, row, column);
    if (row == column) {
      for (int64_t i = 0; i < SIDE; ++i) {
        call.squares[row + i] = sums[i * ROW + i];
        sums[i * ROW + i] = 0;
      }
    } else {
      for (int64_t i = 0; i < SIDE; i += LANES)
        for (int64_t j = 0; j < SIDE; j += LANES)
          transpose((const char*)(sums + i * ROW + j), ROW * UNIT, (char*)(mirrored + j * ROW + i), ROW * UNIT);
      put(mirrored, column, row);
    }
    Vector squares = set(0.0f);
    for (int64_t i = 0; i < SIDE; ++i)
      for (int64_t j = 0; j < SIDE; j += LANES)
        squares = multiply_add(load(sums + i * ROW + j), load(sums + i * ROW + j), squares);
    return (row == column ? 1.0 : 2.0) * sum(squares);
  }

  int64_t forward(Room room) const {
    BFloat16* const panels = room.take<BFloat16>(TOGETHER * call.columns);
    if (room.base == nullptr) return room.used;
    const Amx::Configured configured;
    *call.beside = 0;
    for (int64_t first = 0; first < call.rows; first += TOGETHER) {
      const int64_t stop = smaller(first + TOGETHER, call.rows);
      for (int64_t column = first; column < stop; column += LANES)
        pack_transposed(call.values + column * call.columns, depth, panels + (column - first) * call.columns);
      for (int64_t row = first; row < call.rows; row += SIDE)
        for (int64_t column = first; column < smaller(stop, row + SIDE); column += SIDE)
          *call.beside += square(row, column, (const char*)(panels + (column - first) * call.columns));
    }
    return 0;
  }
};

}  // namespace

#endif

// Computes it and returns 0; without a workspace, the bytes that it needs. Below 0: it needs AMX.
extern "C" __attribute__((visibility("default"))) int64_t moebed_gram(const GramCall* call, int64_t) {
#ifdef __AMX_BF16__
  return GramMatrix{*call}.forward(Room{call->workspace});
#else
  return -1;
#endif
}

}  // namespace moebed
