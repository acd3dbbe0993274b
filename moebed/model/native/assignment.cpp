// The permutation that maximises a sum of similarities over some candidates of each row, with the prices that prove it,
// and the scan of all similarities that finds candidates, and those that a proof finds missing. On the caller's thread.
//
// Shortest augmenting paths after auctions without a least bid: Jonker and Volgenant, A shortest augmenting path
// algorithm for dense and sparse linear assignment problems, Computing 38 (1987).
//
// N rows and columns, C candidates.

#include <algorithm>
#include <limits>

#include "rows.h"

namespace moebed {

// What Python hands over.
struct AssignCall {
  int64_t size, count;
  int64_t allowed;          // rows without a column
  const float* similarity;  // (N, N)
  const int64_t* edges;     // (C) flat indices of the candidates, in order
  double* price;            // (N) of the columns: those to begin with, then the optimum's
  double* profit;           // (N) of the rows that have a column
  int64_t* permutation;     // (N) each row's column, or -1
  int64_t* left;            // () rows without a column, or -1: more than are allowed
  char* workspace;
};

struct ReachCall {
  int64_t size, capacity;
  int64_t rank, every;      // above 0, each row's least is that of so many among one column in `every`
  const float* similarity;  // (N, N)
  const float* price;       // (N) of the columns
  const float* least;       // (N) of the rows
  int64_t* found;           // (capacity and SEEN more) flat indices, in order
  int64_t* count;           // () how many there are, or more than capacity where they are
  char* workspace;
};

namespace {

constexpr int NONE = -1;
constexpr int SEEN = 64;  // entries that are looked at together

// Columns by their distance, the nearest first; each at most once.
struct Nearest {
  double* distance;  // (N)
  int* heap;         // (N)
  int* place;        // (N) of a column in it, or NONE
  int count = 0;

  void put(int column, int at) { heap[at] = column, place[column] = at; }

  void raise(int column) {
    int at = place[column] == NONE ? count++ : place[column];
    for (; at > 0; at = (at - 1) / 2) {
      const int above = heap[(at - 1) / 2];
      if (distance[above] <= distance[column]) break;
      put(above, at);
    }
    put(column, at);
  }

  int pop() {
    const int first = heap[0], last = heap[--count];
    place[first] = NONE;
    if (count == 0) return first;
    int at = 0;
    for (int below = 1; below < count; below = 2 * at + 1) {
      if (below + 1 < count && distance[heap[below + 1]] < distance[heap[below]]) ++below;
      if (distance[heap[below]] >= distance[last]) break;
      put(heap[below], at);
      at = below;
    }
    put(last, at);
    return first;
  }
};

struct Assignment {
  const AssignCall& call;
  const int size = int(call.size);
  int64_t* start;  // (N + 1) where each row's candidates begin
  int* column;     // (C)
  float* value;    // (C)
  int* owner;      // (N) each column's row
  int* from;       // (N) the row that a column was reached from
  int *free, *next, *scanned, *touched;  // (N)
  bool* done;      // (N)
  Nearest near;

  int64_t forward(Room room) {
    start = room.take<int64_t>(size + 1);
    column = room.take<int>(call.count);
    value = room.take<float>(call.count);
    for (int** array : {&owner, &from, &free, &next, &scanned, &touched, &near.heap, &near.place})
      *array = room.take<int>(size);
    done = room.take<bool>(size);
    near.distance = room.take<double>(size);
    if (room.base == nullptr) return room.used;
    gather();
    int many = keep();
    for (int pass = 0; pass < PASSES && many > 0; ++pass) many = bid(many);
    int left = 0;
    for (int f = 0; f < many; ++f) {
      if (!augment(free[f]) && ++left > call.allowed) {
        *call.left = NONE;
        return 0;
      }
    }
    for (int row = 0; row < size; ++row)
      if (call.permutation[row] != NONE) {
        const int64_t at = call.permutation[row];
        call.profit[row] = double(call.similarity[int64_t(row) * size + at]) - call.price[at];
      }
    *call.left = left;
    return 0;
  }

  static constexpr int PASSES = 4;

  void gather() {
    int64_t edge = 0;
    for (int64_t row = 0; row < size; ++row) {
      start[row] = edge;
      for (const int64_t end = (row + 1) * size; edge < call.count && call.edges[edge] < end; ++edge) {
        column[edge] = int(call.edges[edge] - row * size);
        value[edge] = call.similarity[call.edges[edge]];
      }
    }
    start[size] = edge;
    std::fill(owner, owner + size, NONE);
    std::fill(near.place, near.place + size, NONE);
    std::fill(near.distance, near.distance + size, std::numeric_limits<double>::infinity());
    std::fill(done, done + size, false);
  }

  double gain(int64_t edge) const { return double(value[edge]) - call.price[column[edge]]; }

  double best(int row) const {
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t edge = start[row]; edge < start[row + 1]; ++edge) most = std::max(most, gain(edge));
    return most;
  }

  // Rows keep the columns that they come with where none of their candidates is better now; returns how many are free.
  int keep() {
    int many = 0;
    for (int row = 0; row < size; ++row) {
      int64_t& own = call.permutation[row];
      if (own != NONE && best(row) <= call.profit[row] + 1e-13)
        owner[own] = row;
      else
        own = NONE, free[many++] = row;
    }
    return many;
  }

