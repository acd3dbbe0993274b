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
  void *before, *out;                  // (T·K, 2F) pre-activations, for the backward pass, see kept; (T, H)
  const void* grad;                    // (T, H)
  void *grad_x, *grad_gate_up, *grad_down;
  float* grad_weight;                  // (T, K)
  char* workspace;
};

namespace {

constexpr int LONG = LINE;   // bytes from unit to unit of a panel's column
constexpr int64_t SOON = 8;  // rows ahead of which what was kept is fetched

// ---- between the products

// Sixteen columns of some rows in memory, `step` values from row to row.
template <class E>
struct Columns {
  E* first;
  int64_t step;
  E* of(int64_t row) const { return first + row * step; }
};

// Sixteen columns of some rows of gate and up, from a strip's buffer: kept side by side, and act(gate) up weight.
template <class Act, class S, class E>
void activate(const float* gate, const float* up, const float* weight, int rows, S* kept, Columns<E> out) {
  for (int i = 0; i < rows; ++i, gate += ROW, up += ROW, kept += 2 * LANES) {
    const Vector g = load(gate), u = load(up);
    store_past(kept, g);
    store_past(kept + LANES, u);
    store(out.of(i), Act::at(g).value * u * set(weight[i]));
  }
}

// The same of the gradient of act(gate) up: gives that product again, the gradients of gate and up, and adds that of
// the weight to total, 16 values a row.
template <class Act, class S, class E>
void activate_backward(const float* grad, const S* kept, const float* weight, int rows, Columns<E> out,
                       Columns<E> grad_gate, Columns<E> grad_up, float* total) {
  for (int i = 0; i < rows; ++i, grad += ROW, kept += 2 * LANES, total += LANES) {
    for (int64_t line = 0; line < 2 * LANES * int64_t(sizeof(S)); line += LINE)
      _mm_prefetch((const char*)(kept + SOON * 2 * LANES) + line, _MM_HINT_T0);
    const Vector g = load(kept), u = load(kept + LANES), d = load(grad);
    const Value act = Act::at(g);
    const Vector product = act.value * u, weighted = d * set(weight[i]);
    store(total, multiply_add(d, product, load(total)));
    store(out.of(i), product * set(weight[i]));
    store(grad_gate.of(i), weighted * u * act.slope);
    store(grad_up.of(i), weighted * act.value);
  }
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

  // Run task(block, thread, panels of gate_up, panels of down), which pack(expert, the two) filled for the thread. A
  // thread takes an expert that none has taken, the largest first, and in the end helps where most is left: so an
  // expert is seldom packed twice, and threads end together.
  template <class Pack, class Task>
  void each_block(E* panels, const Pack& pack, const Task& task) const {
    const auto& first = rows.first_block;
    std::vector<int64_t> order(experts);
    for (int64_t e = 0; e < experts; ++e) order[e] = e;
    const auto size = [&](int64_t e) { return first[e + 1] - first[e]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
    std::vector<std::atomic<int64_t>> next(experts);
    for (int64_t e = 0; e < experts; ++e) next[e] = first[e];
    const auto left = [&](int64_t e) { return first[e + 1] - next[e]; };
    std::atomic<int64_t> taken{0};
    each_thread(call.threads, rows.blocks.size(), [&](int thread) {
      E* const up = panels + thread * 3 * width * hidden;
      E* const down = up + 2 * width * hidden;
      const auto work = [&](int64_t e) {
        int64_t i = next[e]++;
        if (i < first[e + 1]) pack(e, up, down);
        for (; i < first[e + 1]; i = next[e]++) task(rows.blocks[i], thread, up, down);
      };
      for (int64_t i = taken++; i < experts; i = taken++) work(order[i]);
      for (;;) {
        const auto most = [&](int64_t a, int64_t b) { return left(a) < left(b); };
        const int64_t e = *std::max_element(order.begin(), order.end(), most);
        if (left(e) <= 0) break;
        work(e);
      }
    });
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

  // A block's rows in memory: one after another, or sixteen columns of all of them and then the next sixteen.
  struct Lines {
    E* first;
    int64_t row, panel;  // steps, in values

    // A line more than the columns take, since rows a power of two bytes apart would all fall into the same few lines
    // of the first-level cache.
    static constexpr int64_t apart(int64_t columns) { return columns + LINE / int64_t(sizeof(E)); }
    static Lines by_row(E* memory, int64_t columns) { return {memory, apart(columns), LANES}; }

    Columns<E> columns(int64_t c) const { return {first + c / LANES * panel, row}; }
    int64_t gap() const { return (panel - LANES) * sizeof(E); }  // from piece to piece, but for the piece itself
    void follow(const char** at) const {
      for (int i = 0; i < BLOCK; ++i) at[i] = (const char*)(first + i * row);
    }
  };

  // Strips of a product with an expert's panels; each is handed to finish(first column, columns, sums).
  template <class Finish>
  static void each_strip(const Block& block, const char* const* at, const E* panels, int64_t depth, int64_t columns,
                         const Finish& finish) {
    alignas(64) float sums[BLOCK * ROW];
    for (int64_t c = 0; c < columns; c += STRIP) {
      const int across = smaller(STRIP, columns - c);
      strip<P, UNIT>(at, 0, block.count(), panels + c * depth * GROUP, depth, across, sums, ROW);
      finish(c, across, sums);
    }
  }

  // Rows times panels, into rows (·, N) of another type or the same; sums go there at once where nothing is between.
  template <int STEP, class To>
  static void multiply(const char* const* at, int64_t gap, int count, const E* panels, int64_t depth, int64_t n, To* out) {
    alignas(64) float sums[BLOCK * ROW];
    for (int64_t c = 0; c < n; c += STRIP) {
      const int across = smaller(STRIP, n - c);
      const E* panel = panels + c * depth * GROUP;
      if constexpr (sizeof(To) == sizeof(float) && !P::CONSECUTIVE) {  // whose tiles have rows beyond the last
        strip<P, STEP>(at, gap, count, panel, depth, across, out + c, n);
      } else {
        strip<P, STEP>(at, gap, count, panel, depth, across, sums, ROW);
        for (int i = 0; i < count; ++i) convert(sums + i * ROW, out + i * n + c, across);
      }
    }
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

  // Pre-activations of sixteen columns of the rows from one on, up after gate in each. So they are written and read one
  // after another.
  S* kept(int64_t c, int64_t row) const { return before + 2 * (c * rows.count() + row * LANES); }

  // ---- forward

  int64_t forward(Room room) const {
    E* const panels = room.take<E>(call.threads * 3 * width * hidden);
    S* const by_row = room.take<S>(call.tokens * call.top_k * hidden);
    E* const gathered = room.take<E>(call.threads * BLOCK * hidden);
    E* const middles = room.take<E>(call.threads * BLOCK * Lines::apart(width));
    if (room.base == nullptr) return room.used;
    const auto pack = [&](int64_t expert, E* up, E* down_) {
      pack_rows(gate_up + expert * 2 * width * hidden, 2 * width, hidden, up);
      pack_rows(down + expert * hidden * width, hidden, width, down_);
    };
    each_block(panels, pack, [&](const Block& block, int thread, const E* up_panels, const E* down_panels) {
      const char* at[BLOCK];
      gather(block, (const S*)call.x, gathered + thread * BLOCK * hidden, at);
      const Lines middle = Lines::by_row(middles + thread * BLOCK * Lines::apart(width), width);
      alignas(64) float up[BLOCK * ROW];
      const int64_t depth = hidden / GROUP;
      each_strip(block, at, up_panels, depth, width, [&](int64_t c, int across, const float* gate) {
        strip<P, UNIT>(at, 0, block.count(), up_panels + (width + c) * hidden, depth, across, up, ROW);
        for (int j = 0; j < across; j += LANES)
          act.forward(gate + j, up + j, &rows.weight[block.begin], block.count(), kept(c + j, block.begin),
                      middle.columns(c + j));
      });
      middle.follow(at);
      multiply<UNIT>(at, 0, block.count(), down_panels, width / GROUP, hidden, by_row + block.begin * hidden);
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

    // A block's, where a line is one row's.
    Lines lines(const Block& block) const {
      return {of(block.expert) + (block.begin - rows.start[block.expert]) * LANES, LANES, rows.units(block.expert) * LANES};
    }

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
      multiply<STEP>(at, 0, block.count(), right.of(expert), depth, n, out + (expert * m + begin) * n);
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
    constexpr bool AT_ONCE = GROUP == 1;  // what is computed is packed already
    const int64_t buffers = AT_ONCE ? 0 : BLOCK * (Lines::apart(width) + Lines::apart(2 * width));
    E* const middles = room.take<E>(call.threads * buffers);
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
      E* const buffer = middles + thread * buffers;
      const Lines middle = AT_ONCE ? middle_rows.lines(block) : Lines::by_row(buffer, width);
      const Lines grad_before =
          AT_ONCE ? before_rows.lines(block) : Lines::by_row(buffer + BLOCK * Lines::apart(width), 2 * width);
      alignas(64) float total[BLOCK * LANES] = {};
      each_strip(block, grads, down_panels, hidden / GROUP, width, [&](int64_t first, int across, const float* sums) {
        for (int64_t c = first; c < first + across; c += LANES)
          act.backward(sums + c - first, kept(c, block.begin), &rows.weight[block.begin], block.count(), middle.columns(c),
                       grad_before.columns(c), grad_before.columns(width + c), total);
      });
      for (int i = 0; i < block.count(); ++i) weight_of_row[block.begin + i] = sum(load(total + i * LANES));
      grad_before.follow(outer);
      multiply<UNIT>(outer, grad_before.gap(), block.count(), up_panels, 2 * width / GROUP, hidden,
                     by_row + block.begin * hidden);
      x_rows.fill(block, inputs);
      grad_rows.fill(block, grads);
      if constexpr (!AT_ONCE) {
        middle.follow(inner);
        middle_rows.fill(block, inner);
        before_rows.fill(block, outer);
      }
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
