// The expert MLP of experts.py, forward and backward, with float32 sums: products, activation, weighting, gather and
// combine in one pass over blocks of an expert's rows. Compiled once for each instruction set.
//
// T tokens, E experts, K experts per token, R rows sorted by expert, H hidden, F expert intermediate.
//
// Work is cut into tasks that do not depend on the number of threads, each of which sums in a fixed order: results are
// the same bit for bit on any number of threads.

#include <algorithm>

#include "activation.h"
#include "rows.h"

namespace moebed {

// What Python hands over; H and F are multiples of 32. The rows' type is that of x, out, before and their gradients.
struct Call {
  int64_t tokens, hidden, width, experts, top_k, ragged, activation, threads, bf16_rows, bf16_weights;
  const int64_t* index;                // (T, K)
  const float* weight;                 // (T, K)
  const void *x, *gate_up, *down;      // (T, H), (E, 2F, H) gate first, (E, H, F)
  void *before, *out;                  // (T·K, 2F) pre-activations, for the backward pass, see kept_strip; (T, H)
  const void* grad;                    // (T, H)
  void *grad_x, *grad_gate_up, *grad_down;
  float* grad_weight;                  // (T, K)
  char* workspace;
};

namespace {

constexpr int LONG = LINE;  // bytes from unit to unit of a panel's column

// ---- between the products

// A row of a strip: keeps gate and up, and gives act(gate) up weight.
template <class Act, class S, class E>
void activate(const float* gate, const float* up, float weight, int width, S* kept_gate, S* kept_up, E* out) {
  for (int j = 0; j < width; j += LANES) {
    const Vector g = load(gate + j), u = load(up + j);
    store(kept_gate + j, g);
    store(kept_up + j, u);
    store(out + j, Act::at(g).value * u * set(weight));
  }
}

// A row of a strip of the gradient of act(gate) up: gives that product again, the gradients of gate and up, and adds
// the gradient of the weight to total, 16 values wide.
template <class Act, class S, class E>
void activate_backward(const float* grad, const S* gate, const S* up, float weight, int width, E* out, E* grad_gate,
                       E* grad_up, float* total) {
  Vector sum = load(total);
  for (int j = 0; j < width; j += LANES) {
    const Vector g = load(gate + j), u = load(up + j), d = load(grad + j);
    const Value act = Act::at(g);
    const Vector product = act.value * u, weighted = d * set(weight);
    sum = multiply_add(d, product, sum);
    store(out + j, product * set(weight));
    store(grad_gate + j, weighted * u * act.slope);
    store(grad_up + j, weighted * act.value);
  }
  store(total, sum);
}

template <class S, class E>
struct Activations {
  decltype(&activate<Silu, S, E>) forward;
  decltype(&activate_backward<Silu, S, E>) backward;
};

template <class S, class E>
constexpr Activations<S, E> ACTIVATIONS[] = {  // in the order of ACTIVATIONS in __init__.py
    {activate<Silu, S, E>, activate_backward<Silu, S, E>},
    {activate<Gelu, S, E>, activate_backward<Gelu, S, E>},
    {activate<GeluTanh, S, E>, activate_backward<GeluTanh, S, E>}};

// ---- one pass: product P, rows of type S, weights of type T

template <class P, class S, class T>
struct Pass {
  using E = typename P::Element;
  static constexpr int64_t GROUP = P::GROUP;

  const Call& call;
  const int64_t hidden = call.hidden, width = call.width, experts = call.experts;
  const Rows rows{call.index, call.weight,     call.tokens * call.top_k, call.top_k, experts,
                  call.ragged != 0, P::GROUP, P::MULTIPLE};
  const Activations<S, E>& act = ACTIVATIONS<S, E>[call.activation];
  const T *gate_up = (const T*)call.gate_up, *down = (const T*)call.down;
  S* const before = (S*)call.before;

  // ---- weights as panels, one expert's at a time on each thread, used while they are in its cache

  // Of the rows of a matrix (N, K), for products with its transpose.
  static void pack_rows(const T* weight, int64_t n, int64_t k, E* out) {
    for (int64_t i = 0; i < n * k; i += LANES * k) pack_transposed(weight + i, k / GROUP, out + i);
  }

  // Of the columns of a matrix (K, N), few panels at a time.
  static void pack_columns(const T* weight, int64_t k, int64_t n, E* out) {
    const int64_t depth = k / GROUP;
    for (int64_t c = 0; c < n; c += STRIP)
      for (int64_t u = 0; u < depth; ++u) {
        const T* row = weight + GROUP * u * n + c;
        pack_line(row, row + n, smaller(STRIP, n - c), out + c * k + u * LANES * GROUP, depth * LINE);
      }
  }

