// Products of uint8 and int8 on AVX-512 VNNI, a block of ROWS rows at a time, for the kernels beside this file.

#pragma once

#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "products on integers need AVX-512 with VNNI"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16, ROWS = 8, PART = 4;  // 32-bit numbers of a register; rows of a block; bytes that one instruction sums

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[ROWS, n] = a[ROWS, 4 * parts] (uint8) @ b[4 * parts, n] (int8, as [parts, n, 4]); n is a multiple of LANES
template <int WIDTH>
inline void tile(const uint8_t *a, int64_t a_row, const int8_t *b, int64_t n, int64_t parts, int32_t *c) {
  __m512i sum[ROWS / 2][WIDTH];
  for (int half = 0; half < ROWS; half += ROWS / 2) {
    for (auto &row : sum)
      for (auto &x : row) x = _mm512_setzero_si512();
    for (int64_t part = 0; part < parts; ++part) {
      __m512i right[WIDTH];
      for (int j = 0; j < WIDTH; ++j) right[j] = _mm512_loadu_si512(b + (part * n + j * LANES) * PART);
      for (int i = 0; i < ROWS / 2; ++i) {
        int32_t four;
        std::memcpy(&four, a + (half + i) * a_row + part * PART, sizeof four);
        const __m512i left = _mm512_set1_epi32(four);
        for (int j = 0; j < WIDTH; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], left, right[j]);
      }
    }
    for (int i = 0; i < ROWS / 2; ++i)
      for (int j = 0; j < WIDTH; ++j) _mm512_storeu_si512(c + (half + i) * n + j * LANES, sum[i][j]);
  }
}

inline void product(const uint8_t *a, int64_t a_row, const int8_t *b, int64_t n, int64_t parts, int32_t *c) {
  int64_t j = 0;
  for (; j + 4 * LANES <= n; j += 4 * LANES) tile<4>(a, a_row, b + j * PART, n, parts, c + j);
  for (; j < n; j += LANES) tile<1>(a, a_row, b + j * PART, n, parts, c + j);
}

// [key, depth] with depth contiguous -> [depth / 4, keys, 4], each byte flipped; what is beyond either end is 0
inline void pack_rows(const uint8_t *x, int64_t row, int64_t count, int64_t depth, int64_t padded, uint8_t flip, int8_t *to) {
  const uint32_t flips = 0x01010101u * flip;
  auto *packed = reinterpret_cast<uint32_t *>(to);
  std::fill(packed, packed + up(depth, PART) / PART * padded, 0u);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t part = 0; part < depth / PART; ++part) {
      uint32_t four;
      std::memcpy(&four, x + j * row + part * PART, sizeof four);
      packed[part * padded + j] = four ^ flips;
    }
    for (int64_t d = depth / PART * PART; d < depth; ++d)
      to[(d / PART * padded + j) * PART + d % PART] = static_cast<int8_t>(x[j * row + d] ^ flip);
  }
}

// [key, column] with columns contiguous -> [keys / 4, columns, 4], each byte flipped; what is beyond either end is 0
inline void pack_columns(const uint8_t *x, int64_t row, int64_t keys, int64_t columns, int64_t padded, uint8_t flip, int8_t *to) {
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (int64_t part = 0; part < up(keys, PART) / PART; ++part)
    for (int64_t d = 0; d < padded; d += LANES) {
      const auto real = static_cast<__mmask16>(d + LANES <= columns ? 0xFFFF : (1u << (columns - d)) - 1);
      __m128i four[PART];
      for (int i = 0; i < PART; ++i) {
        const int64_t key = part * PART + i;
        four[i] = key < keys ? _mm_maskz_loadu_epi8(real, x + key * row + d) : _mm_setzero_si128();
        if (key < keys) four[i] = _mm_maskz_mov_epi8(real, _mm_xor_si128(four[i], flips));
      }
      const __m128i low01 = _mm_unpacklo_epi8(four[0], four[1]), high01 = _mm_unpackhi_epi8(four[0], four[1]);
      const __m128i low23 = _mm_unpacklo_epi8(four[2], four[3]), high23 = _mm_unpackhi_epi8(four[2], four[3]);
      auto *out = reinterpret_cast<__m128i *>(to + (part * padded + d) * PART);
      _mm_storeu_si128(out + 0, _mm_unpacklo_epi16(low01, low23));
      _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low01, low23));
      _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high01, high23));
      _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high01, high23));
    }
}

// sums[n] = factor * the sum of each column of a packed matrix
inline void column_sums(const int8_t *packed, int64_t parts, int64_t n, int32_t factor, int32_t *sums) {
  const __m512i ones = _mm512_set1_epi32(0x01010101), times = _mm512_set1_epi32(factor);
  for (int64_t j = 0; j < n; j += LANES) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t part = 0; part < parts; ++part) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(packed + (part * n + j) * PART));
    _mm512_storeu_si512(sums + j, _mm512_mullo_epi32(sum, times));
  }
}

}  // namespace
