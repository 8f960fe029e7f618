// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Rows of SIZE numbers x -> 1, x / SIZE^(1/4), and x_i x_j / sqrt(SIZE) for i <= j, those of i = j over sqrt 2.

#include <cmath>
#include <cstdint>

struct Inputs {
  const float* x;
  int64_t rows, threads;
};

namespace {

constexpr int64_t FEATURES = 1 + SIZE + SIZE * (SIZE + 1) / 2;
const float FIRST = 1 / std::sqrt(std::sqrt(float(SIZE))), SECOND = 1 / std::sqrt(float(SIZE));

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y) {
  const Inputs in = *inputs;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t row = 0; row < in.rows; ++row) {
    const float* const x = in.x + row * SIZE;
    float* to = y + row * FEATURES;
    *to++ = 1;
    for (int i = 0; i < SIZE; ++i) *to++ = FIRST * x[i];
    for (int i = 0; i < SIZE; to += SIZE - i++) {
      const float factor = SECOND * x[i];
      to[0] = factor * x[i] * float(M_SQRT1_2);
      for (int j = 1; j < SIZE - i; ++j) to[j] = factor * x[i + j];
    }
  }
}

void backward(const Inputs* inputs, const float* dy, float* dx) {
  const Inputs in = *inputs;
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t row = 0; row < in.rows; ++row) {
    const float* const x = in.x + row * SIZE;
    const float* from = dy + row * FEATURES + 1;
    float total[SIZE];
    for (int i = 0; i < SIZE; ++i) total[i] = FIRST * *from++;
    for (int i = 0; i < SIZE; from += SIZE - i++) {
      const float factor = SECOND * x[i];
      float own = from[0] * factor * float(M_SQRT2);
      for (int j = 1; j < SIZE - i; ++j) {
        own += SECOND * from[j] * x[i + j];
        total[i + j] += factor * from[j];
      }
      total[i] += own;
    }
    for (int i = 0; i < SIZE; ++i) dx[row * SIZE + i] = total[i];
  }
}

}  // extern "C"
