// Products of two 8-bit integers for a batch of small matrices, summed in int32, for CPUs with AVX-512 VNNI: a[i] @ b[i].

#include "vnni.h"

#include <vector>

extern "C" {

struct Batched {
  const uint8_t *a, *b;  // [batch, m, k], k contiguous; [batch, k, n], either axis contiguous
  int64_t a_row, b_row;  // strides of m, and of the axis of b that is not contiguous
  const int64_t *a_at, *b_at;  // where each matrix begins
  int32_t a_signed, transposed;  // a is int8, not uint8; b's k is contiguous
  int64_t batch, m, n, k;
  int32_t *out;  // [batch, m, n]
};

void batched(const Batched *p);
}

namespace {

struct Matrices {
  int64_t n, k;  // padded to LANES and PART
  std::vector<int8_t> b;
  std::vector<uint8_t> a;  // [ROWS, k]
  std::vector<int32_t> sums, c;
  explicit Matrices(const Batched &p)
      : n(up(p.n, LANES)), k(up(p.k, PART)), b(n * k), a(ROWS * k), sums(n), c(ROWS * n) {}
};

// int8 rows of a become uint8 by 128, which times the sum of a column of b is taken away again
void one(const Batched &p, int64_t i, Matrices &to) {
  const uint8_t *a = p.a + p.a_at[i], *b = p.b + p.b_at[i], flip = p.a_signed ? 0x80 : 0;
  if (p.transposed)
    pack_rows(b, p.b_row, p.n, p.k, to.n, 0, to.b.data());
  else
    pack_columns(b, p.b_row, p.k, p.n, to.n, 0, to.b.data());
  if (flip) column_sums(to.b.data(), to.k / PART, to.n, 128, to.sums.data());
  for (int64_t first = 0; first < p.m; first += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, p.m - first);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < p.k; ++d) to.a[r * to.k + d] = a[(first + r) * p.a_row + d] ^ flip;
    product(to.a.data(), to.k, to.b.data(), to.n, to.k / PART, to.c.data());
    for (int64_t r = 0; r < rows; ++r) {
      int32_t *out = p.out + (i * p.m + first + r) * p.n;
      const int32_t *c = to.c.data() + r * to.n;
      for (int64_t j = 0; j < p.n; ++j) out[j] = c[j] - to.sums[j];
    }
  }
}

}  // namespace

extern "C" void batched(const Batched *p) {
#pragma omp parallel
  {
    Matrices matrices(*p);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p->batch; ++i) one(*p, i, matrices);
  }
}
