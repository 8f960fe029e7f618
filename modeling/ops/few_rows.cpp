// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// x W^T + b for a few rows x, the next tokens of a few texts: as fast as the weights come from memory. Each core reads
// its weights once, in the order in which they lie, and asks memory for what follows; libraries that read several rows
// of W side by side get half of what a memory gives.
//
// Layouts: x [rows, size], weight [outputs, size], bias [outputs] (may be null), y [rows, outputs].

#include "kernel.h"

namespace {

struct Inputs {
  const float *x, *weight, *bias;
  int64_t rows, size, outputs, threads;
};

constexpr int AHEAD = 1024;  // numbers between what is read and what memory is asked for

// y[first + r, n] for ROWS rows r. A core keeps at least four sums going: each waits for its last addition.
template <int ROWS>
void row(const Inputs& in, int64_t first, int64_t n, float* y) {
  constexpr int PARTS = ROWS < 4 ? 4 / ROWS : 1;
  const float *w = in.weight + n * in.size, *x = in.x + first * in.size;
  vec sums[ROWS][PARTS] = {};
  int64_t c = 0;
  for (; c + PARTS * LANES <= in.size; c += PARTS * LANES) EACH_PART(p) {
      const int64_t at = c + p * LANES;
      __builtin_prefetch(w + at + AHEAD);
      const vec weights = *reinterpret_cast<const loose*>(w + at);
      for (int r = 0; r < ROWS; ++r) sums[r][p] += weights * *reinterpret_cast<const loose*>(x + r * in.size + at);
    }
  for (int r = 0; r < ROWS; ++r) {
    for (int p = 1; p < PARTS; ++p) sums[r][0] += sums[r][p];
    float total = sum(sums[r][0]) + (in.bias ? in.bias[n] : 0);
    for (int64_t rest = c; rest < in.size; ++rest) total += w[rest] * x[r * in.size + rest];
    y[(first + r) * in.outputs + n] = total;
  }
}

}  // namespace

extern "C" void forward(const Inputs& in, float* y) {
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t n = 0; n < in.outputs; ++n) {
    int64_t r = 0;
    for (; r + 8 <= in.rows; r += 8) row<8>(in, r, n, y);
    if (r + 4 <= in.rows) row<4>(in, r, n, y), r += 4;
    if (r + 2 <= in.rows) row<2>(in, r, n, y), r += 2;
    if (r < in.rows) row<1>(in, r, n, y);
  }
}
