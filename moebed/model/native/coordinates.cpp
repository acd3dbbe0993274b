// Scalar products of several rows of bf16 values, as they are and with each coordinate standardised over the rows: one
// pass over memory for both. With AMX a standardised value is split into two of bf16, which leave out a share of 2^-17 at
// most; products of those are exact in float32, and all four of a pair are summed. Elsewhere all is float32.
//
// M rows, of which the first E (`fitted`) standardise a coordinate; n coordinates.
//
// Slabs of coordinates are summed by themselves and then in order, in float64: results are the same bit for bit on any
// number of threads.

#include "rows.h"

namespace moebed {

// What Python hands over. The sums are added to what is there.
struct CoordinatesCall {
  int64_t rows, fitted, coordinates, threads;
  const BFloat16* const* values;  // (M) of (n) each
  double *plain, *standardised;   // (M, M), (M, E)
  char* workspace;
};

namespace {

#ifdef __AMX_BF16__
using Product = Amx;
#else
using Product = Fma;
#endif
using Element = Product::Element;

constexpr bool SPLIT = Product::GROUP == 2;
constexpr int64_t CHUNK = 512;                                // coordinates that stay in a core's cache
constexpr int64_t APART = CHUNK + LINE / sizeof(Element);     // of rows there, which then fall into all sets of a cache
constexpr int64_t DEPTH_UNITS = CHUNK / Product::GROUP;
constexpr int64_t SLAB = 64 * CHUNK;

struct Coordinates {
  const CoordinatesCall& call;
  const int64_t padded = (call.rows + LANES - 1) / LANES * LANES;
  const int64_t slabs = (call.coordinates + SLAB - 1) / SLAB;
  const int64_t sums = padded * padded;

  struct Buffers {  // of a thread
    Element *given, *high, *low, *panels;  // (padded, APART) three times; panels of padded columns and one more
    float* out;                            // (BLOCK, ROW)
  };

  // Coordinates [begin, begin + count) of all rows; those after the last are 0, as rows are.
  void gather(int64_t begin, int64_t count, Element* out) const {
    for (int64_t r = 0; r < call.rows; ++r, out += APART) {
      const BFloat16* const from = call.values[r] + begin;
      const int64_t whole = count / LANES * LANES;
      convert(from, out, whole);
      if (whole == CHUNK) continue;
      memset(out + whole, 0, (CHUNK - whole) * sizeof(Element));
      alignas(64) BFloat16 last[LANES] = {};
      memcpy(last, from + whole, (count - whole) * sizeof(BFloat16));
      convert(last, out + whole, LANES);
    }
  }

  // Each coordinate less its mean and over its deviation (E - 1); one in which all rows agree is 0. The first row is
  // taken off before the mean, so that this is exact.
  void standardise(const Buffers& at) const {
    const float share = 1 / float(call.fitted), freedom = 1 / float(call.fitted - 1);
    for (int64_t c = 0; c < CHUNK; c += LANES) {
      const Element* const column = at.given + c;
      const Vector first = load(column);
      Vector mean = set(0.0f), squares = mean;
      for (int64_t r = 0; r < call.fitted; ++r) mean = mean + (load(column + r * APART) - first);
      mean = mean * set(share);
      for (int64_t r = 0; r < call.fitted; ++r) {
        const Vector off = load(column + r * APART) - first - mean;
        squares = multiply_add(off, off, squares);
      }
      const Vector scale =
          where(negative(set(0.0f) - squares), set(1.0f) / sqrt(squares * set(freedom)), set(0.0f));
      for (int64_t r = 0; r < call.rows; ++r) {
        const Vector value = (load(column + r * APART) - first - mean) * scale;
        Element *const high = at.high + r * APART + c, *const low = at.low + r * APART + c;
        store(high, value);
        if (SPLIT) store(low, value - load(high));
      }
    }
  }

  // Adds products of rows (padded, APART) with those that were packed to sums (padded, padded).
  void multiply(const Element* left, const Buffers& at, double* to) const {
    const char* rows[BLOCK];
    for (int64_t begin = 0; begin < padded; begin += BLOCK) {
      const int count = int(smaller(BLOCK, padded - begin));
      for (int i = 0; i < count; ++i) rows[i] = (const char*)(left + (begin + i) * APART);
      for (int64_t j = 0; j < padded; j += STRIP) {
        const int width = int(smaller(STRIP, padded - j));
        strip<Product, UNIT>(rows, 0, count, at.panels + j * CHUNK, DEPTH_UNITS, width, at.out, ROW);
        for (int i = 0; i < count; ++i)
          for (int k = 0; k < width; ++k) to[(begin + i) * padded + j + k] += at.out[i * ROW + k];
      }
    }
  }

  void pack(const Element* rows, const Buffers& at) const {
    for (int64_t r = 0; r < padded; r += LANES)
      for (int64_t u = 0; u < DEPTH_UNITS; u += LANES)
        transpose((const char*)(rows + r * APART) + u * UNIT, APART * sizeof(Element),
                  (char*)(at.panels + r * CHUNK) + u * LINE, LINE);
  }

  int64_t forward(Room room) const {
    const int64_t values = padded * APART, panels = (padded + LANES) * CHUNK, parts = SPLIT ? 3 : 2;
    std::vector<Buffers> buffers(call.threads);
    for (Buffers& at : buffers) {
      for (Element** array : {&at.given, &at.high, &at.low}) *array = room.take<Element>(values);
      at.panels = room.take<Element>(panels);
      at.out = room.take<float>(BLOCK * ROW);
    }
    double* const totals = room.take<double>(slabs * parts * sums);
    if (room.base == nullptr) return room.used;
    for (const Buffers& at : buffers) {
      for (Element* array : {at.given, at.high, at.low}) memset(array, 0, values * sizeof(Element));
      memset(at.panels, 0, panels * sizeof(Element));
    }
    memset(totals, 0, slabs * parts * sums * sizeof(double));
    run(call.threads, slabs, [&](int64_t slab, int thread) {
      const Buffers& at = buffers[thread];
      double* const total = totals + slab * parts * sums;
      const int64_t stop = smaller(call.coordinates, (slab + 1) * SLAB);
      for (int64_t begin = slab * SLAB; begin < stop; begin += CHUNK) {
        gather(begin, smaller(CHUNK, stop - begin), at.given);
        pack(at.given, at);
        multiply(at.given, at, total);
        if (call.fitted < 2) continue;
        standardise(at);
        pack(at.high, at);
        multiply(at.high, at, total + sums);
        if (!SPLIT) continue;
        multiply(at.low, at, total + 2 * sums);  // and its transpose
        pack(at.low, at);
        multiply(at.low, at, total + sums);
      }
    });
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const double *const plain = totals + slab * parts * sums, *const high = plain + sums, *const low = high + sums;
      for (int64_t i = 0; i < call.rows; ++i) {
        for (int64_t j = 0; j < call.rows; ++j) call.plain[i * call.rows + j] += plain[i * padded + j];
        for (int64_t j = 0; j < call.fitted; ++j) {
          double found = high[i * padded + j];
          if (SPLIT) found += low[i * padded + j] + low[j * padded + i];
          call.standardised[i * call.fitted + j] += found;
        }
      }
    }
    return 0;
  }
};

}  // namespace

// Adds the products and returns 0; without a workspace, the bytes that it needs.
extern "C" __attribute__((visibility("default"))) int64_t moebed_coordinates(const CoordinatesCall* call, int64_t) {
  return Coordinates{*call}.forward(Room{call->workspace});
}

}  // namespace moebed
