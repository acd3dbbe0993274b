// The expert MLP of experts.py, forward and backward, in bf16 with float32 sums: products, activation, weighting,
// gather and combine in one pass over blocks of an expert's rows.
//
// T tokens, E experts, K experts per token, R = T·K rows sorted by expert, H hidden, F expert intermediate.
//
// Work is cut into tasks that do not depend on the number of threads, each of which sums in a fixed order: results are
// the same bit for bit on any number of threads.

#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "activation.h"
#include "product.h"
#include "rows.h"

namespace moebed {
namespace {

// The strips of a block's rows times an expert's panels; each is handed to finish(first column, width, buffer).
template <class Finish>
void each_strip(const Block& block, const Addresses& rows, const BFloat16* panels, int64_t pairs, int64_t columns,
                const Finish& finish) {
  alignas(64) float sums[BLOCK * STRIP];
  for (int64_t c = 0; c < columns; c += STRIP) {
    const int width = int(std::min<int64_t>(STRIP, columns - c));
    strip(rows.at, block.count(), NEXT_PAIR, panels + c * 2 * pairs, pairs, width, sums);
    finish(c, width, sums);
  }
}

void store_strip(const Block& block, const float* sums, int width, BFloat16* out, int64_t columns) {
  for (int i = 0; i < block.count(); ++i)
    for (int j = 0; j < width; j += LANES) store(out + i * columns + j, _mm512_load_ps(sums + i * STRIP + j));
}

// Sum of each token's K rows (R, H): (T, H).
Tensor combine(const Tensor& by_row, const Rows& rows, int64_t tokens, int64_t hidden) {
  Tensor out = empty({tokens, hidden}, at::kBFloat16);
  const BFloat16* from = data(by_row);
  BFloat16* to = data(out);
  constexpr int64_t CHUNK = 32;
  run((tokens + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
    for (int64_t t = chunk * CHUNK; t < std::min(tokens, (chunk + 1) * CHUNK); ++t)
      for (int64_t c = 0; c < hidden; c += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < rows.top_k; ++k)
          sum = _mm512_add_ps(sum, widen(from + rows.row[t * rows.top_k + k] * hidden + c));
        store(to + t * hidden + c, sum);
      }
  });
  return out;
}

template <class Act, class T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Rows& rows) {
  const int64_t tokens = x.size(0), hidden = x.size(1), width = down.size(2), count = rows.token.size();
  const Tensor up_panels = packed_transposed<T>(gate_up, rows), down_panels = packed_transposed<T>(down, rows);
  Tensor before = empty({count, 2 * width}, at::kBFloat16), by_row = empty(count * hidden);
  run(rows.blocks.size(), [&](int64_t number) {
    const Block& block = rows.blocks[number];
    const Addresses inputs(block, data(x), hidden, rows.token.data());
    const Scratch activated(block.count() * width);
    alignas(64) float up[BLOCK * STRIP];
    const BFloat16* panels = data(up_panels) + block.expert * 2 * width * hidden;
    each_strip(block, inputs, panels, hidden / 2, width, [&](int64_t c, int strip_width, const float* gate) {
      strip(inputs.at, block.count(), NEXT_PAIR, panels + (width + c) * hidden, hidden / 2, strip_width, up);
      for (int i = 0; i < block.count(); ++i) {
        BFloat16* kept = data(before) + (block.begin + i) * 2 * width + c;
        const __m512 weight = set(rows.weight[block.begin + i]);
        for (int j = 0; j < strip_width; j += LANES) {
          const __m512 g = _mm512_load_ps(gate + i * STRIP + j), u = _mm512_load_ps(up + i * STRIP + j);
          store(kept + j, g);
          store(kept + width + j, u);
          store(activated.get() + i * width + c + j, _mm512_mul_ps(_mm512_mul_ps(Act::at(g).value, u), weight));
        }
      }
    });
    const Addresses middle(block, activated.get(), width, nullptr);
    panels = data(down_panels) + block.expert * hidden * width;
    each_strip(block, middle, panels, width / 2, hidden, [&](int64_t c, int strip_width, const float* sums) {
      store_strip(block, sums, strip_width, data(by_row) + block.begin * hidden + c, hidden);
    });
  });
  return {combine(by_row, rows, tokens, hidden), before};
}

