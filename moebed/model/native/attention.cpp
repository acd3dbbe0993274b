// Causal attention in float32, forward and backward, on the micro-kernels of the experts. A task is a key-value head of a
// sequence: its keys and values are packed once and its queries come in blocks, whose logits stay in a core's cache.
// Products leave out what the causal mask hides, up to a tile.
//
// B sequences, S positions, A query heads, G key-value heads, D head width, a multiple of 16.
//
// No task depends on the number of threads, and each sums in a fixed order: results are the same bit for bit on any.

#include <algorithm>
#include <cmath>

#include "activation.h"
#include "rows.h"

namespace moebed {

// What Python hands over.
struct AttentionCall {
  int64_t sequences, length, heads, key_heads, width, threads;
  double scale;
  const float *query, *key, *value;        // (B, S, A, D), (B, S, G, D) twice
  const float *cos, *sin;                  // (S, D) of the angles that queries and keys are turned by, or none
  float *out, *log_sums;                   // (B, S, A, D); (B, A, S) of the scaled logits
  const float* grad;                       // (B, S, A, D)
  float *grad_query, *grad_key, *grad_value;
  char* workspace;
};

namespace {

constexpr int QUERIES = 48;  // of a block

inline int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

struct Attention {
  const AttentionCall& call;
  const int64_t length = call.length, width = call.width, keys = up_to(length, LANES);
  const int64_t query_apart = call.heads * width, key_apart = call.key_heads * width;
  const int64_t across = width + LANES, logits_apart = keys + LANES;  // of rows in buffers
  const float scale = float(call.scale);

  struct Head {
    const float *query, *key, *value;
  };

  // Rows of one head, positions begin to begin + count, turned by their angles, or back.
  void turn(const float* from, int64_t from_apart, int64_t begin, int64_t count, float sign, float* to,
            int64_t to_apart) const {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < count; ++i, from += from_apart, to += to_apart) {
      if (call.cos == nullptr) {
        convert(from, to, width);
        continue;
      }
      const float *const cos = call.cos + (begin + i) * width, *const sin = call.sin + (begin + i) * width;
      const float *const __restrict low = from, *const __restrict high = from + half;
      float *const __restrict low_to = to, *const __restrict high_to = to + half;
      for (int64_t d = 0; d < half; ++d) {
        low_to[d] = low[d] * cos[d] - high[d] * (sign * sin[d]);
        high_to[d] = high[d] * cos[d] + low[d] * (sign * sin[d]);
      }
    }
  }

  // Positions of one head, `apart` values apart, as panels whose columns are the positions; those after the last are 0.
  void pack_positions(const float* from, int64_t apart, float* out) const {
    for (int64_t s = 0; s < keys; s += LANES)
      for (int64_t d = 0; d < width; d += LANES) {
        const float* corner = from + s * apart + d;
        alignas(64) float copy[LANES * LANES] = {};
        const bool whole = s + LANES <= length;
        for (int64_t i = 0; !whole && s + i < length; ++i) convert(corner + i * apart, copy + i * LANES, LANES);
        transpose((const char*)(whole ? corner : copy), (whole ? apart : LANES) * UNIT, (char*)(out + s * width + d * LANES),
                  LINE);
      }
  }

  // The same as panels whose units are the positions, `units` of them.
  void pack_units(const float* from, int64_t apart, int64_t count, int64_t units, float* out) const {
    for (int64_t s = 0; s < units; ++s)
      for (int64_t d = 0; d < width; d += LANES)
        store(out + d * units + s * LANES, s < count ? load(from + s * apart + d) : set(0.0f));
  }

  struct Block {  // of queries
    int64_t begin, count;
    int64_t end() const { return begin + count; }
  };

  template <class Task>
  void each_block(const Task& task) const {
    for (int64_t begin = 0; begin < length; begin += QUERIES) task(Block{begin, smaller(QUERIES, length - begin)});
  }

