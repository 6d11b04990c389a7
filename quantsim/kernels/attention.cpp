// Attention on 8-bit integers: scores, mask, softmax and context of one head at a time, for CPUs with AVX-512 VNNI.
//
//   s = quantize_0((q - zq) @ (k - zk)^T * (scale_q * scale_k))     int8 products, summed in int32
//   s = quantize_2(quantize_1(s * factor) + mask)                   each quantizer may be off
//   p = integers of softmax(s)                                      of quantized s: exp from a table, its sum in float64
//   y = integers of (p - zp) @ (v - zv) * (scale_p * scale_v)       int8 products, summed in int32
//
// Every value is the simulation's to the bit: the same float32 operations in the same order, division where that divides, and sums in
// which the order doesn't show. Where quantize_2 is off, softmax is float32 with an exp of this file, and may land a step elsewhere.
// A block of ROWS queries is kept in the cache from its first product to its last.

#include "vnni.h"

#include <vector>

namespace {

// x -> clamp(round(x / scale), low, high), in steps; low and high count from the zero point
struct Grid {
  int32_t on;
  float scale, low, high;
};

struct Strides {
  int64_t batch, head, row;
};

}  // namespace

extern "C" {

struct Attention {
  const uint8_t *q, *k, *v;  // [batch, heads, rows, depth], depth contiguous
  Strides q_at, k_at, v_at;
  int32_t q_flip, k_flip, v_flip;  // 0x80 turns int8 into uint8 and back, and moves the zero point by 128
  int32_t q_zero, k_zero, v_zero;  // after the flip: q is uint8, k and v are int8
  int64_t batch, heads, queries, keys, depth;
  float score_scale, factor;  // scale_q * scale_k
  int32_t divides;  // by the factor, in place of multiplying
  Grid scores, scaled, masked;
  const float *mask;  // null: none
  Strides mask_at;
  int64_t mask_key;  // its stride over keys
  const float *exps;  // exp(-i * scale of quantize_2), i in 0 ... 255; null where that is off
  Grid probabilities;
  int32_t p_zero;
  float context_scale;  // scale_p * scale_v
  Grid context;
  int32_t context_zero;
  uint8_t *out;  // [batch, queries, heads, depth]
};

void attention(const Attention *a);
}

namespace {

struct Quantizer {
  __m512 scale, low, high;
  bool on;
  explicit Quantizer(const Grid &grid)
      : scale(_mm512_set1_ps(grid.scale)), low(_mm512_set1_ps(grid.low)), high(_mm512_set1_ps(grid.high)), on(grid.on != 0) {}
  __m512 steps(__m512 x) const {
    const __m512 rounded = _mm512_roundscale_ps(_mm512_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_min_ps(_mm512_max_ps(rounded, low), high);
  }
  __m512 operator()(__m512 x) const { return on ? _mm512_mul_ps(steps(x), scale) : x; }
};

// exp(x) for x <= 0: 2^n * exp(r), |r| <= ln(2) / 2, by its Taylor polynomial of degree 7
inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 720));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// What one thread needs for one head.
struct Buffers {
  int64_t keys, depth;                // padded: keys to LANES, depth is a multiple of it
  std::vector<int8_t> k, v;           // [depth / 4, keys, 4] and [keys / 4, depth, 4]
  std::vector<int32_t> k_sums;        // what the query's zero point takes from the scores of each key
  std::vector<int32_t> v_sums;        // what the probabilities' takes from each channel of the context
  std::vector<uint8_t> q, p;          // [ROWS, depth] and [ROWS, keys]
  std::vector<int32_t> sums;          // [ROWS, max(keys, depth)]
  std::vector<float> scores;          // [keys]
  explicit Buffers(const Attention &a)
      : keys(up(a.keys, LANES)), depth(a.depth), k(depth * keys), v(keys * depth), k_sums(keys), v_sums(depth), q(ROWS * depth),
        p(ROWS * keys), sums(ROWS * std::max(keys, depth)), scores(keys) {}
};

void pack_keys(const Attention &a, const uint8_t *k, Buffers &to) {
  pack_rows(k, a.k_at.row, a.keys, a.depth, to.keys, static_cast<uint8_t>(a.k_flip), to.k.data());
  column_sums(to.k.data(), a.depth / PART, to.keys, -a.q_zero, to.k_sums.data());
  const int32_t whole = static_cast<int32_t>(a.depth) * a.q_zero * a.k_zero;
  for (int64_t j = 0; j < to.keys; ++j) to.k_sums[j] += whole;
}

void pack_values(const Attention &a, const uint8_t *v, Buffers &to) {
  pack_columns(v, a.v_at.row, a.keys, a.depth, a.depth, static_cast<uint8_t>(a.v_flip), to.v.data());
  std::fill(to.v_sums.begin(), to.v_sums.end(), 0);
  if (a.p_zero == 0) return;
  column_sums(to.v.data(), up(a.keys, PART) / PART, a.depth, -a.p_zero, to.v_sums.data());
  const int32_t whole = static_cast<int32_t>(a.keys) * a.p_zero * a.v_zero;
  for (int64_t d = 0; d < a.depth; ++d) to.v_sums[d] += whole;
}

int32_t sum_of(const uint8_t *x, int64_t n) {
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(x + i), _mm512_set1_epi8(1));
  int32_t total = _mm512_reduce_add_epi32(sum);
  for (; i < n; ++i) total += x[i];
  return total;
}

