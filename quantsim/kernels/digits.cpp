// Products of 9 to 16 bits from products of their int8 digits: what is before and after the four products, in one pass each.

#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 256, PART = 1 << 15;  // columns at a time; so many int16 an int32 adds up

template <class T>
void of_columns(const T *m, int64_t rows, int64_t columns, int64_t a, int64_t b, int64_t *out) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    int64_t sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += m[r * columns + c];
    out[r] = a * sum + b;
  }
}

template <class T>
void of_rows(const T *m, int64_t rows, int64_t columns, int64_t a, int64_t b, int64_t *out) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < columns; first += BLOCK) {
    const int64_t width = columns - first < BLOCK ? columns - first : BLOCK;
    int64_t sums[BLOCK] = {};
    for (int64_t from = 0; from < rows; from += PART) {
      int32_t part[BLOCK] = {};
      for (int64_t r = from; r < rows && r < from + PART; ++r)
        for (int64_t c = 0; c < width; ++c) part[c] += m[r * columns + first + c];
      for (int64_t c = 0; c < width; ++c) sums[c] += part[c];
    }
    for (int64_t c = 0; c < width; ++c) out[first + c] = a * sums[c] + b;
  }
}

}  // namespace

extern "C" {

struct Together {
  const int32_t *products[4];  // [n, m], contiguous, each times 2^shift
  int32_t shifts[4], count;
  const int64_t *rows, *columns;  // added: [n] and [m]; null: nothing
  float factors[2];
  const float *bias;  // [m]; null: none
  int64_t n, m;
  float *out;  // [n, m]
};

// m = 256 * high + low (+ 128 where it has 16 bits: then low is centred, and high not rounded)
void cut(const int16_t *m, int64_t n, int32_t sixteen, int8_t *low, int8_t *high) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t x = m[i], h = sixteen ? x >> 8 : (x + 128) >> 8;
    high[i] = static_cast<int8_t>(h);
    low[i] = static_cast<int8_t>(sixteen ? (x & 255) - 128 : x - (h << 8));
  }
}

// out[r] = a * sum over columns of m[r, c] + b; m is int8 or int16
void sum_columns(const void *m, int32_t bytes, int64_t rows, int64_t columns, int64_t a, int64_t b, int64_t *out) {
  bytes == 1 ? of_columns(static_cast<const int8_t *>(m), rows, columns, a, b, out)
             : of_columns(static_cast<const int16_t *>(m), rows, columns, a, b, out);
}

// out[c] = a * sum over rows of m[r, c] + b
void sum_rows(const void *m, int32_t bytes, int64_t rows, int64_t columns, int64_t a, int64_t b, int64_t *out) {
  bytes == 1 ? of_rows(static_cast<const int8_t *>(m), rows, columns, a, b, out)
             : of_rows(static_cast<const int16_t *>(m), rows, columns, a, b, out);
}

// out = float(sum of products + rows + columns) * factors + bias: exact in 64 bits, rounded once to float32
void together(const Together *p) {
#pragma omp parallel
  {
    std::vector<int64_t> sums(p->m);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p->n; ++i) {
      const int64_t row = p->rows ? p->rows[i] : 0;
      for (int64_t j = 0; j < p->m; ++j) sums[j] = row + (p->columns ? p->columns[j] : 0);
      for (int32_t k = 0; k < p->count; ++k) {
        const int32_t *x = p->products[k] + i * p->m;
        const int shift = p->shifts[k];
        for (int64_t j = 0; j < p->m; ++j) sums[j] += static_cast<int64_t>(x[j]) * (int64_t(1) << shift);
      }
      float *out = p->out + i * p->m;
      for (int64_t j = 0; j < p->m; ++j) out[j] = static_cast<float>(sums[j]) * p->factors[0] * p->factors[1];
      if (p->bias)
        for (int64_t j = 0; j < p->m; ++j) out[j] += p->bias[j];
    }
  }
}
}
