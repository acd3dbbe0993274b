// Rows sorted by expert, and weights and rows packed as panels for the products.
//
// E experts, K experts per token, T tokens, R = T·K rows, N columns, P pairs of the summed dimension.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <memory>
#include <vector>

#include "product.h"

namespace moebed {

using at::Tensor;

// Run task(0) ... task(count - 1), each on whichever thread is free next.
template <class Task>
void run(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

inline Tensor empty(at::IntArrayRef size, at::ScalarType type) {
  return at::empty(size, at::TensorOptions().dtype(type));
}
inline Tensor empty(int64_t elements) { return empty({elements}, at::kBFloat16); }
inline BFloat16* data(const Tensor& tensor) { return tensor.data_ptr<BFloat16>(); }

// Room for a block's values, not initialised.
struct Scratch : std::unique_ptr<BFloat16[]> {
  explicit Scratch(int64_t elements) : std::unique_ptr<BFloat16[]>(new BFloat16[elements]) {}
};

struct Block {  // some rows of one expert
  int64_t expert, begin, end;
  int count() const { return int(end - begin); }
};

// Assignments sorted by expert, stably.
struct Rows {
  int64_t top_k, experts;
  std::vector<int64_t> start;       // (E + 1) first row of each expert
  std::vector<int64_t> pair_start;  // (E + 1) first pair, each expert's rows padded to an even number
  std::vector<int64_t> token;       // (R)
  std::vector<int64_t> row;         // (T·K) of each assignment
  std::vector<float> weight;        // (R)
  std::vector<Block> blocks;

  Rows(const Tensor& index, const Tensor& topk_weight, int64_t experts)
      : top_k(index.size(1)), experts(experts), start(experts + 1), pair_start(experts + 1), token(index.numel()),
        row(index.numel()), weight(index.numel()) {
    const int64_t* expert_of = index.const_data_ptr<int64_t>();
    const float* weight_of = topk_weight.const_data_ptr<float>();
    for (int64_t a = 0; a < index.numel(); ++a) {
      TORCH_CHECK(expert_of[a] >= 0 && expert_of[a] < experts, "expert ", expert_of[a], " of ", experts);
      ++start[expert_of[a] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      pair_start[e + 1] = pair_start[e] + (start[e + 1] + 1) / 2;
      start[e + 1] += start[e];
    }
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t a = 0; a < index.numel(); ++a) {
      const int64_t at = next[expert_of[a]]++;
      row[a] = at, token[at] = a / top_k, weight[at] = weight_of[a];
    }
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t begin = start[e]; begin < start[e + 1]; begin += BLOCK)
        blocks.push_back({e, begin, std::min(begin + BLOCK, start[e + 1])});
  }

  int64_t pairs(int64_t expert) const { return pair_start[expert + 1] - pair_start[expert]; }
  bool empty(int64_t expert) const { return start[expert] == start[expert + 1]; }
};

// Addresses of the rows of a block in a matrix of tokens (T, columns), or in one of its own (rows, columns).
struct Addresses {
  const char* at[BLOCK];
  Addresses(const Block& block, const BFloat16* matrix, int64_t columns, const int64_t* token) {
    for (int i = 0; i < block.count(); ++i)
      at[i] = (const char*)(matrix + (token ? token[block.begin + i] : i) * columns);
  }
};

constexpr int64_t NEXT_PAIR = 2 * sizeof(BFloat16);     // bytes from pair to pair of a plain row
constexpr int64_t NEXT_LINE = LINE * sizeof(BFloat16);  // bytes from pair to pair of a panel's column

// Weights (E, N, 2P) as panels of their rows, for products with their transpose.
template <class T>
Tensor packed_transposed(const Tensor& weight, const Rows& rows) {
  const int64_t n = weight.size(1), k = weight.size(2), panels = n / LANES;
  Tensor out = empty(weight.numel());
  const T* from = weight.const_data_ptr<T>();
  BFloat16* to = data(out);
  run(rows.experts * panels, [&](int64_t i) {
    if (!rows.empty(i / panels)) pack_transposed(from + i * LANES * k, k / 2, to + i * LANES * k);
  });
  return out;
}

// Weights (E, 2P, N) as panels of their columns.
template <class T>
Tensor packed(const Tensor& weight, const Rows& rows) {
  const int64_t k = weight.size(1), n = weight.size(2), chunk = LANES, chunks = k / LINE;
  Tensor out = empty(weight.numel());
  const T* from = weight.const_data_ptr<T>();
  BFloat16* to = data(out);
  run(rows.experts * chunks, [&](int64_t i) {
    const int64_t expert = i / chunks, begin = i % chunks * chunk;
    if (rows.empty(expert)) return;
    for (int64_t p = begin; p < begin + chunk; ++p) {
      const T* row = from + (expert * k + 2 * p) * n;
      pack_pair(row, row + n, n, to + expert * k * n + p * LINE, k / 2 * LINE);
    }
  });
  return out;
}

// Rows of all experts as panels of their columns, the summed dimension of the weights' gradients.
struct PackedRows {
  const Rows& rows;
  int64_t columns;
  Tensor storage;

  PackedRows(const Rows& rows, int64_t columns)
      : rows(rows), columns(columns), storage(empty(rows.pair_start.back() * 2 * columns)) {}

  BFloat16* of(int64_t expert) const { return data(storage) + rows.pair_start[expert] * 2 * columns; }

  void fill(const Block& block, const Addresses& from) const {
    const int64_t first = (block.begin - rows.start[block.expert]) / 2, panel = rows.pairs(block.expert) * LINE;
    for (int i = 0; i < block.count(); i += 2) {
      const auto* second = i + 1 < block.count() ? (const BFloat16*)from.at[i + 1] : nullptr;
      pack_pair((const BFloat16*)from.at[i], second, columns, of(block.expert) + (first + i / 2) * LINE, panel);
    }
  }
};

}  // namespace moebed