  // Rows (count, D) times positions, into rows of logits: as far as a query may look, up to a tile.
  void to_positions(const Block& block, const float* rows, int64_t apart, const float* panels, float* out) const {
    const char* at[QUERIES];
    for (int64_t i = 0; i < block.count; ++i) at[i] = (const char*)(rows + i * apart);
    for (int64_t c = 0; c < block.end(); c += PANELS * LANES) {
      const char* panel = (const char*)(panels + c * width);
      const int64_t count = (smaller(keys, up_to(block.end(), LANES)) - c) / LANES;
      for (int64_t i = std::max<int64_t>(0, c - block.begin) / TILE * TILE; i < block.count; i += TILE)
        tile_of<Fma, UNIT>(block.count - i, count)(at + i, 0, panel, width * LINE, 0, width, false, panel,
                                                   out + i * logits_apart + c, logits_apart);
    }
  }

  // Rows of weights of the positions that a query may look at, times those positions: (count, D).
  void from_positions(const Block& block, const float* weights, const float* panels, float* out) const {
    const char* at[QUERIES];
    for (int64_t i = 0; i < block.count; ++i) at[i] = (const char*)(weights + i * logits_apart);
    for (int64_t begin = 0; begin < block.end(); begin += DEPTH)
      for (int64_t d = 0; d < width; d += PANELS * LANES) {
        const char* panel = (const char*)(panels + d * keys);
        for (int64_t i = 0; i < block.count; i += TILE) {
          const int64_t seen = smaller(block.begin + i + TILE, block.end());
          if (seen <= begin) continue;
          tile_of<Fma, UNIT>(block.count - i, (width - d) / LANES)(at + i, 0, panel, keys * LINE, begin,
                                                                   smaller(begin + DEPTH, seen), begin > 0, panel,
                                                                   out + i * across + d, across);
        }
      }
  }

  // Adds to each position (S, D) what the block's queries, as panels of units, weigh it with; weights in panels as well.
  void add_to_positions(const Block& block, const float* weights, const float* panels, float* out) const {
    for (int64_t s = 0; s < block.end(); s += TILE) {
      const char* at[TILE];
      for (int64_t i = 0; i < TILE; ++i)  // a position after the last is a column of zeros, or not taken
        at[i] = (const char*)(weights + (s + i) / LANES * LANES * QUERIES + (s + i) % LANES);
      const int64_t first = std::max<int64_t>(0, s - block.begin);
      for (int64_t d = 0; d < width; d += PANELS * LANES) {
        const char* panel = (const char*)(panels + d * QUERIES);
        tile_of<Fma, LINE>(block.end() - s, (width - d) / LANES)(at, 0, panel, QUERIES * LINE, first, block.count, true,
                                                                 panel, out + s * across + d, across);
      }
    }
  }

  // Which of 16 positions from c on are after a query.
  static Mask hidden(int64_t c, int64_t query) {
    alignas(64) static constexpr float LANE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return negative(set(float(query - c)) - load(LANE));
  }

  // exp(scale (x - max)) of a row of logits in place, 0 where it may not look; returns the logarithm of their sum with
  // that of the maximum. What is not a number makes all of the row none.
  float soften(float* logits, int64_t query, int64_t stop, float* sum_) const {
    const int64_t last = query / LANES * LANES;
    const Mask after = hidden(last, query);
    store(logits + last, where(after, set(-INFINITY), load(logits + last)));
    Vector high = set(-INFINITY), total = set(0.0f);
    for (int64_t c = 0; c <= last; c += LANES) high = max(high, load(logits + c));
    alignas(64) float values[LANES];
    store(values, high);
    const float top = *std::max_element(values, values + LANES) * scale;
    for (int64_t c = 0; c <= last; c += LANES) {
      const Vector x = multiply_add(load(logits + c), set(scale), set(-top));
      const Vector e = c < last ? exp(x) : where(after, set(0.0f), exp(x));
      const Vector poison = c < last ? x * set(0.0f) : where(after, set(0.0f), x * set(0.0f));
      total = total + e + poison;
      store(logits + c, e);
    }
    for (int64_t c = last + LANES; c < stop; c += LANES) store(logits + c, set(0.0f));
    *sum_ = sum(total);
    return top + std::log(*sum_);
  }

