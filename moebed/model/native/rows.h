// Rows sorted by expert, their work cut into blocks, and the threads that share it.
//
// E experts, K experts per token, T tokens, R rows: the T·K assignments, less those of weight 0 where these are none.

#pragma once

#include <omp.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <atomic>
#include <vector>

#include "pack.h"

namespace moebed {

#ifdef __SANITIZE_ADDRESS__
constexpr int64_t BETWEEN = LINE;
inline void forbid(char* from, char* to) { ASAN_POISON_MEMORY_REGION(from, to - from); }
#else
constexpr int64_t BETWEEN = 0;
inline void forbid(char*, char*) {}
#endif

// Run task(thread) on each thread, no more of them than there are things to do.
template <class Task>
void each_thread(int64_t threads, int64_t count, const Task& task) {
#pragma omp parallel num_threads(int(smaller(threads, count > 0 ? count : 1)))
  task(omp_get_thread_num());
}

// Run task(i, thread) for i below count, each on whichever thread is free next.
template <class Task>
void run(int64_t threads, int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  each_thread(threads, count, [&](int thread) {
    for (int64_t i = next++; i < count; i = next++) task(i, thread);
  });
}

struct Block {  // some rows of one expert
  int64_t expert, begin, end;
  int count() const { return int(end - begin); }
};

constexpr int64_t NO_ROW = -1;

// Assignments sorted by expert, stably.
struct Rows {
  std::vector<int64_t> start;       // (E + 1) first row of each expert
  std::vector<int64_t> unit_start;  // (E + 1) first unit, where a column's rows are summed
  std::vector<int64_t> token;       // (R)
  std::vector<int64_t> row;         // (T·K) of each assignment
  std::vector<float> weight;        // (R)
  std::vector<Block> blocks;
  std::vector<int64_t> first_block;  // (E + 1) of each expert
  int64_t wrong = -1;  // an assignment whose expert is not there

  // Rows in a unit, and the number of units that an expert's rows are padded to a multiple of.
  Rows(const int64_t* expert_of, const float* weight_of, int64_t assignments, int64_t top_k, int64_t experts,
       bool ragged, int group, int multiple)
      : start(experts + 1), unit_start(experts + 1), row(assignments, NO_ROW), first_block(experts + 1) {
    for (int64_t a = 0; a < assignments; ++a) {
      if (expert_of[a] < 0 || expert_of[a] >= experts) {
        wrong = a;
        return;
      }
      if (!ragged || weight_of[a] != 0) ++start[expert_of[a] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t padded = group * multiple;
      unit_start[e + 1] = unit_start[e] + (start[e + 1] + padded - 1) / padded * multiple;
      start[e + 1] += start[e];
    }
    token.resize(start[experts]), weight.resize(start[experts]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t a = 0; a < assignments; ++a)
      if (!ragged || weight_of[a] != 0) {
        const int64_t at = next[expert_of[a]]++;
        row[a] = at, token[at] = a / top_k, weight[at] = weight_of[a];
      }
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t begin = start[e]; begin < start[e + 1]; begin += BLOCK)
        blocks.push_back({e, begin, smaller(begin + BLOCK, start[e + 1])});
      first_block[e + 1] = blocks.size();
    }
  }

  int64_t count() const { return int64_t(token.size()); }
  int64_t units(int64_t expert) const { return unit_start[expert + 1] - unit_start[expert]; }
  bool empty(int64_t expert) const { return start[expert] == start[expert + 1]; }
};

// Takes arrays one after another from memory that begins at a multiple of 64; from nullptr, it tells how much is needed.
// Where addresses are checked (-fsanitize=address), nobody may touch what lies before and between them.
struct Room {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char *const before = base + used, *const array = before + BETWEEN;
    used += BETWEEN + (count * sizeof(T) + LINE - 1) / LINE * LINE;
    if (base != nullptr) forbid(before, array), forbid(array + count * sizeof(T), base + used);
    return (T*)array;
  }
};

}  // namespace moebed
