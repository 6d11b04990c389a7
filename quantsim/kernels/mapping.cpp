// Dynamic fixed point (numerics/fixed_point.py): the largest magnitude of a tensor in one pass, its mantissas in another.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Mapping {
  const float *x;
  int64_t n;
  float inverse_step, limit;
  int32_t bytes, stochastic;  // bytes of a mantissa: 1 or 2
  uint32_t keys[2];
  void *out;
};

struct ByAxis {
  Mapping all;           // its inverse_step is not read
  int64_t rows, columns;
  const int32_t *times;  // exponents by which x is multiplied first, of the other axis; null: none
  int32_t axis, bits;    // 0: an exponent for each row, 1: for each column
  int32_t *exponents;
};

constexpr int64_t BLOCK = 128;  // columns that a thread goes down at a time
constexpr int32_t INFINITE = 0x7f800000, LEAST = -126;  // bits of infinity; numerics/fixed_point.py: LEAST_EXPONENT

inline int32_t magnitude(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

inline float power_of_two(int32_t exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// of the bits of the largest magnitude
inline int32_t exponent_for(int32_t most, int32_t bits) {
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  int exponent;
  std::frexp(largest, &exponent);
  return most && exponent - bits + 1 > LEAST ? exponent - bits + 1 : LEAST;
}

// numerics/random_bits.py: 24 bits from a place and two keys
inline uint32_t random_bits(uint32_t place, uint32_t first, uint32_t second) {
  uint32_t h = place * 0x9E3779B1u + first;
  h = ((h ^ h >> 16) * 0x21F0AAADu) ^ second;
  h = (h ^ h >> 15) * 0x735A2D97u;
  return (h ^ h >> 15) >> 8;
}

template <bool STOCHASTIC>
inline float mantissa(float scaled, float limit, int32_t place, uint32_t first, uint32_t second) {
  float y = std::rint(scaled);
  if constexpr (STOCHASTIC) {
    y -= static_cast<float>(static_cast<int32_t>(y > scaled));  // the floor; std::floor, which may trap, is not vectorized
    const auto random = static_cast<float>(static_cast<int32_t>(random_bits(static_cast<uint32_t>(place), first, second)));
    y += static_cast<float>(static_cast<int32_t>((scaled - y) * 16777216.0f > random));
  }
  y = y < -limit ? -limit : y;
  return y > limit ? limit : y;
}

template <class T, bool STOCHASTIC>
void mantissas(const Mapping &p) {
  auto *out = static_cast<T *>(p.out);
  const float *x = p.x, inverse_step = p.inverse_step, limit = p.limit;
  const uint32_t first = p.keys[0], second = p.keys[1];
  const auto count = static_cast<int32_t>(p.n);  // below 2**31: a place has 32 bits
#pragma omp parallel for simd schedule(static)
  for (int32_t i = 0; i < count; ++i)
    out[i] = static_cast<T>(static_cast<int32_t>(mantissa<STOCHASTIC>(x[i] * inverse_step, limit, i, first, second)));
}

// The mantissas of a row: x * factors * step, where either may be one for all
template <class T, bool STOCHASTIC>
void of_row(const ByAxis &p, int64_t row, const float *factors, float factor, const float *inverse_steps, float inverse_step) {
  const auto count = static_cast<int32_t>(p.columns), start = static_cast<int32_t>(row * p.columns);
  const float *x = p.all.x + row * p.columns, limit = p.all.limit;
  auto *out = static_cast<T *>(p.all.out) + row * p.columns;
  const uint32_t first = p.all.keys[0], second = p.all.keys[1];
#pragma omp simd
  for (int32_t j = 0; j < count; ++j) {
    const float scaled = x[j] * (factors ? factors[j] : factor) * (inverse_steps ? inverse_steps[j] : inverse_step);
    out[j] = static_cast<T>(static_cast<int32_t>(mantissa<STOCHASTIC>(scaled, limit, start + j, first, second)));
  }
}

template <class T, bool STOCHASTIC>
bool by_rows(const ByAxis &p) {
  std::vector<float> factors(p.columns, 1.0f);
  for (int64_t j = 0; p.times && j < p.columns; ++j) factors[j] = power_of_two(p.times[j]);
  bool finite = true;
#pragma omp parallel for schedule(static) reduction(&& : finite)
  for (int64_t i = 0; i < p.rows; ++i) {
    const float *x = p.all.x + i * p.columns;
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < p.columns; ++j) {
      const int32_t bits = magnitude(x[j] * factors[j]);
      most = bits > most ? bits : most;
    }
    finite = finite && most < INFINITE;
    p.exponents[i] = exponent_for(most, p.bits);
    of_row<T, STOCHASTIC>(p, i, factors.data(), 1.0f, nullptr, power_of_two(-p.exponents[i]));
  }
  return finite;
}

template <class T, bool STOCHASTIC>
bool by_columns(const ByAxis &p) {
  std::vector<float> steps(p.columns);
  bool finite = true;
#pragma omp parallel for schedule(static) reduction(&& : finite)
  for (int64_t first = 0; first < p.columns; first += BLOCK) {
    const int64_t width = p.columns - first < BLOCK ? p.columns - first : BLOCK;
    int32_t most[BLOCK] = {};
    for (int64_t i = 0; i < p.rows; ++i) {
      const float *x = p.all.x + i * p.columns + first, factor = p.times ? power_of_two(p.times[i]) : 1.0f;
      for (int64_t j = 0; j < width; ++j) {
        const int32_t bits = magnitude(x[j] * factor);
        most[j] = bits > most[j] ? bits : most[j];
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      finite = finite && most[j] < INFINITE;
      p.exponents[first + j] = exponent_for(most[j], p.bits);
      steps[first + j] = power_of_two(-p.exponents[first + j]);
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < p.rows; ++i) of_row<T, STOCHASTIC>(p, i, nullptr, p.times ? power_of_two(p.times[i]) : 1.0f, steps.data(), 1.0f);
  return finite;
}

template <class T>
bool by_axis_as(const ByAxis &p) {
  if (p.axis == 0) return p.all.stochastic ? by_rows<T, true>(p) : by_rows<T, false>(p);
  return p.all.stochastic ? by_columns<T, true>(p) : by_columns<T, false>(p);
}

}  // namespace

extern "C" {

// The largest |x|. Magnitudes are ordered as their bits are, with infinity and then NaN above all others.
float largest(const float *x, int64_t n) {
  int32_t most = 0;
#pragma omp parallel for simd schedule(static) reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = magnitude(x[i]);
    most = bits > most ? bits : most;
  }
  float found;
  std::memcpy(&found, &most, sizeof found);
  return found;
}

// 0, or 1 where there is NaN or infinity; then the mantissas mean nothing
int32_t map_by_axis(const ByAxis *p) { return (p->all.bytes == 1 ? by_axis_as<int8_t>(*p) : by_axis_as<int16_t>(*p)) ? 0 : 1; }

// out[c] = sum over rows of m[r, c] * 2**exponents[r], in double and in the order of the rows
void sum_rows_scaled(const void *m, int32_t bytes, int64_t rows, int64_t columns, const int32_t *exponents, double *out) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < columns; first += BLOCK) {
    const int64_t width = columns - first < BLOCK ? columns - first : BLOCK;
    double sums[BLOCK] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const double factor = std::ldexp(1.0, exponents[i]);
      const int64_t at = i * columns + first;
      if (bytes == 1)
        for (int64_t j = 0; j < width; ++j) sums[j] += static_cast<const int8_t *>(m)[at + j] * factor;
      else
        for (int64_t j = 0; j < width; ++j) sums[j] += static_cast<const int16_t *>(m)[at + j] * factor;
    }
    for (int64_t j = 0; j < width; ++j) out[first + j] = sums[j];
  }
}

void map(const Mapping *p) {
  if (p->bytes == 1)
    p->stochastic ? mantissas<int8_t, true>(*p) : mantissas<int8_t, false>(*p);
  else
    p->stochastic ? mantissas<int16_t, true>(*p) : mantissas<int16_t, false>(*p);
}
}