  Head head(int64_t task, int64_t h) const {
    const int64_t sequence = task / call.key_heads, g = task % call.key_heads;
    const int64_t group = call.heads / call.key_heads, at = sequence * length;
    const int64_t keys_at = at * key_apart + g * width;
    return {call.query + at * query_apart + (g * group + h) * width, call.key + keys_at, call.value + keys_at};
  }

  int64_t tasks() const { return call.sequences * call.key_heads; }
  int64_t group() const { return call.heads / call.key_heads; }
  float* log_sums(const Head& head) const {
    const int64_t offset = head.query - call.query, sequence = offset / (length * query_apart);
    return call.log_sums + (sequence * call.heads + offset % query_apart / width) * length;
  }

  int64_t forward(Room room) const {
    float* const key_room = room.take<float>(call.threads * keys * width);
    float* const value_room = room.take<float>(call.threads * keys * width);
    float* const logits_room = room.take<float>(call.threads * QUERIES * logits_apart);
    float* const turned_room = room.take<float>(call.threads * (keys + QUERIES) * width);
    if (room.base == nullptr) return room.used;
    run(call.threads, tasks(), [&](int64_t task, int thread) {
      float* const key_panels = key_room + thread * keys * width;
      float* const value_panels = value_room + thread * keys * width;
      float* const logits = logits_room + thread * QUERIES * logits_apart;
      float* const turned_keys = turned_room + thread * (keys + QUERIES) * width;
      float* const queries = turned_keys + keys * width;
      turn(head(task, 0).key, key_apart, 0, length, 1, turned_keys, width);
      pack_positions(turned_keys, width, key_panels);
      pack_units(head(task, 0).value, key_apart, length, keys, value_panels);
      for (int64_t h = 0; h < group(); ++h) {
        const Head at = head(task, h);
        float* const sums = log_sums(at);
        each_block([&](const Block& block) {
          turn(at.query + block.begin * query_apart, query_apart, block.begin, block.count, 1, queries, width);
          to_positions(block, queries, width, key_panels, logits);
          float total[QUERIES];
          for (int64_t i = 0; i < block.count; ++i)
            sums[block.begin + i] = soften(logits + i * logits_apart, block.begin + i, up_to(block.end(), LANES), total + i);
          alignas(64) float mixed[QUERIES * MOST];
          from_positions(block, logits, value_panels, mixed);
          for (int64_t i = 0; i < block.count; ++i) {
            float* to = call.out + (at.query - call.query) + (block.begin + i) * query_apart;
            for (int64_t d = 0; d < width; d += LANES) store(to + d, load(mixed + i * across + d) * set(1 / total[i]));
          }
        });
      }
    });
    return 0;
  }

  static constexpr int64_t MOST = 256 + LANES;  // values in a buffer's row of D

  struct Buffers {  // of a thread in the backward pass
    float *key_panels, *value_panels, *key_units, *turned_keys;  // (keys, D)
    float *rows, *grad_rows, *weights, *grad_weights;            // (QUERIES, logits_apart)
    float *query_units, *grad_units, *queries;                   // (QUERIES, D)
    float *grad_key, *grad_value;                                // (S, across)
  };