  // Run task(block, thread, panels of gate_up, panels of down), which pack(expert, the two) filled for the thread.
  template <class Pack, class Task>
  void each_block(E* panels, const Pack& pack, const Task& task) const {
    constexpr int64_t TURNS = 6;  // of a thread: fewer pack less, more are shared more evenly
    std::vector<int64_t> packed(call.threads, -1);
    const int64_t count = rows.blocks.size(), grain = std::max<int64_t>(1, count / (TURNS * call.threads));
    run(call.threads, count, [&](int64_t number, int thread) {
      const Block& block = rows.blocks[number];
      E* const up = panels + thread * 3 * width * hidden;
      E* const down = up + 2 * width * hidden;
      if (packed[thread] != block.expert) pack(block.expert, up, down);
      packed[thread] = block.expert;
      task(block, thread, up, down);
    }, grain);
  }

  // ---- rows as left operands

  // Addresses of a block's tokens; a copy of them where the product needs it.
  void gather(const Block& block, const S* matrix, E* copy, const char** at) const {
    for (int i = 0; i < block.count(); ++i) {
      const S* row = matrix + rows.token[block.begin + i] * hidden;
      at[i] = (const char*)row;
      if constexpr (P::CONSECUTIVE || sizeof(S) != sizeof(E)) {
        convert(row, copy + i * hidden, hidden);
        at[i] = (const char*)(copy + i * hidden);
      }
    }
  }

  // Length of a block's rows in memory: a line more than they take, since rows a power of two bytes apart would all
  // fall into the same few lines of the first-level cache.
  static constexpr int64_t apart(int64_t columns) { return columns + LINE / int64_t(sizeof(E)); }

  static void follow(const E* matrix, int64_t columns, const char** at) {
    for (int i = 0; i < BLOCK; ++i) at[i] = (const char*)(matrix + i * apart(columns));
  }

  // Strips of a product with an expert's panels; each is handed to finish(first column, columns, sums).
  template <class Finish>
  static void each_strip(const Block& block, const char* const* at, const E* panels, int64_t depth, int64_t columns,
                         const Finish& finish) {
    alignas(64) float sums[BLOCK * ROW];
    for (int64_t c = 0; c < columns; c += STRIP) {
      const int across = smaller(STRIP, columns - c);
      strip<P, UNIT>(at, block.count(), panels + c * depth * GROUP, depth, across, sums);
      finish(c, across, sums);
    }
  }

  void product(const Block& block, const char* const* at, const E* panels, int64_t depth, S* by_row) const {
    each_strip(block, at, panels, depth, hidden, [&](int64_t c, int across, const float* sums) {
      for (int i = 0; i < block.count(); ++i) convert(sums + i * ROW, by_row + (block.begin + i) * hidden + c, across);
    });
  }

  // Sum of each token's rows (R, H) in out (T, H).
  void combine(const S* by_row, S* out) const {
    constexpr int64_t CHUNK = 32;
    run(call.threads, (call.tokens + CHUNK - 1) / CHUNK, [&](int64_t chunk, int) {
      for (int64_t t = chunk * CHUNK; t < smaller(call.tokens, (chunk + 1) * CHUNK); ++t) {
        const int64_t* row = rows.row.data() + t * call.top_k;
        for (int64_t c = 0; c < hidden; c += LANES) {
          Vector sum = set(0.0f);
          for (int64_t k = 0; k < call.top_k; ++k)
            if (row[k] != NO_ROW) sum = sum + load(by_row + row[k] * hidden + c);
          store(out + t * hidden + c, sum);
        }
      }
    });
  }

  // Pre-activations of a row's gate in a strip, up beside it. They lie strip by strip: in the rows of a matrix, a power
  // of two bytes apart, those of a block would all fall into the same few lines of the first-level cache.
  S* kept_strip(int64_t c, int64_t across, int64_t row) const { return before + 2 * (c * rows.count() + row * across); }

  // ---- forward

