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

constexpr int64_t SIDE = 2 * Amx::SIDE;      // of a square
constexpr int64_t TOGETHER = 8 * SIDE;       // columns whose panels stay in the second-level cache
constexpr int64_t APART = TOGETHER + LANES;  // of rows of sums, which then fall into all sets of a cache

struct GramMatrix {
  const GramCall& call;
  const int64_t depth = call.columns / Amx::GROUP;

  void put(const float* sums, int64_t apart, int64_t row, int64_t column) const {
    for (int64_t i = 0; i < SIDE; ++i)
      for (int64_t j = 0; j < SIDE; j += LANES)
        store(call.product + (row + i) * call.rows + column + j, load(sums + i * apart + j));
  }

  // Rounds and mirrors a square's sums; returns the sum of the squares beside the diagonal, mirrored ones included.
  double finish(int64_t row, int64_t column, float* sums) const {
    alignas(LINE) float mirrored[SIDE * SIDE];
    put(sums, APART, row, column);
    if (row == column) {
      for (int64_t i = 0; i < SIDE; ++i) {
        call.squares[row + i] = sums[i * APART + i];
        sums[i * APART + i] = 0;
      }
    } else {
      for (int64_t i = 0; i < SIDE; i += LANES)
        for (int64_t j = 0; j < SIDE; j += LANES)
          transpose((const char*)(sums + i * APART + j), APART * UNIT, (char*)(mirrored + j * SIDE + i), SIDE * UNIT);
      put(mirrored, SIDE, column, row);
    }
    Vector squares = set(0.0f);
    for (int64_t i = 0; i < SIDE; ++i)
      for (int64_t j = 0; j < SIDE; j += LANES)
        squares = multiply_add(load(sums + i * APART + j), load(sums + i * APART + j), squares);
    return (row == column ? 1.0 : 2.0) * sum(squares);
  }

  int64_t forward(Room room) const {
    BFloat16* const panels = room.take<BFloat16>(TOGETHER * call.columns);
    float* const sums = room.take<float>(SIDE * APART);
    if (room.base == nullptr) return room.used;
    const Amx::Configured configured;
    *call.beside = 0;
    for (int64_t first = 0; first < call.rows; first += TOGETHER) {
      const int64_t stop = smaller(first + TOGETHER, call.rows);
      for (int64_t column = first; column < stop; column += LANES)
        pack_transposed(call.values + column * call.columns, depth, panels + (column - first) * call.columns);
      for (int64_t row = first; row < call.rows; row += SIDE) {
        const int64_t end = smaller(stop, row + SIDE);
        const char* const rows = (const char*)(call.values + row * call.columns);
        // All of a row's squares before the first is read: what tiles have just stored is waited for.
        for (int64_t column = first; column < end; column += SIDE) {
          const char* const at = (const char*)(panels + (column - first) * call.columns);
          Amx::square<true>(rows, call.columns * sizeof(BFloat16), at, depth, sums + column - first, APART);
        }
        for (int64_t column = first; column < end; column += SIDE)
          *call.beside += finish(row, column, sums + column - first);
      }
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
