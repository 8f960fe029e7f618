// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// x W^T + b for a few rows x, the next tokens of a few sequences: as fast as the weights come from memory. Each core reads
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

constexpr int AHEAD = 1024;            // numbers between what is read and what memory is asked for
constexpr int OUTPUTS = 32, ROWS = 64;  // of y that are made before they are written

struct Block {
  const Inputs& in;
  const int64_t first, begin, end;  // row; outputs
  float y[ROWS][OUTPUTS];

  Block(const Inputs& in, int64_t first, int64_t begin, int64_t end) : in(in), first(first), begin(begin), end(end) {}

  // COUNT rows from `row` on, with as many weights from n on as make a vector of sums.
  template <int COUNT>
  void tile(int64_t row, int64_t n) {
    constexpr int WIDTH = LANES / COUNT, SIDE = WIDTH == 2 ? 2 : 1;  // weights, and how many of them side by side
    constexpr int PARTS = COUNT * SIDE < 4 ? 4 / COUNT : 1;          // at least four sums: each waits for its last addition
    const float* x = in.x + (first + row) * in.size;
    const int64_t width = std::min<int64_t>(WIDTH, end - n), whole = in.size - in.size % (PARTS * LANES);
    vec sums[WIDTH][COUNT] = {};
    for (int i = 0; i + SIDE <= width; i += SIDE) {
      const float* w = in.weight + (n + i) * in.size;
      vec parts[SIDE][COUNT][PARTS] = {};
      for (int64_t c = 0; c < whole; c += PARTS * LANES) EACH_PART(p) {
          const int64_t at = c + p * LANES;
          vec weights[SIDE];
          for (int s = 0; s < SIDE; ++s) {
            __builtin_prefetch(w + s * in.size + at + AHEAD);
            weights[s] = *reinterpret_cast<const loose*>(w + s * in.size + at);
          }
          for (int r = 0; r < COUNT; ++r) {
            const vec values = *reinterpret_cast<const loose*>(x + r * in.size + at);
            for (int s = 0; s < SIDE; ++s) parts[s][r][p] += weights[s] * values;
          }
        }
      for (int s = 0; s < SIDE; ++s)
        for (int r = 0; r < COUNT; ++r) EACH_PART(p) sums[i + s][r] += parts[s][r][p];
    }
    const vec totals = sums_of<LANES>(sums[0]);
    for (int i = 0; i < width; ++i)
      for (int r = 0; r < COUNT; ++r) {
        const int64_t from = i < width - width % SIDE ? whole : 0;  // the last weight of an odd number has no side
        float total = totals[i * COUNT + r] + (in.bias ? in.bias[n + i] : 0);
        for (int64_t c = from; c < in.size; ++c) total += in.weight[(n + i) * in.size + c] * x[r * in.size + c];
        y[row + r][n + i - begin] = total;
      }
  }

  template <int COUNT>
  void make(int64_t row, int64_t rows) {
    for (; row + COUNT <= rows; row += COUNT)
      for (int64_t n = begin; n < end; n += LANES / COUNT) tile<COUNT>(row, n);
    if constexpr (COUNT > 1) make<COUNT / 2>(row, rows);
  }
};

}  // namespace

extern "C" void forward(const Inputs& in, float* y) {
  const int64_t blocks = (in.outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t index = 0; index < blocks; ++index) {
    const int64_t begin = index * OUTPUTS, end = std::min(begin + OUTPUTS, in.outputs);
    for (int64_t first = 0; first < in.rows; first += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, in.rows - first);
      Block block(in, first, begin, end);
      block.make<LANES / 2>(0, rows);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(y + (first + r) * in.outputs + begin, block.y[r], (end - begin) * sizeof(float));
    }
  }
}
