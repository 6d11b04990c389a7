// Products of integers of up to 16 bits on AMX tiles, mapped back to float32 before they leave the cache.
//
// A mantissa of 9 to 16 bits is two digits, m = 256 * high + low, high signed and low unsigned: AMX multiplies either kind by either.
// A step multiplies two tiles of the left operand by two of the right: two digits of 16 rows (or columns), or one digit of 32.

#if !defined(__AMX_INT8__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "products on tiles need AMX and AVX-512"
#endif

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 64, TILE = SIDE * DEPTH, STEP = 2 * TILE;  // rows or columns, bytes of k, bytes of a tile, of a pair
constexpr int64_t IN_CACHE = 1 << 20;                                          // bytes of the right operand that are gone through at a time

int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// an operand: `count` rows (of the left) or columns (of the right), k numbers in each
struct Operand {
  const void *m;
  int64_t count, k, row;  // row: from one row of the memory to the next
  int32_t bytes, k_inside;  // 1: int8, 2: int16; whether k is the axis whose numbers lie beside each other

  int64_t pairs() const { return up(count, bytes == 2 ? SIDE : 2 * SIDE); }
  int64_t steps() const { return std::max<int64_t>(1, up(k, DEPTH)); }  // of no numbers: one of zeros
};

// ---- packing: a pair of tiles is [2][16][64 bytes of k] on the left, [2][16 groups of k][16 columns][4 of k] on the right ----

