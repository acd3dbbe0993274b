// Growth of a block Krylov space of a symmetric matrix A = P + diag(d): a block is multiplied by A, what comes of it is
// made orthogonal to the space, and is the next block. On the caller's thread.
//
// N side, B vectors of a block, L of the space; vectors are rows, blocks one after another. N is a multiple of 32. P is
// float32, or bf16, whose products take the block rounded to bf16; all sums are float32.
//
// A block is made orthogonal by its Cholesky factor, twice (CholeskyQR2; Yamamoto and others, 2015). Where its vectors
// depend on one another too much for that, growth stops before it.

#include <cmath>
#include <vector>

#include "rows.h"

namespace moebed {

// What Python hands over.
struct KrylovCall {
  int64_t side, width, first, blocks, passes, bf16;
  float chance_share, conditioned, orthogonal;
  const void* product;  // (N, N)
  const float* lost;    // (N) d
  const float* chance;  // (B, N) is added to what is made orthogonal, this share of its length
  float *basis, *image;  // (L, N) blocks before `first` are there, and that one's basis
  int64_t* grown;        // blocks that are there at the end
  char* workspace;
};

namespace {

struct Krylov {
  const KrylovCall& call;
  const int64_t side = call.side, width = call.width, most = call.blocks * width;
  const int64_t padded = (width + LANES - 1) / LANES * LANES;
  const int64_t deep = (most + LANES - 1) / LANES * LANES;

  struct Buffers {
    float *block, *next;  // (padded, N) rows; those after the last are 0
    float* lines;         // (padded / 16) panels of N lines, or of N / 2 in bf16
    float* panels;        // (N / 16) panels of `most` lines: the basis
    float* inner;         // (deep, padded)
    float* turned;        // (padded, deep)
    float* out;           // (BLOCK, ROW)
  };

  // Panels whose columns are vectors.
  template <class E>
  void pack(const float* vectors, E* lines) const {
    const int64_t depth = side * sizeof(E) / UNIT;
    for (int64_t v = 0; v < padded; v += LANES)
      pack_transposed(vectors + v * side, depth, lines + v * side);
  }

  // next = A block.
  template <class P>
  void multiply(const Buffers& at) const {
    using Element = typename P::Element;
    const Element* const product = (const Element*)call.product;
    Element* const lines = (Element*)at.lines;
    pack(at.block, lines);
    const char* rows[BLOCK];
    for (int64_t begin = 0; begin < side; begin += BLOCK) {
      const int count = int(smaller(BLOCK, side - begin));
      for (int i = 0; i < count; ++i) rows[i] = (const char*)(product + (begin + i) * side);
      strip<P, UNIT>(rows, 0, count, lines, side / P::GROUP, int(padded), at.out, ROW);
      for (int64_t v = 0; v < padded; v += LANES)
        for (int i = 0; i < count; i += LANES)
          transpose((const char*)(at.out + i * ROW + v), ROW * UNIT, (char*)(at.next + v * side + begin + i),
                    side * UNIT);
    }
    for (int64_t v = 0; v < width; ++v) {
      const float* const from = at.block + v * side;
      float* const to = at.next + v * side;
      for (int64_t n = 0; n < side; n += LANES)
        store(to + n, multiply_add(load(call.lost + n), load(from + n), load(to + n)));
    }
  }

  // out (count, padded) = rows times the vectors of a block.
  void inner_products(const float* from, int64_t count, const float* lines, float* out) const {
    const char* rows[BLOCK];
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
      const int some = int(smaller(BLOCK, count - begin));
      for (int i = 0; i < some; ++i) rows[i] = (const char*)(from + (begin + i) * side);
      strip<Fma, UNIT>(rows, 0, some, lines, side, int(padded), out + begin * padded, padded);
    }
  }

  // Takes from a block what lies in the basis' vectors begin to end.
  void take_out(float* block, int64_t begin, int64_t end, const Buffers& at) const {
    const int64_t count = end - begin;
    pack(block, at.lines);
    inner_products(call.basis + begin * side, count, at.lines, at.inner);
    for (int64_t v = 0; v < width; ++v)
      for (int64_t k = 0; k < count; ++k) at.turned[v * deep + k] = -at.inner[k * padded + v];
    const char* rows[STRIP];
    for (int v = 0; v < width; ++v) rows[v] = (const char*)(at.turned + v * deep);
    for (int64_t n = 0; n < side; n += STRIP) {
      const char* const panels = (const char*)(at.panels + n * most + begin * LANES);
      const int across = int(smaller(STRIP, side - n));
      strip_of_units<Fma, UNIT>(rows, 0, int(width), panels, most, 0, count, across, true, block + n, side, panels);
    }
  }

