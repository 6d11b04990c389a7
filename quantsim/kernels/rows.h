// Programs over rows of integers: what lies between two products of an integer graph, while a row is in the cache.
//
// A program is a list of steps on a stack of int32 rows (the last axis of the operands): operands are pushed, functions change the top,
// sums and masks take two. A row stays in the cache from its first step to its last. Each step is the function of
// quantsim/numerics/dyadic.py or polynomial.py that its name says, to the bit, in the widths whose budgets are proven there.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int LEADING = 5;  // axes before the last

enum Type : int32_t { INT8, UINT8, INT32, BOOL };
enum Op : int32_t { PUSH, ADD, SUB, NEG, CLAMP, RESCALE, CHANNELS, GELU, TANH, NORMALIZE, SOFTMAX, WHERE };

}  // namespace

extern "C" {

struct Operand {
  const void *data;
  int64_t at[LEADING];  // strides of the leading axes
  int64_t step;         // of the last: 1, or 0 where it is broadcast
  int32_t type;
};

struct Step {
  int32_t op;
  int64_t n[8];
  const int64_t *multiplier, *offset;  // [width], of CHANNELS
};

struct Program {
  int64_t sizes[LEADING], width;
  const Operand *operands;
  const Step *steps;
  int64_t count, depth;  // steps, and rows that the stack holds at most
  void *out;             // contiguous
  int32_t type;
};
}

namespace {

template <class T>
void widen(const T *x, int64_t step, int64_t n, int32_t *to) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = x[i];
  else
    std::fill(to, to + n, static_cast<int32_t>(*x));
}

void load(const Operand &from, int64_t at, int64_t n, int32_t *to) {
  switch (from.type) {
    case INT8: return widen(static_cast<const int8_t *>(from.data) + at, from.step, n, to);
    case INT32: return widen(static_cast<const int32_t *>(from.data) + at, from.step, n, to);
    default: return widen(static_cast<const uint8_t *>(from.data) + at, from.step, n, to);
  }
}

template <class T>
void narrow(const int32_t *x, int64_t n, T *to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(x[i]);
}

void store(const int32_t *x, int64_t n, int64_t row, const Program &p) {
  switch (p.type) {
    case INT8: return narrow(x, n, static_cast<int8_t *>(p.out) + row * n);
    case INT32: return narrow(x, n, static_cast<int32_t *>(p.out) + row * n);
    default: return narrow(x, n, static_cast<uint8_t *>(p.out) + row * n);
  }
}

template <class Wide>
void rescale_in(int32_t *x, int64_t n, Wide multiplier, int shift, Wide low, Wide high, int32_t zero) {
  const Wide half = shift ? Wide(1) << (shift - 1) : 0;
  for (int64_t i = 0; i < n; ++i) {
    const Wide y = (static_cast<Wide>(x[i]) * multiplier + half) >> shift;
    x[i] = static_cast<int32_t>(std::min(std::max(y, low), high)) + zero;
  }
}

// n: multiplier, shift, wide, low, high, zero point
void rescale(int32_t *x, int64_t n, const int64_t *k) {
  const int shift = static_cast<int>(k[1]);
  if (k[2])
    rescale_in<int64_t>(x, n, k[0], shift, k[3], k[4], static_cast<int32_t>(k[5]));
  else
    rescale_in<int32_t>(x, n, static_cast<int32_t>(k[0]), shift, static_cast<int32_t>(k[3]), static_cast<int32_t>(k[4]),
                        static_cast<int32_t>(k[5]));
}

// n: shift, low, high
void channels(int32_t *x, int64_t n, const Step &s) {
  const int shift = static_cast<int>(s.n[0]);
  const int64_t low = s.n[1], high = s.n[2];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = (x[i] * s.multiplier[i] + s.offset[i]) >> shift;
    x[i] = static_cast<int32_t>(std::min(std::max(y, low), high));
  }
}

// n: GELU_BITS, ERF_BITS, ERFC_AT_0
void gelu(int32_t *x, int64_t n, const int64_t *k) {
  const int bits = static_cast<int>(k[0]), erf_bits = static_cast<int>(k[1]);
  const int32_t at_0 = static_cast<int32_t>(k[2]), end = 1 << bits;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t m = std::min(std::abs(x[i]), end), u = end - m;
    const int32_t erfc = ((u * u >> (2 * bits - erf_bits)) * at_0) >> erf_bits;
    x[i] = std::max(x[i], 0) - ((m * erfc + (1 << erf_bits)) >> (erf_bits + 1));
  }
}

