// A program over all rows of its operands, in one pass over memory.

#include "rows.h"

extern "C" void rows(const Program *p) {
  int64_t count = 1;
  for (int64_t size : p->sizes) count *= size;
#pragma omp parallel
  {
    std::vector<int32_t> stack(p->depth * p->width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; ++row) run(*p, row, stack.data());
  }
}