  // Each free row takes its best column, at the price at which the second is as good; who had it is free, and bids at
  // once if the price rose. Returns how many are free then.
  int bid(int many) {
    int remain = 0;
    int64_t steps = 0;
    for (int f = 0; f < many; ++f) {
      int row = free[f];
      while (row != NONE) {
        int64_t first = NONE;
        double most = -std::numeric_limits<double>::infinity(), second = most;
        for (int64_t edge = start[row]; edge < start[row + 1]; ++edge) {
          const double found = gain(edge);
          if (found > most)
            second = most, most = found, first = edge;
          else if (found > second)
            second = found;
        }
        if (second == -std::numeric_limits<double>::infinity()) {
          next[remain++] = row;
          break;
        }
        const int wanted = column[first], before = owner[wanted];
        if (before != NONE) {
          if (!(most > second)) {
            next[remain++] = row;
            break;
          }
          call.permutation[before] = NONE;
        }
        call.price[wanted] += most - second;
        owner[wanted] = row, call.permutation[row] = wanted, call.profit[row] = second;
        row = before;
        if (row != NONE && ++steps > 8 * int64_t(many)) {
          next[remain++] = row;
          break;
        }
      }
    }
    std::swap(free, next);
    return remain;
  }

  // Dijkstra's search from a free row to the nearest free column; false where there is none.
  bool augment(int root) {
    const double infinite = std::numeric_limits<double>::infinity();
    int row = root, end = NONE, reached = 0, settled = 0;
    double at = 0, nearest = infinite;
    call.profit[root] = best(root);
    for (;;) {
      const double from_row = at + call.profit[row];
      for (int64_t edge = start[row]; edge < start[row + 1]; ++edge) {
        const int to = column[edge];
        const double distance = std::max(at, from_row - gain(edge));
        if (distance >= nearest || distance >= near.distance[to] || done[to]) continue;
        if (near.distance[to] == infinite) touched[reached++] = to;
        near.distance[to] = distance, from[to] = row;
        if (owner[to] == NONE)
          nearest = distance, end = to;
        else
          near.raise(to);
      }
      if (near.count == 0 || near.distance[near.heap[0]] >= nearest) break;
      const int to = near.pop();
      done[to] = true, scanned[settled++] = to;
      at = near.distance[to], row = owner[to];
    }
    if (end != NONE) {
      call.profit[root] -= nearest;
      for (int s = 0; s < settled; ++s) {
        const double change = nearest - near.distance[scanned[s]];
        call.price[scanned[s]] += change, call.profit[owner[scanned[s]]] -= change;
      }
      for (int to = end; to != NONE;) {
        const int through = from[to];
        const int64_t before = call.permutation[through];
        owner[to] = through, call.permutation[through] = to;
        to = through == root ? NONE : int(before);
      }
    }
    for (int t = 0; t < reached; ++t) {
      near.distance[touched[t]] = infinite, near.place[touched[t]] = NONE, done[touched[t]] = false;
    }
    near.count = 0;
    return end != NONE;
  }
};

struct Reach {
  const ReachCall& call;

  int64_t forward(Room room) const {
    float* const sample = room.take<float>(call.rank);
    if (room.base == nullptr) return room.used;
    int64_t count = 0;
    for (int64_t row = 0; row < call.size; ++row) {
      const float* const values = call.similarity + row * call.size;
      float least;
      if (call.rank > 0) {
        least = sampled_least(values, sample);
      } else {
        least = call.least[row];
      }
      for (int64_t begin = 0; begin < call.size; begin += SEEN) {
        const int many = int(smaller(SEEN, call.size - begin));
        int any = 0;
        for (int i = 0; i < many; ++i) any |= values[begin + i] - call.price[begin + i] >= least;
        if (!any) continue;
        if (count > call.capacity) return full();
        for (int i = 0; i < many; ++i) {  // without a branch: which ones reach it cannot be foretold
          call.found[count] = row * call.size + begin + i;
          count += values[begin + i] - call.price[begin + i] >= least;
        }
      }
    }
    *call.count = count;
    return 0;
  }

  // The rank-th largest of one column in `every`, by a sorted list of as many.
  float sampled_least(const float* values, float* list) const {
    const int64_t last = call.rank - 1;
    std::fill(list, list + call.rank, -std::numeric_limits<float>::infinity());
    for (int64_t column = 0; column < call.size; column += call.every) {
      const float gain = values[column] - call.price[column];
      if (!(gain > list[last])) continue;
      int64_t at = last;
      for (; at > 0 && list[at - 1] < gain; --at) list[at] = list[at - 1];
      list[at] = gain;
    }
    return list[last];
  }

  int64_t full() const {
    *call.count = call.capacity + 1;
    return 0;
  }
};

}  // namespace

// Both compute it and return 0; without a workspace, the bytes that they need.
extern "C" __attribute__((visibility("default"))) int64_t moebed_assign(const AssignCall* call, int64_t) {
  return Assignment{*call}.forward(Room{call->workspace});
}

extern "C" __attribute__((visibility("default"))) int64_t moebed_reach(const ReachCall* call, int64_t) {
  return Reach{*call}.forward(Room{call->workspace});
}

}  // namespace moebed