// Gradient of weights: left^T right of each expert's rows, (E, M, N).
template <class T>
Tensor outer(const PackedRows& left, const PackedRows& right) {
  const Rows& rows = left.rows;
  const int64_t m = left.columns, n = right.columns;
  Tensor out = empty({rows.experts, m, n}, c10::CppTypeToScalarType<T>::value);
  T* to = out.data_ptr<T>();
  const int64_t blocks = (m + BLOCK - 1) / BLOCK, strips = (n + STRIP - 1) / STRIP;
  run(rows.experts * strips * blocks, [&](int64_t i) {
    const int64_t expert = i / (strips * blocks), c = i / blocks % strips * STRIP, begin = i % blocks * BLOCK;
    const int64_t pairs = rows.pairs(expert);
    const Block block{expert, begin, std::min(begin + BLOCK, m)};
    const int width = int(std::min<int64_t>(STRIP, n - c));
    const char* columns[BLOCK];
    for (int j = 0; j < block.count(); ++j) {
      const int64_t column = begin + j;
      columns[j] = (const char*)(left.of(expert) + column / LANES * pairs * LINE + column % LANES * 2);
    }
    alignas(64) float sums[BLOCK * STRIP];
    strip(columns, block.count(), NEXT_LINE, right.of(expert) + c * 2 * pairs, pairs, width, sums);
    for (int j = 0; j < block.count(); ++j)
      for (int k = 0; k < width; k += LANES)
        store(to + (expert * m + begin + j) * n + c + k, _mm512_load_ps(sums + j * STRIP + k));
  });
  return out;
}

template <class Act, class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& gate_up,
                                                    const Tensor& down, const Tensor& before, const Rows& rows) {
  const int64_t tokens = x.size(0), hidden = x.size(1), width = down.size(2), count = rows.token.size();
  const Tensor up_panels = packed<T>(gate_up, rows), down_panels = packed<T>(down, rows);
  const PackedRows x_rows(rows, hidden), grad_rows(rows, hidden);
  const PackedRows middle_rows(rows, width), before_rows(rows, 2 * width);
  Tensor by_row = empty(count * hidden), grad_weight = empty({tokens, rows.top_k}, at::kFloat);
  std::vector<float> weight_of_row(count);
  run(rows.blocks.size(), [&](int64_t number) {
    const Block& block = rows.blocks[number];
    const Addresses inputs(block, data(x), hidden, rows.token.data());
    const Addresses grads(block, data(grad), hidden, rows.token.data());
    const Scratch activated(block.count() * width), grad_before(block.count() * 2 * width);
    alignas(64) __m512 total[BLOCK];
    for (auto& each : total) each = _mm512_setzero_ps();
    const BFloat16* panels = data(down_panels) + block.expert * hidden * width;
    // A strip's pre-activations are on their way while the product before it runs.
    const auto fetch = [&](int64_t c) {
      for (int i = 0; i < block.count(); ++i)
        for (int64_t half : {int64_t{0}, width})
          for (int64_t line = 0; line < STRIP; line += LINE)
            _mm_prefetch(data(before) + (block.begin + i) * 2 * width + half + c + line, _MM_HINT_T1);
    };
    fetch(0);
    each_strip(block, grads, panels, hidden / 2, width, [&](int64_t c, int strip_width, const float* sums) {
      fetch(c + STRIP);
      for (int i = 0; i < block.count(); ++i) {
        const BFloat16* kept = data(before) + (block.begin + i) * 2 * width + c;
        BFloat16* to = grad_before.get() + i * 2 * width + c;
        const __m512 weight = set(rows.weight[block.begin + i]);
        for (int j = 0; j < strip_width; j += LANES) {
          const __m512 g = widen(kept + j), u = widen(kept + width + j), d = _mm512_load_ps(sums + i * STRIP + j);
          const Value act = Act::at(g);
          const __m512 product = _mm512_mul_ps(act.value, u), weighted = _mm512_mul_ps(d, weight);
          total[i] = _mm512_fmadd_ps(d, product, total[i]);
          store(activated.get() + i * width + c + j, _mm512_mul_ps(product, weight));
          store(to + j, _mm512_mul_ps(_mm512_mul_ps(weighted, u), act.slope));
          store(to + width + j, _mm512_mul_ps(weighted, act.value));
        }
      }
    });
    for (int i = 0; i < block.count(); ++i) weight_of_row[block.begin + i] = _mm512_reduce_add_ps(total[i]);
    const Addresses middle(block, activated.get(), width, nullptr);
    const Addresses outer(block, grad_before.get(), 2 * width, nullptr);
    panels = data(up_panels) + block.expert * 2 * width * hidden;
    each_strip(block, outer, panels, width, hidden, [&](int64_t c, int strip_width, const float* sums) {
      store_strip(block, sums, strip_width, data(by_row) + block.begin * hidden + c, hidden);
    });
    x_rows.fill(block, inputs);
    grad_rows.fill(block, grads);
    middle_rows.fill(block, middle);
    before_rows.fill(block, outer);
  });
  for (size_t a = 0; a < rows.row.size(); ++a) grad_weight.data_ptr<float>()[a] = weight_of_row[rows.row[a]];
  return {combine(by_row, rows, tokens, hidden), outer<T>(before_rows, x_rows), outer<T>(grad_rows, middle_rows),
          grad_weight};
}

