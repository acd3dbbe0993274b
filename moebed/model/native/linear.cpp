// Rows times a matrix in float32: the products of layers without experts, and the gradients of their inputs. The matrix
// is packed once; rows are read where they lie.
//
// R rows, K values each, N columns of the result; K and N are multiples of 16.
//
// Every number is summed in a fixed order: results are the same bit for bit on any number of threads.

#include "rows.h"

namespace moebed {
namespace {

// Columns c to c + across of the result as panels: rows of weight (N, K), or columns of weight (K, N).
void pack(const float* weight, int64_t depth, int64_t columns, bool by_row, int64_t c, int64_t across, float* out) {
  if (by_row)
    for (int64_t j = 0; j < across; j += LANES) pack_transposed(weight + (c + j) * depth, depth, out + j * depth);
  else
    for (int64_t u = 0; u < depth; ++u)
      pack_line(weight + u * columns + c, (const float*)nullptr, across, out + u * LANES, depth * LINE);
}

}  // namespace

// x (R, K) -> out (R, N): times the transpose of weight (N, K), or, where that is not `by_row`, times weight (K, N); or
// added to what is there. panels (N, K) is room.
extern "C" __attribute__((visibility("default"))) void moebed_linear(const float* x, const float* weight, float* out,
                                                                      float* panels, int64_t rows, int64_t depth,
                                                                      int64_t columns, int64_t by_row, int64_t add,
                                                                      int64_t threads) {
  run(threads, (columns + STRIP - 1) / STRIP, [&](int64_t i, int) {
    const int64_t c = i * STRIP;
    pack(weight, depth, columns, by_row, c, smaller(STRIP, columns - c), panels + c * depth);
  });
  // As many blocks for each thread, of whole tiles.
  const int64_t tiles = (rows + TILE - 1) / TILE, most = threads * (BLOCK / TILE);
  const int64_t blocks = (tiles + most - 1) / most * threads;
  run(threads, blocks, [&](int64_t i, int) {
    const int64_t first = i * tiles / blocks * TILE, last = smaller((i + 1) * tiles / blocks * TILE, rows);
    const char* at[BLOCK];
    for (int64_t r = first; r < last; ++r) at[r - first] = (const char*)(x + r * depth);
    // The rows' units that were read are used for all columns before the next ones are.
    for (int64_t begin = 0; begin < depth; begin += DEPTH)
      for (int64_t c = 0; c < columns; c += STRIP) {
        const int64_t end = smaller(begin + DEPTH, depth);
        const int across = smaller(STRIP, columns - c);
        const char* const strip = (const char*)(panels + c * depth);
        const char* const after = c + STRIP < columns ? strip + (across / LANES * depth + begin) * LINE
                                                      : (const char*)panels + end % depth * LINE;
        strip_of_units<Fma, UNIT>(at, 0, last - first, strip, depth, begin, end, across, add || begin > 0,
                                  out + first * columns + c, columns, after);
      }
  });
}

}  // namespace moebed