  int64_t backward(Room room) const {
    const int64_t sums_size = length * across;
    std::vector<Buffers> buffers(call.threads);
    for (Buffers& at : buffers) {
      for (float** array : {&at.key_panels, &at.value_panels, &at.key_units, &at.turned_keys})
        *array = room.take<float>(keys * width);
      for (float** array : {&at.rows, &at.grad_rows, &at.weights, &at.grad_weights})
        *array = room.take<float>(QUERIES * logits_apart);
      for (float** array : {&at.query_units, &at.grad_units, &at.queries}) *array = room.take<float>(QUERIES * width);
      for (float** array : {&at.grad_key, &at.grad_value}) *array = room.take<float>(sums_size);
    }
    if (room.base == nullptr) return room.used;
    run(call.threads, tasks(), [&](int64_t task, int thread) {
      const Buffers& own = buffers[thread];
      const Head first = head(task, 0);
      turn(first.key, key_apart, 0, length, 1, own.turned_keys, width);
      pack_positions(own.turned_keys, width, own.key_panels);
      pack_positions(first.value, key_apart, own.value_panels);
      pack_units(own.turned_keys, width, length, keys, own.key_units);
      memset(own.grad_key, 0, sums_size * sizeof(float));
      memset(own.grad_value, 0, sums_size * sizeof(float));
      for (int64_t h = 0; h < group(); ++h) {
        const Head at = head(task, h);
        const int64_t offset = at.query - call.query;
        const float* const sums = log_sums(at);
        each_block([&](const Block& block) {
          const int64_t from = offset + block.begin * query_apart, stop = up_to(block.end(), LANES);
          turn(call.query + from, query_apart, block.begin, block.count, 1, own.queries, width);
          to_positions(block, own.queries, width, own.key_panels, own.rows);
          to_positions(block, call.grad + from, query_apart, own.value_panels, own.grad_rows);
          pack_units(own.queries, width, block.count, QUERIES, own.query_units);
          pack_units(call.grad + from, query_apart, block.count, QUERIES, own.grad_units);
          for (int64_t i = 0; i < block.count; ++i) {
            const int64_t query = block.begin + i, last = query / LANES * LANES;
            const float *grad = call.grad + from + i * query_apart, *out = call.out + from + i * query_apart;
            Vector dot = set(0.0f);
            for (int64_t d = 0; d < width; d += LANES) dot = multiply_add(load(grad + d), load(out + d), dot);
            const Vector mean = set(sum(dot)), log_sum = set(-sums[query]), s = set(scale);
            const Mask after = hidden(last, query);
            float *row = own.rows + i * logits_apart, *grad_row = own.grad_rows + i * logits_apart;
            for (int64_t c = 0; c < stop; c += LANES) {
              Vector p = set(0.0f), slope = p;
              if (c <= last) {
                const Vector x = multiply_add(load(row + c), s, log_sum);
                p = exp(x) + x * set(0.0f);
                slope = p * (load(grad_row + c) - mean) * s;
                if (c == last) p = where(after, set(0.0f), p), slope = where(after, set(0.0f), slope);
              }
              store(row + c, slope);
              store(own.weights + c * QUERIES + i * LANES, p);
              store(own.grad_weights + c * QUERIES + i * LANES, slope);
            }
          }
          add_to_positions(block, own.weights, own.grad_units, own.grad_value);
          add_to_positions(block, own.grad_weights, own.query_units, own.grad_key);
          alignas(64) float mixed[QUERIES * MOST];
          from_positions(block, own.rows, own.key_units, mixed);
          turn(mixed, across, block.begin, block.count, -1, call.grad_query + from, query_apart);
        });
      }
      const int64_t to = first.key - call.key;
      turn(own.grad_key, across, 0, length, -1, call.grad_key + to, key_apart);
      for (int64_t s = 0; s < length; ++s) convert(own.grad_value + s * across, call.grad_value + to + s * key_apart, width);
    });
    return 0;
  }
};

}  // namespace

// Runs a pass, forward or backward, and returns 0; without a workspace, the bytes that it needs.
extern "C" __attribute__((visibility("default"))) int64_t moebed_attention(const AttentionCall* call, int64_t backward) {
  const Attention attention{*call};
  const Room room{call->workspace};
  return backward ? attention.backward(room) : attention.forward(room);
}

}  // namespace moebed
