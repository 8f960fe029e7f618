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

// y[first + r, n + i] for TILE_ROWS rows r and two weights i: with that many rows arithmetic is what takes time.
constexpr int TILE_ROWS = LANES / 2;

void tile(const Inputs& in, int64_t first, int64_t n, float* y) {
  const float *w = in.weight + n * in.size, *x = in.x + first * in.size;
  vec sums[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= in.size; c += LANES) {
    __builtin_prefetch(w + c + AHEAD);
    __builtin_prefetch(w + in.size + c + AHEAD);
    const vec one = *reinterpret_cast<const loose*>(w + c), two = *reinterpret_cast<const loose*>(w + in.size + c);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r) {
      const vec values = *reinterpret_cast<const loose*>(x + r * in.size + c);
      sums[r] += one * values;
      sums[r + TILE_ROWS] += two * values;
    }
  }
  const vec totals = sums_of<LANES>(sums);
  for (int i = 0; i < 2; ++i)
    for (int r = 0; r < TILE_ROWS; ++r) {
      float total = totals[i * TILE_ROWS + r] + (in.bias ? in.bias[n + i] : 0);
      for (int64_t rest = c; rest < in.size; ++rest) total += w[i * in.size + rest] * x[r * in.size + rest];
      y[(first + r) * in.outputs + n + i] = total;
    }
}

}  // namespace

extern "C" void forward(const Inputs& in, float* y) {
  const int64_t pairs = (in.outputs + 1) / 2;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int64_t r = 0, n = 2 * pair;
    const int64_t end = std::min(n + 2, in.outputs);
    for (; end == n + 2 && r + TILE_ROWS <= in.rows; r += TILE_ROWS) tile(in, r, n, y);
    for (; n < end; ++n) {
      int64_t first = r;
      for (; first + 4 <= in.rows; first += 4) row<4>(in, first, n, y);
      if (first + 2 <= in.rows) row<2>(in, first, n, y), first += 2;
      if (first < in.rows) row<1>(in, first, n, y);
    }
  }
}