template <class Call>
auto with_types(const std::string& activation, const Tensor& weight, const Call& call) {
  auto typed = [&](auto act) {
    return weight.scalar_type() == at::kFloat ? call(act, float{}) : call(act, BFloat16{});
  };
  if (activation == "silu") return typed(Silu{});
  if (activation == "gelu") return typed(Gelu{});
  TORCH_CHECK(activation == "gelu_tanh", "unknown activation ", activation);
  return typed(GeluTanh{});
}

void check(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& index, const Tensor& weight) {
  const auto type = gate_up.scalar_type();
  TORCH_CHECK(x.dim() == 2 && gate_up.dim() == 3 && down.dim() == 3 && index.dim() == 2, "wrong number of dimensions");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && (type == at::kBFloat16 || type == at::kFloat) &&
                  down.scalar_type() == type && index.scalar_type() == at::kLong && weight.scalar_type() == at::kFloat,
              "wrong types");
  TORCH_CHECK(gate_up.size(0) == down.size(0) && gate_up.size(1) == 2 * down.size(2) && gate_up.size(2) == x.size(1) &&
                  down.size(1) == x.size(1) && index.size(0) == x.size(0) && weight.sizes() == index.sizes(),
              "shapes do not fit one another");
  TORCH_CHECK(x.size(1) % LINE == 0 && down.size(2) % LINE == 0, "hidden size and width must be multiples of ", LINE);
}

// (out (T, H), pre-activations (R, 2F) for the backward pass)
std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& index,
                                      const Tensor& weight, const std::string& activation) {
  check(x, gate_up, down, index, weight);
  const Tensor x_ = x.contiguous(), up_ = gate_up.contiguous(), down_ = down.contiguous();
  const Rows rows(index.contiguous(), weight.contiguous(), down.size(0));
  return with_types(activation, up_, [&](auto act, auto type) {
    return forward<decltype(act), decltype(type)>(x_, up_, down_, rows);
  });
}

// Gradients of x (T, H), gate_up, down and weight (T, K).
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(const Tensor& grad, const Tensor& x,
                                                               const Tensor& gate_up, const Tensor& down,
                                                               const Tensor& index, const Tensor& weight,
                                                               const Tensor& before, const std::string& activation) {
  check(x, gate_up, down, index, weight);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == at::kBFloat16 && before.is_contiguous() &&
                  before.scalar_type() == at::kBFloat16 && before.numel() == index.numel() * gate_up.size(1),
              "a gradient or pre-activations that do not fit");
  const Tensor grad_ = grad.contiguous(), x_ = x.contiguous(), up_ = gate_up.contiguous(), down_ = down.contiguous();
  const Rows rows(index.contiguous(), weight.contiguous(), down.size(0));
  return with_types(activation, up_, [&](auto act, auto type) {
    return backward<decltype(act), decltype(type)>(grad_, x_, up_, down_, before, rows);
  });
}

}  // namespace

TORCH_LIBRARY(moebed_native, library) {
  library.def("expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight, str activation)"
              " -> (Tensor, Tensor)");
  library.def("expert_mlp_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight,"
              " Tensor before, str activation) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(moebed_native, CPU, library) {
  library.impl("expert_mlp", expert_mlp);
  library.impl("expert_mlp_backward", expert_mlp_backward);
}

}  // namespace moebed
