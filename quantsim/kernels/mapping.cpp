// Dynamic fixed point (numerics/fixed_point.py): the largest magnitude of a tensor in one pass, its mantissas in another.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Mapping {
  const float *x;
  int64_t n;
  float inverse_step, limit;
  int32_t bytes, stochastic;  // bytes of a mantissa: 1 or 2
  uint32_t keys[2];
  void *out;
};

// numerics/random_bits.py: 24 bits from a place and two keys
inline uint32_t random_bits(uint32_t place, uint32_t first, uint32_t second) {
  uint32_t h = place * 0x9E3779B1u + first;
  h = ((h ^ h >> 16) * 0x21F0AAADu) ^ second;
  h = (h ^ h >> 15) * 0x735A2D97u;
  return (h ^ h >> 15) >> 8;
}

template <class T, bool STOCHASTIC>
void mantissas(const Mapping &p) {
  auto *out = static_cast<T *>(p.out);
  const float *x = p.x, inverse_step = p.inverse_step, limit = p.limit;
  const uint32_t first = p.keys[0], second = p.keys[1];
  const auto count = static_cast<int32_t>(p.n);  // below 2**31: a place has 32 bits
#pragma omp parallel for simd schedule(static)
  for (int32_t i = 0; i < count; ++i) {
    const float y0 = x[i] * inverse_step;
    float y = std::rint(y0);
    if constexpr (STOCHASTIC) {
      y -= static_cast<float>(static_cast<int32_t>(y > y0));  // the floor; std::floor, which may trap, is not vectorized
      const auto random = static_cast<float>(static_cast<int32_t>(random_bits(static_cast<uint32_t>(i), first, second)));
      y += static_cast<float>(static_cast<int32_t>((y0 - y) * 16777216.0f > random));
    }
    y = y < -limit ? -limit : y;
    y = y > limit ? limit : y;
    out[i] = static_cast<T>(static_cast<int32_t>(y));
  }
}

}  // namespace

extern "C" {

// The largest |x|. Magnitudes are ordered as their bits are, with infinity and then NaN above all others.
float largest(const float *x, int64_t n) {
  int32_t most = 0;
#pragma omp parallel for simd schedule(static) reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float found;
  std::memcpy(&found, &most, sizeof found);
  return found;
}

void map(const Mapping *p) {
  if (p->bytes == 1)
    p->stochastic ? mantissas<int8_t, true>(*p) : mantissas<int8_t, false>(*p);
  else
    p->stochastic ? mantissas<int16_t, true>(*p) : mantissas<int16_t, false>(*p);
}
}