// exp of -x; k: EXP_BITS, its B, its C, and the shift of its square
struct Exp {
  int bits, shift;
  int32_t b, c;
  explicit Exp(const int64_t *k)
      : bits(static_cast<int>(k[0])), shift(static_cast<int>(k[3])), b(static_cast<int32_t>(k[1])), c(static_cast<int32_t>(k[2])) {}
  int32_t operator()(int32_t x) const {
    const int32_t z = std::min(x >> bits, 29), p = b - (x & ((1 << bits) - 1));
    return (((p * p + c) >> shift) + (1 << z)) >> (z + 1);
  }
};

// n: Exp's four, EXP_OF_0, TANH_BITS
void tanh_of(int32_t *x, int64_t n, const int64_t *k) {
  const Exp exp(k);
  const int32_t one = static_cast<int32_t>(k[4]);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t e = exp(std::abs(x[i])), y = ((one - e) << k[5]) / (one + e);
    x[i] = x[i] < 0 ? -y : x[i] > 0 ? y : 0;
  }
}

int64_t root(int64_t n) {
  int64_t s = static_cast<int64_t>(std::sqrt(static_cast<double>(n)));
  while (s * s > n) --s;
  while ((s + 1) * (s + 1) <= n) ++s;
  return s;
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }  // b > 0

// n: k, e, NORM's shift of 42 - k
void normalize(int32_t *x, int64_t n, const int64_t *k) {
  int64_t sum = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const auto mean = static_cast<int32_t>(floor_div(2 * sum + n, 2 * n));
  for (int64_t i = 0; i < n; ++i) {
    x[i] -= mean;
    squares += static_cast<int64_t>(x[i]) * x[i];
  }
  const int64_t factor = (int64_t(1) << 62) / root((squares << (2 * k[0])) + k[1]);
  const int shift = static_cast<int>(k[2]);
  const int64_t half = int64_t(1) << (shift - 1);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<int32_t>((x[i] * factor + half) >> shift);
}

// n: Exp's four, least, multiplier, shift, wide
void softmax(int32_t *x, int64_t n, const int64_t *k) {
  const Exp exp(k);
  const auto least = static_cast<int32_t>(k[4]);
  int32_t most = x[0];
  for (int64_t i = 1; i < n; ++i) most = std::max(most, x[i]);
  for (int64_t i = 0; i < n; ++i) x[i] = std::max(x[i] - most, least);
  const int64_t numbers[] = {k[5], k[6], k[7], -(int64_t(31) << exp.bits), 0, 0};
  rescale(x, n, numbers);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exp(-x[i]);
    sum += x[i];
  }
  const auto r = static_cast<int32_t>(((int64_t(1) << 31) - (1 << 15) - 1) / sum);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] * r + (1 << 15)) >> 16;
}

// One row. The stack has room for `depth` of them; the operand that is number `place` is `given`, and not read from memory.
inline void run(const Program &p, int64_t row, int32_t *stack, int64_t place_given = -1, const int32_t *given = nullptr) {
  const int64_t n = p.width;
  int64_t place[LEADING];
  for (int64_t axis = LEADING - 1, rest = row; axis >= 0; --axis) {
    place[axis] = rest % p.sizes[axis];
    rest /= p.sizes[axis];
  }
  int32_t *top = stack - n;
  for (const Step *s = p.steps; s != p.steps + p.count; ++s) {
    switch (s->op) {
      case PUSH: {
        if (s->n[0] == place_given) {
          std::copy(given, given + n, top += n);
          break;
        }
        const Operand &from = p.operands[s->n[0]];
        int64_t at = 0;
        for (int axis = 0; axis < LEADING; ++axis) at += place[axis] * from.at[axis];
        load(from, at, n, top += n);
        break;
      }
      case ADD:
        top -= n;
        for (int64_t i = 0; i < n; ++i) top[i] += top[n + i];
        break;
      case WHERE: {  // the mask below, what it chooses from on top; n: the other value, and what the mask is where that is taken
        top -= n;
        const auto other = static_cast<int32_t>(s->n[0]), taken = static_cast<int32_t>(s->n[1]);
        for (int64_t i = 0; i < n; ++i) top[i] = top[i] == taken ? other : top[n + i];
        break;
      }
      case SUB:
        for (int64_t i = 0; i < n; ++i) top[i] -= static_cast<int32_t>(s->n[0]);
        break;
      case NEG:
        for (int64_t i = 0; i < n; ++i) top[i] = -top[i];
        break;
      case CLAMP:
        for (int64_t i = 0; i < n; ++i)
          top[i] = std::min(std::max(top[i], static_cast<int32_t>(s->n[0])), static_cast<int32_t>(s->n[1]));
        break;
      case RESCALE: rescale(top, n, s->n); break;
      case CHANNELS: channels(top, n, *s); break;
      case GELU: gelu(top, n, s->n); break;
      case TANH: tanh_of(top, n, s->n); break;
      case NORMALIZE: normalize(top, n, s->n); break;
      case SOFTMAX: softmax(top, n, s->n); break;
    }
  }
  store(top, n, row, p);
}

}  // namespace
