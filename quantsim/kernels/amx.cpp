// Products of integers of up to 16 bits on AMX tiles, mapped back to float32 before they leave the cache.
//
// A mantissa of 9 to 16 bits is two digits, m = 256 * high + low, high signed and low unsigned: AMX multiplies either kind by either.
// A step multiplies two tiles of the left operand by two of the right: two digits of 16 rows (or columns), or one digit of 32.

#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t IN_CACHE = 1 << 20;  // bytes of the right operand that are gone through at a time

struct Output {
  float *out;  // [n, m]
  int64_t n, m, exponent;
  const int32_t *row_exponents, *column_exponents;  // [n] and [m], beside that of all; null: none
  const float *bias;                                // [m], or null
};

// 16 x 16 numbers to their place: sum of products[i] << shifts[i], exact in 64 bits, rounded to float32 once, scaled by powers of two, the bias added
template <int COUNT>
void leave(const Output &to, int64_t row, int64_t column, const int32_t *const (&products)[COUNT], const int (&shifts)[COUNT]) {
  const int64_t rows = std::min(SIDE, to.n - row), columns = std::min(SIDE, to.m - column);
  if (columns <= 0) return;
  const auto mask = static_cast<__mmask16>((1u << columns) - 1);
  const __m512i of_columns = to.column_exponents ? _mm512_maskz_loadu_epi32(mask, to.column_exponents + column) : __m512i();
  const __m512i exponents = _mm512_add_epi32(of_columns, _mm512_set1_epi32(static_cast<int32_t>(to.exponent)));
  const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(mask, to.bias + column) : __m512();
  for (int64_t i = 0; i < rows; ++i) {
    __m512 y;
    if constexpr (COUNT == 1) {
      y = _mm512_cvtepi32_ps(_mm512_load_si512(products[0] + i * SIDE));
    } else {
      __m256 halves[2];
      for (int half = 0; half < 2; ++half) {
        __m512i sum = _mm512_setzero_si512();
        for (int p = 0; p < COUNT; ++p) {
          const auto *at = reinterpret_cast<const __m256i *>(products[p] + i * SIDE + 8 * half);
          sum = _mm512_add_epi64(sum, _mm512_slli_epi64(_mm512_cvtepi32_epi64(_mm256_load_si256(at)), shifts[p]));
        }
        halves[half] = _mm512_cvtepi64_ps(sum);
      }
      y = _mm512_insertf32x8(_mm512_castps256_ps512(halves[0]), halves[1], 1);
    }
    const __m512i all = _mm512_add_epi32(exponents, _mm512_set1_epi32(to.row_exponents ? to.row_exponents[row + i] : 0));
    y = _mm512_scalef_ps(y, _mm512_cvtepi32_ps(all));
    if (to.bias) y = _mm512_add_ps(y, bias);
    _mm512_mask_storeu_ps(to.out + (row + i) * to.m + column, mask, y);
  }
}

void block(const Matrix &a, const Matrix &b, const Output &to, int64_t i, int64_t j, const uint8_t *left, const uint8_t *right) {
  alignas(64) int32_t memory[4 * 256];
  int32_t *const sums[2][2] = {{memory, memory + 256}, {memory + 512, memory + 768}};
  const int32_t *const s[4] = {memory, memory + 256, memory + 512, memory + 768};
  const int64_t steps = a.steps();
  if (a.bytes == 2 && b.bytes == 2) {
    multiply<false, true, false, true>(left, right, steps, sums, DEPTH);
    leave<4>(to, i * SIDE, j * SIDE, {s[0], s[1], s[2], s[3]}, {16, 8, 8, 0});
  } else if (a.bytes == 2) {
    multiply<false, true, false, false>(left, right, steps, sums, DEPTH);
    for (int64_t c = 0; c < 2; ++c) leave<2>(to, i * SIDE, (2 * j + c) * SIDE, {s[c], s[2 + c]}, {8, 0});
  } else if (b.bytes == 2) {
    multiply<false, false, false, true>(left, right, steps, sums, DEPTH);
    for (int64_t r = 0; r < 2; ++r) leave<2>(to, (2 * i + r) * SIDE, j * SIDE, {s[2 * r], s[2 * r + 1]}, {8, 0});
  } else {
    multiply<false, false, false, false>(left, right, steps, sums, DEPTH);
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t c = 0; c < 2; ++c) leave<1>(to, (2 * i + r) * SIDE, (2 * j + c) * SIDE, {s[2 * r + c]}, {0});
  }
}

}  // namespace

extern "C" {

// The kernel of the system lends tiles to a process that asks (ARCH_REQ_XCOMP_PERM for XTILEDATA); 0 where it does.
int64_t tiles_are_lent() { return syscall(SYS_arch_prctl, 0x1023, 18); }

struct Product {
  Matrix a, b;
  Output to;
};

// out = float(a @ b) * factors + bias; 0, or 1 where there is no memory
int32_t product(const Product *p) {
  const Matrix &a = p->a, &b = p->b;
  const int64_t row = a.steps() * STEP, left_pairs = a.pairs(), right_pairs = b.pairs();
  uint8_t *const left = scratch.of((left_pairs + right_pairs) * row), *const right = left + left_pairs * row;
  if (!left) return 1;
  const int64_t width = std::max<int64_t>(1, IN_CACHE / row);
#pragma omp parallel
  {
    static const Config config;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < left_pairs; ++i) pack_pair(a, true, i, left + i * row);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < right_pairs; ++j) pack_pair(b, false, j, right + j * row);
    _tile_loadconfig(&config);
    for (int64_t first = 0; first < right_pairs; first += width) {
      const int64_t last = std::min(right_pairs, first + width);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < left_pairs; ++i)
        for (int64_t j = first; j < last; ++j) block(a, b, p->to, i, j, left + i * row, right + j * row);
    }
    _tile_release();
  }
  scratch.give_back();
  return 0;
}
}
