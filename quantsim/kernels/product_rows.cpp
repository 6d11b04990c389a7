// Products of 8-bit integers on AMX tiles, and a program over the rows of their sums before these leave the cache.

#include "rows.h"
#include "tiles.h"

#include <omp.h>

extern "C" {

// A batch of products a[i] @ b[i], whose sums are an operand of a program over all of their rows.
struct ProductRows {
  Matrix a, b;  // of a product; a of int8 or uint8, b of int8
  int64_t batch;
  const int64_t *a_at, *b_at;  // where the matrices of each begin
  int32_t a_unsigned, place;   // place: of the sums among the program's operands
  Program rows;
};

int32_t product_rows(const ProductRows *p);
}

namespace {

constexpr int64_t IN_CACHE = 1 << 20;  // bytes of a band of rows: its sums, and what they are summed of
constexpr int64_t HIGH = 2 * SIDE;     // rows of a pair of tiles

// What a thread works in: a band of rows of the left operand, packed, their sums, and the program's stack.
struct Band {
  int64_t pairs;  // of tiles, at most
  int64_t row;    // int32 from one row of sums to the next: no power of two, for rows would take each other's place in the cache
  int64_t left_bytes, sums_bytes, stack_bytes;

  Band(const ProductRows &p, int64_t most) : row(p.b.pairs() * HIGH + SIDE) {
    const int64_t of_sums = HIGH * row * static_cast<int64_t>(sizeof(int32_t)), of_left = p.a.steps() * STEP;
    pairs = std::max<int64_t>(1, std::min(most, IN_CACHE / (of_sums + of_left)));
    left_bytes = pairs * of_left;
    sums_bytes = pairs * of_sums;
    stack_bytes = parts(p.rows.depth * p.rows.width * static_cast<int64_t>(sizeof(int32_t)), DEPTH) * DEPTH;
  }
  int64_t bytes() const { return left_bytes + sums_bytes + stack_bytes; }
};

thread_local Scratch own;

// pairs of rows `first` to `last` of product i: packed, multiplied, and what the program makes of them written
void band(const ProductRows &p, int64_t i, int64_t first, int64_t last, const uint8_t *right, const Band &size, uint8_t *memory) {
  const int64_t steps = p.a.steps(), bytes = steps * STEP, beside = size.row * static_cast<int64_t>(sizeof(int32_t));
  uint8_t *const left = memory;
  auto *const sums = reinterpret_cast<int32_t *>(memory + size.left_bytes);
  auto *const stack = reinterpret_cast<int32_t *>(memory + size.left_bytes + size.sums_bytes);
  Matrix a = p.a;
  a.m = static_cast<const int8_t *>(a.m) + p.a_at[i];
  for (int64_t r = first; r < last; ++r) pack_pair(a, true, r, left + (r - first) * bytes);
  for (int64_t c = 0; c < p.b.pairs(); ++c)
    for (int64_t r = 0; r < last - first; ++r) {
      int32_t *const to = sums + r * HIGH * size.row + c * HIGH;
      int32_t *const tiles[2][2] = {{to, to + SIDE}, {to + SIDE * size.row, to + SIDE * size.row + SIDE}};
      if (p.a_unsigned)
        multiply<true, true, false, false>(left + r * bytes, right + c * bytes, steps, tiles, beside);
      else
        multiply<false, false, false, false>(left + r * bytes, right + c * bytes, steps, tiles, beside);
    }
  const int64_t end = std::min(last * HIGH, a.count);
  for (int64_t row = first * HIGH; row < end; ++row) run(p.rows, i * a.count + row, stack, p.place, sums + (row - first * HIGH) * size.row);
}

void pack_right(const ProductRows &p, int64_t i, int64_t pair, uint8_t *right) {
  Matrix b = p.b;
  b.m = static_cast<const int8_t *>(b.m) + p.b_at[i];
  pack_pair(b, false, pair, right + pair * b.steps() * STEP);
}

}  // namespace

// One product is shared out by bands of rows, a batch by products. 0, or 1 where there is no memory.
int32_t product_rows(const ProductRows *given) {
  const ProductRows &p = *given;
  const bool alone = p.batch == 1;
  const int64_t right_bytes = p.b.pairs() * p.b.steps() * STEP, pairs = p.a.pairs();
  uint8_t *const shared = scratch.of(alone ? right_bytes : 0);
  int32_t failed = alone && !shared;
#pragma omp parallel
  {
    static const Config config;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const Band size(p, alone ? parts(pairs, threads) : pairs);
    uint8_t *const memory = own.of(size.bytes() + (alone ? 0 : right_bytes));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp barrier
    if (!failed) {
      _tile_loadconfig(&config);
      if (alone) {
#pragma omp for schedule(static)
        for (int64_t j = 0; j < p.b.pairs(); ++j) pack_right(p, 0, j, shared);
        const int64_t end = pairs * (thread + 1) / threads;
        for (int64_t first = pairs * thread / threads; first < end; first += size.pairs)
          band(p, 0, first, std::min(end, first + size.pairs), shared, size, memory);
      } else {
        uint8_t *const right = memory + size.bytes();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.batch; ++i) {
          for (int64_t j = 0; j < p.b.pairs(); ++j) pack_right(p, i, j, right);
          for (int64_t first = 0; first < pairs; first += size.pairs) band(p, i, first, std::min(pairs, first + size.pairs), right, size, memory);
        }
      }
      _tile_release();
    }
    own.give_back();
  }
  scratch.give_back();
  return failed;
}
