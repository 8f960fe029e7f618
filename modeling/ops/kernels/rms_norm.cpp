// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// y = weight * x / sqrt(mean(x^2) + eps) along rows, x and y [ROWS, SIZE], weight [SIZE], rstd [ROWS] the inverse root
// (null where nobody asks).

#include <cmath>

#include "kernel.h"

struct Inputs {
  const float *x, *weight;
  int64_t rows, size, threads;
  double eps;
};

namespace {

// Sum over a row of term(c), which is given a whole vector of columns or one column.
template <typename Whole, typename Single>
inline float over(int64_t size, Whole whole, Single single) {
  vec sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * LANES <= size; c += 2 * LANES) {
    sums[0] += whole(c);
    sums[1] += whole(c + LANES);
  }
  if (c + LANES <= size) {
    sums[0] += whole(c);
    c += LANES;
  }
  float total = sum(sums[0] + sums[1]);
  for (; c < size; ++c) total += single(c);
  return total;
}

inline vec at(const float* x) { return *reinterpret_cast<const loose*>(x); }

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y, float* rstd) {
  const Inputs in = *inputs;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t row = 0; row < in.rows; ++row) {
    const float *x = in.x + row * in.size, *w = in.weight;
    float* __restrict__ to = y + row * in.size;
    const float squares = over(
        in.size, [&](int64_t c) { return at(x + c) * at(x + c); }, [&](int64_t c) { return x[c] * x[c]; });
    const float r = 1 / std::sqrt(squares / in.size + (float)in.eps);
    for (int64_t c = 0; c < in.size; ++c) to[c] = x[c] * r * w[c];
    if (rstd) rstd[row] = r;
  }
}

// Writes dx, adds to d_weight (null where nobody asks).
void backward(const Inputs* inputs, const float* rstd, const float* dy, float* dx, float* d_weight) {
  const Inputs in = *inputs;
#pragma omp parallel num_threads(in.threads)
  {
    std::vector<float> own(d_weight ? in.size : 0);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < in.rows; ++row) {
      const float *x = in.x + row * in.size, *w = in.weight, *from = dy + row * in.size;
      float* __restrict__ to = dx + row * in.size;
      const float r = rstd[row];
      const float along = over(
          in.size, [&](int64_t c) { return at(x + c) * at(w + c) * at(from + c); },
          [&](int64_t c) { return x[c] * w[c] * from[c]; });
      const float back = along * r * r * r / in.size;
      for (int64_t c = 0; c < in.size; ++c) to[c] = r * w[c] * from[c] - back * x[c];
      float* __restrict__ sums = own.data();
      if (d_weight)
        for (int64_t c = 0; c < in.size; ++c) sums[c] += from[c] * x[c] * r;
    }
#pragma omp critical
    for (int64_t c = 0; d_weight && c < in.size; ++c) d_weight[c] += own[c];
  }
}

}  // extern "C"