// 16 x 16 numbers of 32 bits, rows to columns, in place
void transpose(uint8_t *tile) {
  __m512i r[SIDE], t[SIDE];
  for (int i = 0; i < SIDE; ++i) r[i] = _mm512_load_si512(tile + i * DEPTH);
  for (int i = 0; i < SIDE; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < SIDE; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  // r[4 * i + j] holds, in its four lanes l, column 4 * l + j of rows 4 * i to 4 * i + 3
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_store_si512(tile + j * DEPTH, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_store_si512(tile + (4 + j) * DEPTH, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_store_si512(tile + (8 + j) * DEPTH, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_store_si512(tile + (12 + j) * DEPTH, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// rows `first` to `first + 16`, `DEPTH` numbers of k from `from` on, k inside: as [16][64]
void digits_of_rows(const Operand &x, int64_t first, int64_t from, uint8_t *high, uint8_t *low) {
  const int64_t left = std::min(DEPTH, x.k - from);
  const __mmask64 all = left == DEPTH ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
  for (int64_t i = 0; i < SIDE; ++i) {
    const bool there = first + i < x.count;
    const int64_t at = (first + i) * x.row + from;
    if (x.bytes == 1) {
      _mm512_store_si512(high + i * DEPTH, there ? _mm512_maskz_loadu_epi8(all, static_cast<const int8_t *>(x.m) + at) : __m512i());
      continue;
    }
    const auto *m = static_cast<const int16_t *>(x.m) + at;
    for (int half = 0; half < 2; ++half) {
      const __m512i y = there ? _mm512_maskz_loadu_epi16(__mmask32(all >> (32 * half)), m + 32 * half) : __m512i();
      _mm256_store_si256(reinterpret_cast<__m256i *>(low + i * DEPTH + 32 * half), _mm512_cvtepi16_epi8(y));
      _mm256_store_si256(reinterpret_cast<__m256i *>(high + i * DEPTH + 32 * half), _mm512_cvtepi16_epi8(_mm512_srai_epi16(y, 8)));
    }
  }
}

// [4 of k][16] bytes -> [16][4 of k]
void interleave(const __m128i *rows, uint8_t *to) {
  const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
  const __m128i c = _mm_unpacklo_epi8(rows[2], rows[3]), d = _mm_unpackhi_epi8(rows[2], rows[3]);
  auto *out = reinterpret_cast<__m128i *>(to);
  _mm_store_si128(out, _mm_unpacklo_epi16(a, c));
  _mm_store_si128(out + 1, _mm_unpackhi_epi16(a, c));
  _mm_store_si128(out + 2, _mm_unpacklo_epi16(b, d));
  _mm_store_si128(out + 3, _mm_unpackhi_epi16(b, d));
}

// the same numbers, k outside: as [16 groups of k][16][4 of k]
void digits_of_columns(const Operand &x, int64_t first, int64_t from, uint8_t *high, uint8_t *low) {
  const int64_t left = std::min(SIDE, x.count - first);
  const __mmask16 all = left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
  for (int64_t group = 0; group < SIDE; ++group) {
    __m128i highs[4], lows[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t k = from + 4 * group + i, at = k * x.row + first;
      const __mmask16 mask = k < x.k ? all : 0;
      if (x.bytes == 1) {
        highs[i] = mask ? _mm_maskz_loadu_epi8(mask, static_cast<const int8_t *>(x.m) + at) : __m128i();
        continue;
      }
      const __m256i y = mask ? _mm256_maskz_loadu_epi16(mask, static_cast<const int16_t *>(x.m) + at) : __m256i();
      lows[i] = _mm256_cvtepi16_epi8(y);
      highs[i] = _mm256_cvtepi16_epi8(_mm256_srai_epi16(y, 8));
    }
    interleave(highs, high + group * DEPTH);
    if (x.bytes == 2) interleave(lows, low + group * DEPTH);
  }
}

void pack(const Operand &x, bool left, uint8_t *to) {
  const int64_t steps = x.steps(), pairs = x.pairs();
#pragma omp for schedule(static)
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t step = 0; step < steps; ++step) {
      uint8_t *tiles = to + (pair * steps + step) * STEP;
      const auto digits = x.k_inside ? digits_of_rows : digits_of_columns;
      const int64_t first = pair * (x.bytes == 2 ? SIDE : 2 * SIDE);
      digits(x, first, step * DEPTH, tiles, tiles + TILE);
      if (x.bytes == 1) digits(x, first + SIDE, step * DEPTH, tiles + TILE, nullptr);
      if (x.k_inside != left)
        for (int i = 0; i < 2; ++i) transpose(tiles + i * TILE);
    }
}

// ---- products ----

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {DEPTH, DEPTH, DEPTH, DEPTH, DEPTH, DEPTH, DEPTH, DEPTH};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

// sums[2][2][16][16] of a pair on the left and a pair on the right; the second tile of a pair of digits is unsigned
template <bool LEFT_DIGITS, bool RIGHT_DIGITS>
void multiply(const uint8_t *left, const uint8_t *right, int64_t steps, int32_t *sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, left += STEP, right += STEP) {
    _tile_loadd(4, left, DEPTH);
    _tile_loadd(6, right, DEPTH);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, right + TILE, DEPTH);
    if constexpr (RIGHT_DIGITS)
      _tile_dpbsud(1, 4, 7);
    else
      _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, left + TILE, DEPTH);
    if constexpr (LEFT_DIGITS) {
      _tile_dpbusd(2, 5, 6);
      if constexpr (RIGHT_DIGITS)
        _tile_dpbuud(3, 5, 7);
      else
        _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbssd(2, 5, 6);
      if constexpr (RIGHT_DIGITS)
        _tile_dpbsud(3, 5, 7);
      else
        _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, DEPTH);
  _tile_stored(1, sums + 256, DEPTH);
  _tile_stored(2, sums + 512, DEPTH);
  _tile_stored(3, sums + 768, DEPTH);
}

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

void block(const Operand &a, const Operand &b, const Output &to, int64_t i, int64_t j, const uint8_t *left, const uint8_t *right) {
  alignas(64) int32_t sums[4 * 256];
  const int32_t *s[4] = {sums, sums + 256, sums + 512, sums + 768};
  const int64_t steps = a.steps();
  if (a.bytes == 2 && b.bytes == 2) {
    multiply<true, true>(left, right, steps, sums);
    leave<4>(to, i * SIDE, j * SIDE, {s[0], s[1], s[2], s[3]}, {16, 8, 8, 0});
  } else if (a.bytes == 2) {
    multiply<true, false>(left, right, steps, sums);
    for (int64_t c = 0; c < 2; ++c) leave<2>(to, i * SIDE, (2 * j + c) * SIDE, {s[c], s[2 + c]}, {8, 0});
  } else if (b.bytes == 2) {
    multiply<false, true>(left, right, steps, sums);
    for (int64_t r = 0; r < 2; ++r) leave<2>(to, (2 * i + r) * SIDE, j * SIDE, {s[2 * r], s[2 * r + 1]}, {8, 0});
  } else {
    multiply<false, false>(left, right, steps, sums);
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t c = 0; c < 2; ++c) leave<1>(to, (2 * i + r) * SIDE, (2 * j + c) * SIDE, {s[2 * r + c]}, {0});
  }
}

constexpr int64_t MOST_KEPT = 64 << 20;

// memory of a thread that calls, kept from call to call up to a size: pages that are new cost more than the packing
struct Scratch {
  uint8_t *at = nullptr;
  int64_t size = 0;

  uint8_t *of(int64_t bytes) {
    if (bytes > size) {
      std::free(at);
      at = static_cast<uint8_t *>(std::aligned_alloc(4096, up(bytes, 4096) * 4096));
      size = at ? up(bytes, 4096) * 4096 : 0;
    }
    return at;
  }
  void give_back() {
    if (size <= MOST_KEPT) return;
    std::free(at);
    at = nullptr;
    size = 0;
  }
  ~Scratch() { std::free(at); }
};
thread_local Scratch scratch;

}  // namespace

extern "C" {

// The kernel of the system lends tiles to a process that asks (ARCH_REQ_XCOMP_PERM for XTILEDATA); 0 where it does.
int64_t tiles_are_lent() { return syscall(SYS_arch_prctl, 0x1023, 18); }

struct Product {
  Operand a, b;
  Output to;
};

// out = float(a @ b) * factors + bias; 0, or 1 where there is no memory
int32_t product(const Product *p) {
  const Operand &a = p->a, &b = p->b;
  const int64_t row = a.steps() * STEP, left_pairs = a.pairs(), right_pairs = b.pairs();
  uint8_t *const left = scratch.of((left_pairs + right_pairs) * row), *const right = left + left_pairs * row;
  if (!left) return 1;
  const int64_t width = std::max<int64_t>(1, IN_CACHE / row);
#pragma omp parallel
  {
    static const Config config;
    pack(a, true, left);
    pack(b, false, right);  // a barrier is at the end of each
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