  // Makes a block's vectors orthonormal; the least pivot, below 0 where they are too close to dependent.
  double orthonormalise(float* block, const Buffers& at) const {
    pack(block, at.lines);
    inner_products(block, width, at.lines, at.inner);
    std::vector<double> factor(width * width), inverse(width * width);
    double least = INFINITY, largest = 0;
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double rest = at.inner[i * padded + j];
        for (int64_t k = 0; k < j; ++k) rest -= factor[i * width + k] * factor[j * width + k];
        if (j < i) {
          factor[i * width + j] = rest / factor[j * width + j];
          continue;
        }
        if (!(rest > 0)) return -1;
        const double pivot = factor[i * width + i] = std::sqrt(rest);
        least = std::min(least, pivot), largest = std::max(largest, pivot);
      }
    if (!(least > call.conditioned * largest)) return -1;
    for (int64_t j = 0; j < width; ++j)
      for (int64_t i = j; i < width; ++i) {
        double rest = i == j;
        for (int64_t k = j; k < i; ++k) rest -= factor[i * width + k] * inverse[k * width + j];
        inverse[i * width + j] = rest / factor[i * width + i];
      }
    const char* rows[STRIP];
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t j = 0; j < width; ++j) at.turned[i * deep + j] = float(inverse[i * width + j]);
      rows[i] = (const char*)(at.turned + i * deep);
    }
    alignas(LINE) float panels[STRIP * STRIP];
    for (int64_t n = 0; n < side; n += STRIP) {
      const int across = int(smaller(STRIP, side - n));
      for (int64_t c = 0; c < across; c += LANES)
        for (int64_t v = 0; v < width; ++v) store(panels + (c * width + v * LANES), load(block + v * side + n + c));
      const char* const lines = (const char*)panels;
      strip_of_units<Fma, UNIT>(rows, 0, int(width), lines, width, 0, width, across, false, block + n, side, lines);
    }
    return least;
  }

  // Makes a block orthogonal to the first `size` vectors, almost all of which lies in the last two blocks, as A is
  // symmetric; whether that went well.
  bool orthogonalise(float* block, int64_t size, const Buffers& at) const {
    for (int64_t v = 0; v < width; ++v) {  // where the space is exhausted, a little chance leads out
      float* const vector = block + v * side;
      Vector squares = set(0.0f);
      for (int64_t n = 0; n < side; n += LANES) squares = multiply_add(load(vector + n), load(vector + n), squares);
      const Vector share = set(call.chance_share * std::sqrt(sum(squares)));
      for (int64_t n = 0; n < side; n += LANES)
        store(vector + n, multiply_add(share, load(call.chance + v * side + n), load(vector + n)));
    }
    for (int64_t pass = 0; pass < call.passes; ++pass) {
      take_out(block, pass || size < 2 * width ? 0 : size - 2 * width, size, at);
      const double least = orthonormalise(block, at);
      if (least < 0) return false;
      if (pass && least > call.orthogonal) break;
    }
    return true;
  }

  void add_panels(const float* block, int64_t size, float* panels) const {
    for (int64_t n = 0; n < side; n += LANES)
      for (int64_t v = 0; v < width; ++v) store(panels + n * most + (size + v) * LANES, load(block + v * side + n));
  }

  template <class P>
  void grow(Buffers at) const {
    const int64_t values = width * side, bytes = values * sizeof(float);
    int64_t blocks = 0;
    for (; blocks <= call.first; ++blocks) add_panels(call.basis + blocks * values, blocks * width, at.panels);
    memcpy(at.block, call.basis + call.first * values, bytes);
    while (true) {
      multiply<P>(at);
      memcpy(call.image + (blocks - 1) * values, at.next, bytes);
      if (blocks == call.blocks || !orthogonalise(at.next, blocks * width, at)) break;
      memcpy(call.basis + blocks * values, at.next, bytes);
      add_panels(at.next, blocks * width, at.panels);
      std::swap(at.block, at.next);
      ++blocks;
    }
    *call.grown = blocks;
  }

  int64_t forward(Room room) const {
    Buffers at;
    at.block = room.take<float>(padded * side);
    at.next = room.take<float>(padded * side);
    at.lines = room.take<float>(padded * side);
    at.panels = room.take<float>(most * side);
    at.inner = room.take<float>(deep * padded);
    at.turned = room.take<float>(padded * deep);
    at.out = room.take<float>(BLOCK * ROW);
    if (room.base == nullptr) return room.used;
    memset(at.block, 0, padded * side * sizeof(float));
    memset(at.next, 0, padded * side * sizeof(float));
    if (!call.bf16) {
      grow<Fma>(at);
      return 0;
    }
#if defined(__AMX_BF16__)
    grow<Amx>(at);
#elif defined(__AVX512BF16__)
    grow<Dot>(at);
#endif
    return 0;
  }
};

}  // namespace

// Grows it and returns 0; without a workspace, the bytes that it needs. Below 0: it has no products of bf16.
extern "C" __attribute__((visibility("default"))) int64_t moebed_krylov(const KrylovCall* call, int64_t) {
#ifndef __AVX512BF16__
  if (call->bf16) return -1;
#endif
  return Krylov{*call}.forward(Room{call->workspace});
}

}  // namespace moebed