  int64_t forward(Room room) const {
    E* const panels = room.take<E>(call.threads * 3 * width * hidden);
    S* const by_row = room.take<S>(call.tokens * call.top_k * hidden);
    E* const gathered = room.take<E>(call.threads * BLOCK * hidden);
    E* const middles = room.take<E>(call.threads * BLOCK * apart(width));
    if (room.base == nullptr) return room.used;
    const auto pack = [&](int64_t expert, E* up, E* down_) {
      pack_rows(gate_up + expert * 2 * width * hidden, 2 * width, hidden, up);
      pack_rows(down + expert * hidden * width, hidden, width, down_);
    };
    each_block(panels, pack, [&](const Block& block, int thread, const E* up_panels, const E* down_panels) {
      const char* at[BLOCK];
      gather(block, (const S*)call.x, gathered + thread * BLOCK * hidden, at);
      E* const middle = middles + thread * BLOCK * apart(width);
      alignas(64) float up[BLOCK * ROW];
      const int64_t depth = hidden / GROUP;
      each_strip(block, at, up_panels, depth, width, [&](int64_t c, int across, const float* gate) {
        strip<P, UNIT>(at, block.count(), up_panels + (width + c) * hidden, depth, across, up);
        for (int i = 0; i < block.count(); ++i) {
          S* kept = kept_strip(c, across, block.begin + i);
          act.forward(gate + i * ROW, up + i * ROW, rows.weight[block.begin + i], across, kept, kept + across,
                      middle + i * apart(width) + c);
        }
      });
      follow(middle, width, at);
      product(block, at, down_panels, width / GROUP, by_row);
    });
    combine(by_row, (S*)call.out);
    return 0;
  }

  // ---- backward

  // Rows of all experts as panels of their columns (N), to be summed over the rows.
  struct Packed {
    const Rows& rows;
    int64_t columns;
    E* data;

    E* of(int64_t expert) const { return data + rows.unit_start[expert] * GROUP * columns; }

    void fill(const Block& block, const char* const* at) const {
      const int64_t units = rows.units(block.expert), first = (block.begin - rows.start[block.expert]) / GROUP;
      E* const to = of(block.expert) + first * LANES * GROUP;
      const int64_t used = (block.count() + GROUP - 1) / GROUP;
      // Few panels at a time, whose lines lie too far apart for the caches to hold those of all.
      for (int64_t c = 0; c < columns; c += STRIP)
        for (int64_t u = 0; u < used; ++u) {
          const E* row = (const E*)at[u * GROUP] + c;
          const E* second = u * GROUP + GROUP - 1 < block.count() ? (const E*)at[u * GROUP + GROUP - 1] + c : nullptr;
          pack_line(row, second, smaller(STRIP, columns - c), to + (c * units + u * LANES) * GROUP, units * LINE);
        }
      if (block.end == rows.start[block.expert + 1])
        for (int64_t rest = first + used; rest < units; ++rest)
          for (int64_t c = 0; c < columns; c += LANES)
            memset((char*)of(block.expert) + c / LANES * units * LINE + rest * LINE, 0, LINE);
    }
  };

  // Gradient of weights: left^T right of each expert's rows, (E, M, N).
  void outer(const Packed& left, const Packed& right, E* scratch, int64_t scratch_size, T* out) const {
    const int64_t m = left.columns, n = right.columns, tasks = (m + BLOCK - 1) / BLOCK;
    run(call.threads, experts * tasks, [&](int64_t i, int thread) {
      const int64_t expert = i / tasks, begin = i % tasks * BLOCK, depth = rows.units(expert);
      const Block block{expert, begin, smaller(begin + BLOCK, m)};
      const char* at[BLOCK];
      for (int64_t j = 0; j < block.count(); ++j) {
        const int64_t column = begin + j;
        at[j] = (const char*)left.of(expert) + column / LANES * depth * LINE + column % LANES * UNIT;
      }
      if constexpr (P::CONSECUTIVE) {
        char* const copy = (char*)(scratch + thread * scratch_size);
        for (int64_t j = 0; j < block.count(); j += LANES)
          for (int64_t u = 0; u < depth; u += LANES)
            transpose(at[j] + u * LINE, LINE, copy + j * depth * UNIT + u * UNIT, depth * UNIT);
        for (int64_t j = 0; j < block.count(); ++j) at[j] = copy + j * depth * UNIT;
      }
      constexpr int STEP = P::CONSECUTIVE ? UNIT : LONG;
      alignas(64) float sums[BLOCK * ROW];
      for (int64_t c = 0; c < n; c += STRIP) {
        const int across = smaller(STRIP, n - c);
        strip<P, STEP>(at, block.count(), right.of(expert) + c * depth * GROUP, depth, across, sums);
        for (int j = 0; j < block.count(); ++j)
          convert(sums + j * ROW, out + (expert * m + begin + j) * n + c, across);
      }
    });
  }

