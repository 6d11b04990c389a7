// AMX tiles of 8-bit numbers: how matrices are packed for them, and the product of two pairs of tiles.

#pragma once

#if !defined(__AMX_INT8__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "products on tiles need AMX and AVX-512"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 64, TILE = SIDE * DEPTH, STEP = 2 * TILE;  // rows or columns, bytes of k, bytes of a tile, of a pair

inline int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

// a matrix of a product: `count` rows (of the left) or columns (of the right), k numbers in each
struct Matrix {
  const void *m;
  int64_t count, k, row;  // row: from one row of the memory to the next
  int32_t bytes, k_inside;  // 1: int8, 2: int16; whether k is the axis whose numbers lie beside each other

  int64_t pairs() const { return parts(count, bytes == 2 ? SIDE : 2 * SIDE); }
  int64_t steps() const { return std::max<int64_t>(1, parts(k, DEPTH)); }  // of no numbers: one of zeros
};

// ---- packing: a pair of tiles is [2][16][64 bytes of k] on the left, [2][16 groups of k][16 columns][4 of k] on the right ----

// 16 x 16 numbers of 32 bits, rows to columns, in place
inline void transpose(uint8_t *tile) {
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
inline void digits_of_rows(const Matrix &x, int64_t first, int64_t from, uint8_t *high, uint8_t *low) {
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
inline void interleave(const __m128i *rows, uint8_t *to) {
  const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
  const __m128i c = _mm_unpacklo_epi8(rows[2], rows[3]), d = _mm_unpackhi_epi8(rows[2], rows[3]);
  auto *out = reinterpret_cast<__m128i *>(to);
  _mm_store_si128(out, _mm_unpacklo_epi16(a, c));
  _mm_store_si128(out + 1, _mm_unpackhi_epi16(a, c));
  _mm_store_si128(out + 2, _mm_unpacklo_epi16(b, d));
  _mm_store_si128(out + 3, _mm_unpackhi_epi16(b, d));
}

// the same numbers, k outside: as [16 groups of k][16][4 of k]
inline void digits_of_columns(const Matrix &x, int64_t first, int64_t from, uint8_t *high, uint8_t *low) {
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

// one pair of tiles after the other along k
inline void pack_pair(const Matrix &x, bool left, int64_t pair, uint8_t *to) {
  const auto digits = x.k_inside ? digits_of_rows : digits_of_columns;
  const int64_t first = pair * (x.bytes == 2 ? SIDE : 2 * SIDE);
  for (int64_t step = 0; step < x.steps(); ++step, to += STEP) {
    digits(x, first, step * DEPTH, to, to + TILE);
    if (x.bytes == 1) digits(x, first + SIDE, step * DEPTH, to + TILE, nullptr);
    if (x.k_inside != left)
      for (int i = 0; i < 2; ++i) transpose(to + i * TILE);
  }
}

// ---- products ----

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {DEPTH, DEPTH, DEPTH, DEPTH, DEPTH, DEPTH, DEPTH, DEPTH};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

// Tiles have to be named by literals.
#define MULTIPLY_TILES(sum, left, right, left_unsigned, right_unsigned)  \
  if constexpr ((left_unsigned) && (right_unsigned))                     \
    _tile_dpbuud(sum, left, right);                                      \
  else if constexpr (left_unsigned)                                      \
    _tile_dpbusd(sum, left, right);                                      \
  else if constexpr (right_unsigned)                                     \
    _tile_dpbsud(sum, left, right);                                      \
  else                                                                   \
    _tile_dpbssd(sum, left, right)

// sums of a pair on the left and a pair on the right: tile (i, j) at sums[i][j], its rows `row` bytes from each other
template <bool LEFT_FIRST, bool LEFT_SECOND, bool RIGHT_FIRST, bool RIGHT_SECOND>
void multiply(const uint8_t *left, const uint8_t *right, int64_t steps, int32_t *const (&sums)[2][2], int64_t row) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, left += STEP, right += STEP) {
    _tile_loadd(4, left, DEPTH);
    _tile_loadd(6, right, DEPTH);
    MULTIPLY_TILES(0, 4, 6, LEFT_FIRST, RIGHT_FIRST);
    _tile_loadd(7, right + TILE, DEPTH);
    MULTIPLY_TILES(1, 4, 7, LEFT_FIRST, RIGHT_SECOND);
    _tile_loadd(5, left + TILE, DEPTH);
    MULTIPLY_TILES(2, 5, 6, LEFT_SECOND, RIGHT_FIRST);
    MULTIPLY_TILES(3, 5, 7, LEFT_SECOND, RIGHT_SECOND);
  }
  _tile_stored(0, sums[0][0], row);
  _tile_stored(1, sums[0][1], row);
  _tile_stored(2, sums[1][0], row);
  _tile_stored(3, sums[1][1], row);
}

#undef MULTIPLY_TILES

constexpr int64_t MOST_KEPT = 64 << 20;

// memory of a thread that calls, kept from call to call up to a size: pages that are new cost more than the packing
struct Scratch {
  uint8_t *at = nullptr;
  int64_t size = 0;

  uint8_t *of(int64_t bytes) {
    if (bytes > size) {
      std::free(at);
      at = static_cast<uint8_t *>(std::aligned_alloc(4096, parts(bytes, 4096) * 4096));
      size = at ? parts(bytes, 4096) * 4096 : 0;
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
