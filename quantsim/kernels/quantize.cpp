// Values to the 8-bit integers of a grid in one pass, and whether all of them were numbers.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace {

template <class T>
bool quantize(const float *x, int64_t n, float scale, float low, float high, float zero_point, T *out) {
  int32_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(| : wrong) if (n > 32768)
  for (int64_t first = 0; first < n; first += 4096) {
    const int64_t last = std::min(n, first + 4096);
    int32_t here = 0;
    for (int64_t i = first; i < last; ++i) {
      here |= !(std::fabs(x[i]) <= FLT_MAX);
      const float q = std::min(std::max(std::rint(x[i] / scale), low), high) + zero_point;
      out[i] = static_cast<T>(static_cast<int32_t>(q));
    }
    wrong |= here;
  }
  return wrong;
}

}  // namespace

// out = clamp(round(x / scale), low, high) + zero_point, halves to even, as int8 or uint8; 1 where an x is NaN or infinite
extern "C" int32_t to_integers(const float *x, int64_t n, float scale, float low, float high, float zero_point, int32_t is_signed, void *out) {
  return is_signed ? quantize(x, n, scale, low, high, zero_point, static_cast<int8_t *>(out))
                   : quantize(x, n, scale, low, high, zero_point, static_cast<uint8_t *>(out));
}
