// What is done to each row by itself, in one pass over memory: the RMS norm, the rotary embedding and the cross entropy,
// forward and backward. Rows come in chunks that do not depend on the number of threads: results are the same bit for bit on any.

#include <algorithm>
#include <cmath>

#include "activation.h"
#include "rows.h"

namespace moebed {
namespace {

constexpr int64_t CHUNK = 64;  // rows of a task

template <class Task>
void each_chunk(int64_t threads, int64_t rows, const Task& task) {
  run(threads, (rows + CHUNK - 1) / CHUNK,
      [&](int64_t chunk, int) { task(chunk, chunk * CHUNK, smaller((chunk + 1) * CHUNK, rows)); });
}

template <class T>
void rotate(const T* x, const float* cos, const float* sin, T* out, int64_t tokens, int64_t length, int64_t heads,
            int64_t width, float sign, int64_t threads) {
  const int64_t half = width / 2;
  each_chunk(threads, tokens, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t d = 0; d < half; d += LANES) {
        const Vector c = load(cos + t % length * width + d), s = load(sin + t % length * width + d) * set(sign);
        for (int64_t a = t * heads * width + d; a < (t + 1) * heads * width; a += width) {
          const Vector low = load(x + a), high = load(x + a + half);
          store(out + a, low * c - high * s);
          store(out + a + half, high * c + low * s);
        }
      }
  });
}

// What is not a number makes its whole row none.
template <class T>
void log_sums(const T* logits, float* out, int64_t rows, int64_t columns, int64_t threads) {
  each_chunk(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = logits + r * columns;
      Vector high = load(row);
      for (int64_t c = LANES; c < columns; c += LANES) high = max(high, load(row + c));
      alignas(64) float values[LANES];
      store(values, high);
      const float top = *std::max_element(values, values + LANES);
      Vector total = set(0.0f), poison = total;
      for (int64_t c = 0; c < columns; c += LANES) {
        const Vector x = load(row + c) - set(top);
        total = total + exp(x);
        poison = multiply_add(x, set(0.0f), poison);
      }
      out[r] = top + std::log(sum(total)) + sum(poison);
    }
  });
}

template <class T>
void cross_entropy_backward(const T* logits, const float* sums, const int64_t* labels, const float* grad, T* out,
                            int64_t rows, int64_t columns, int64_t threads) {
  each_chunk(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = logits + r * columns;
      for (int64_t c = 0; c < columns; c += LANES) {
        const Vector x = load(row + c) - set(sums[r]);
        Vector slope = exp(x) + x * set(0.0f);
        if (labels[r] / LANES * LANES == c) {  // where the label is
          alignas(64) float one[LANES] = {};
          one[labels[r] % LANES] = 1;
          slope = slope - load(one);
        }
        store(out + r * columns + c, slope * set(grad[r]));
      }
    }
  });
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) void

// x (R, N), weight (N) -> out (R, N) = x scale weight, scale (R) = 1 / rms(x); N is a multiple of 16.
EXPORTED moebed_rms_norm(const float* x, const float* weight, float* out, float* scale, int64_t rows, int64_t columns,
                         double eps, int64_t threads) {
  each_chunk(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x + r * columns;
      Vector squares = set(0.0f);
      for (int64_t c = 0; c < columns; c += LANES) squares = multiply_add(load(row + c), load(row + c), squares);
      scale[r] = 1 / std::sqrt(sum(squares) / columns + float(eps));
      for (int64_t c = 0; c < columns; c += LANES)
        store(out + r * columns + c, load(row + c) * set(scale[r]) * load(weight + c));
    }
  });
}

// Gradients of x and of the weight (N); chunks (R / 64 rounded up, N) is room for sums.
EXPORTED moebed_rms_norm_backward(const float* x, const float* weight, const float* scale, const float* grad,
                                  float* grad_x, float* grad_weight, float* chunks, int64_t rows, int64_t columns,
                                  int64_t threads) {
  each_chunk(threads, rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* const total = chunks + chunk * columns;
    memset(total, 0, columns * sizeof(float));
    for (int64_t r = begin; r < end; ++r) {
      const float *row = x + r * columns, *given = grad + r * columns;
      const Vector s = set(scale[r]);
      Vector dot = set(0.0f);
      for (int64_t c = 0; c < columns; c += LANES) {
        const Vector product = load(row + c) * s * load(given + c);
        store(total + c, load(total + c) + product);
        dot = multiply_add(product, load(weight + c), dot);
      }
      const Vector mean = set(sum(dot) / columns);
      for (int64_t c = 0; c < columns; c += LANES)
        store(grad_x + r * columns + c, (load(given + c) * load(weight + c) - load(row + c) * s * mean) * s);
    }
  });
  for (int64_t c = 0; c < columns; c += LANES) {
    Vector total = set(0.0f);
    for (int64_t chunk = 0; chunk * CHUNK < rows; ++chunk) total = total + load(chunks + chunk * columns + c);
    store(grad_weight + c, total);
  }
}

// Turns each pair of x (tokens, heads, width), which lie half a width apart, by the angle of its position; the tokens
// are sequences of `length`, cos and sin (length, width). Sign -1 turns back. Half a width is a multiple of 16.
EXPORTED moebed_rotate(const void* x, const float* cos, const float* sin, void* out, int64_t tokens, int64_t length,
                       int64_t heads, int64_t width, int64_t sign, int64_t is_bf16, int64_t threads) {
  if (is_bf16)
    rotate((const BFloat16*)x, cos, sin, (BFloat16*)out, tokens, length, heads, width, float(sign), threads);
  else
    rotate((const float*)x, cos, sin, (float*)out, tokens, length, heads, width, float(sign), threads);
}

// Logarithms (R) of the sums of exp of logits (R, V); V is a multiple of 16.
EXPORTED moebed_log_sums(const void* logits, float* out, int64_t rows, int64_t columns, int64_t is_bf16,
                         int64_t threads) {
  if (is_bf16)
    log_sums((const BFloat16*)logits, out, rows, columns, threads);
  else
    log_sums((const float*)logits, out, rows, columns, threads);
}

// Gradient of logits (R, V) from that of each row's cross entropy (R), and from what moebed_log_sums gave.
EXPORTED moebed_cross_entropy_backward(const void* logits, const float* sums, const int64_t* labels, const float* grad,
                                       void* out, int64_t rows, int64_t columns, int64_t is_bf16, int64_t threads) {
  if (is_bf16)
    cross_entropy_backward((const BFloat16*)logits, sums, labels, grad, (BFloat16*)out, rows, columns, threads);
  else
    cross_entropy_backward((const float*)logits, sums, labels, grad, (float*)out, rows, columns, threads);
}

}  // namespace moebed