// The probabilities of one query, as uint8; returns their sum.
int32_t softmax_row(const Attention &a, Buffers &to, const int32_t *sums, int32_t row_sum, const float *mask, uint8_t *p) {
  const Quantizer scores(a.scores), scaled(a.scaled), masked(a.masked), probabilities(a.probabilities);
  const __m512 scale = _mm512_set1_ps(a.score_scale), factor = _mm512_set1_ps(a.factor);
  const __m512i row = _mm512_set1_epi32(row_sum);
  __m512 largest = _mm512_set1_ps(-__builtin_inff());
  for (int64_t j = 0; j < to.keys; j += LANES) {
    const auto real = static_cast<__mmask16>(j + LANES <= a.keys ? 0xFFFF : (1u << (a.keys - j)) - 1);
    const __m512i key = _mm512_loadu_si512(to.k_sums.data() + j);
    const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_loadu_si512(sums + j), key), row);
    __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    x = scores(x);
    x = a.divides ? _mm512_div_ps(x, factor) : _mm512_mul_ps(x, factor);
    x = scaled(x);
    if (mask != nullptr) {
      const __m512 added = a.mask_key ? _mm512_maskz_loadu_ps(real, mask + j) : _mm512_set1_ps(*mask);
      x = _mm512_add_ps(x, added);
    }
    if (masked.on) x = masked.steps(x);
    largest = _mm512_mask_max_ps(largest, real, largest, x);
    _mm512_storeu_ps(to.scores.data() + j, x);
  }
  const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  for (int64_t j = 0; j < to.keys; j += LANES) {
    const auto real = static_cast<__mmask16>(j + LANES <= a.keys ? 0xFFFF : (1u << (a.keys - j)) - 1);
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(to.scores.data() + j), most);
    const __m512i steps = _mm512_maskz_sub_epi32(real, _mm512_setzero_si512(), _mm512_cvtps_epi32(below));
    const __m512 y = _mm512_maskz_mov_ps(real, a.exps != nullptr ? _mm512_i32gather_ps(steps, a.exps, sizeof(float)) : exp_of(below));
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(y)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
    _mm512_storeu_ps(to.scores.data() + j, y);
  }
  const __m512 sum = _mm512_set1_ps(static_cast<float>(_mm512_reduce_add_pd(_mm512_add_pd(low, high))));
  const __m512i zero = _mm512_set1_epi32(a.p_zero);
  __m512i taken = _mm512_setzero_si512();
  for (int64_t j = 0; j < to.keys; j += LANES) {
    const auto real = static_cast<__mmask16>(j + LANES <= a.keys ? 0xFFFF : (1u << (a.keys - j)) - 1);
    const __m512 steps = probabilities.steps(_mm512_div_ps(_mm512_loadu_ps(to.scores.data() + j), sum));
    const __m512i whole = _mm512_maskz_add_epi32(real, _mm512_cvtps_epi32(steps), zero);
    taken = _mm512_add_epi32(taken, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p + j), _mm512_cvtepi32_epi8(whole));
  }
  return _mm512_reduce_add_epi32(taken);
}

void context_row(const Attention &a, const Buffers &to, const int32_t *sums, int32_t p_sum, uint8_t *out) {
  const Quantizer context(a.context);
  const __m512 scale = _mm512_set1_ps(a.context_scale);
  const __m512i row = _mm512_set1_epi32(p_sum * a.v_zero), zero = _mm512_set1_epi32(a.context_zero);
  for (int64_t d = 0; d < a.depth; d += LANES) {
    const __m512i channel = _mm512_loadu_si512(to.v_sums.data() + d);
    const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_loadu_si512(sums + d), channel), row);
    const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(context.steps(x)), zero);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + d), _mm512_cvtepi32_epi8(whole));
  }
}

void head(const Attention &a, int64_t batch, int64_t head, Buffers &to) {
  const uint8_t *q = a.q + batch * a.q_at.batch + head * a.q_at.head;
  pack_keys(a, a.k + batch * a.k_at.batch + head * a.k_at.head, to);
  pack_values(a, a.v + batch * a.v_at.batch + head * a.v_at.head, to);
  for (int64_t first = 0; first < a.queries; first += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, a.queries - first);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < a.depth; ++d)
        to.q[i * a.depth + d] = q[(first + i) * a.q_at.row + d] ^ static_cast<uint8_t>(a.q_flip);
    product(to.q.data(), a.depth, to.k.data(), to.keys, a.depth / PART, to.sums.data());
    int32_t p_sums[ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      const float *mask = a.mask == nullptr ? nullptr : a.mask + batch * a.mask_at.batch + head * a.mask_at.head + (first + i) * a.mask_at.row;
      const int32_t row_sum = a.k_zero * sum_of(to.q.data() + i * a.depth, a.depth);
      p_sums[i] = softmax_row(a, to, to.sums.data() + i * to.keys, row_sum, mask, to.p.data() + i * to.keys);
    }
    product(to.p.data(), to.keys, to.v.data(), a.depth, to.keys / PART, to.sums.data());
    for (int64_t i = 0; i < rows; ++i)
      context_row(a, to, to.sums.data() + i * a.depth, p_sums[i], a.out + ((batch * a.queries + first + i) * a.heads + head) * a.depth);
  }
}

}  // namespace

extern "C" void attention(const Attention *a) {
  const int64_t heads = a->batch * a->heads;
#pragma omp parallel
  {
    Buffers buffers(*a);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) head(*a, i / a->heads, i % a->heads, buffers);
  }
}