  int64_t backward(Room room) const {
    const int64_t assignments = call.tokens * call.top_k;
    const int64_t padded = assignments + experts * GROUP * P::MULTIPLE;  // at most, units times their rows
    const int64_t longest = P::CONSECUTIVE ? BLOCK * padded : 0;
    E* const panels = room.take<E>(call.threads * 3 * width * hidden);
    const Packed x_rows{rows, hidden, room.take<E>(padded * hidden)};
    const Packed grad_rows{rows, hidden, room.take<E>(padded * hidden)};
    const Packed middle_rows{rows, width, room.take<E>(padded * width)};
    const Packed before_rows{rows, 2 * width, room.take<E>(padded * 2 * width)};
    S* const by_row = room.take<S>(assignments * hidden);
    float* const weight_of_row = room.take<float>(assignments);
    E* const gathered = room.take<E>(call.threads * 2 * BLOCK * hidden);
    E* const middles = room.take<E>(call.threads * BLOCK * (apart(width) + apart(2 * width)));
    E* const transposed = room.take<E>(call.threads * longest);
    if (room.base == nullptr) return room.used;
    const auto pack = [&](int64_t expert, E* up, E* down_) {
      pack_columns(gate_up + expert * 2 * width * hidden, 2 * width, hidden, up);
      pack_columns(down + expert * hidden * width, hidden, width, down_);
    };
    each_block(panels, pack, [&](const Block& block, int thread, const E* up_panels, const E* down_panels) {
      const char *inputs[BLOCK], *grads[BLOCK], *inner[BLOCK], *outer[BLOCK];
      E* const copies = gathered + thread * 2 * BLOCK * hidden;
      gather(block, (const S*)call.x, copies, inputs);
      gather(block, (const S*)call.grad, copies + BLOCK * hidden, grads);
      E* const middle = middles + thread * BLOCK * (apart(width) + apart(2 * width));
      E* const grad_before = middle + BLOCK * apart(width);
      alignas(64) float total[BLOCK * LANES] = {};
      // A strip's pre-activations are on their way while the product before it runs.
      const auto fetch = [&](int64_t c) {
        const int64_t across = smaller(STRIP, width - c);
        const char* kept = (const char*)kept_strip(c, across, block.begin);
        const int64_t bytes = block.count() * 2 * across * int64_t(sizeof(S));
        for (int64_t line = 0; line < bytes; line += LINE) _mm_prefetch(kept + line, _MM_HINT_T1);
      };
      fetch(0);
      each_strip(block, grads, down_panels, hidden / GROUP, width, [&](int64_t c, int across, const float* sums) {
        fetch(c + STRIP);
        for (int i = 0; i < block.count(); ++i) {
          const S* kept = kept_strip(c, across, block.begin + i);
          E* to = grad_before + i * apart(2 * width) + c;
          act.backward(sums + i * ROW, kept, kept + across, rows.weight[block.begin + i], across,
                       middle + i * apart(width) + c, to, to + width, total + i * LANES);
        }
      });
      for (int i = 0; i < block.count(); ++i) weight_of_row[block.begin + i] = sum(load(total + i * LANES));
      follow(middle, width, inner);
      follow(grad_before, 2 * width, outer);
      product(block, outer, up_panels, 2 * width / GROUP, by_row);
      x_rows.fill(block, inputs);
      grad_rows.fill(block, grads);
      middle_rows.fill(block, inner);
      before_rows.fill(block, outer);
    });
    for (int64_t a = 0; a < assignments; ++a)
      call.grad_weight[a] = rows.row[a] == NO_ROW ? 0.0f : weight_of_row[rows.row[a]];
    combine(by_row, (S*)call.grad_x);
    outer(before_rows, x_rows, transposed, longest, (T*)call.grad_gate_up);
    outer(grad_rows, middle_rows, transposed, longest, (T*)call.grad_down);
    return 0;
  }
};

template <class P, class S, class T>
int64_t pass(const Call& call, bool backward) {
  const Pass<P, S, T> self{call};
  if (self.rows.wrong >= 0) return -1 - self.rows.wrong;
  const Room room{call.workspace};
  return backward ? self.backward(room) : self.forward(room);
}

#if defined(__AMX_BF16__)
using Half = Amx;
#elif defined(__AVX512BF16__)
using Half = Dot;
#else
using Half = Fma;  // bf16 values widened to float32
#endif

}  // namespace

// Runs a pass, forward or backward, and returns 0; without a workspace, the bytes that it needs. Below 0, -1 less an
// assignment whose expert is not there.
extern "C" __attribute__((visibility("default"))) int64_t moebed_expert_mlp(const Call* call, int64_t backward) {
  if (!call->bf16_rows) return pass<Fma, float, float>(*call, backward);
  if (call->bf16_weights) return pass<Half, BFloat16, BFloat16>(*call, backward);
  return pass<Half, BFloat16, float>(*call, backward);
}

}  // namespace moebed
