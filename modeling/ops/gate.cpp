// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// y = silu(x) * factor, or without SILU sigmoid(x) * factor, number by number.

#include "kernel.h"

struct Inputs {
  const float *x, *factor;
  int64_t count, threads;
};

namespace {

constexpr int64_t PIECE = 4096;

// A vector of numbers from `place`, fewer at the end.
inline vec take(const float* x, int64_t place, int64_t count) {
  vec found = {};
  if (place + LANES <= count) return *reinterpret_cast<const loose*>(x + place);
  std::memcpy(&found, x + place, (count - place) * sizeof(float));
  return found;
}

inline void put(float* x, int64_t place, int64_t count, vec value) {
  std::memcpy(x + place, &value, (place + LANES <= count ? LANES : count - place) * sizeof(float));
}

template <typename Each>
void everywhere(const Inputs& in, Each each) {
#pragma omp parallel for num_threads(in.threads) schedule(static)
  for (int64_t piece = 0; piece < in.count; piece += PIECE) {
    const int64_t end = piece + PIECE < in.count ? piece + PIECE : in.count;
    for (int64_t place = piece; place < end; place += LANES) each(place);
  }
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y) {
  const Inputs in = *inputs;
  everywhere(in, [&](int64_t place) {
    const vec x = take(in.x, place, in.count);
    put(y, place, in.count, (SILU ? x * sigmoid(x) : sigmoid(x)) * take(in.factor, place, in.count));
  });
}

void backward(const Inputs* inputs, const float* dy, float* dx, float* d_factor) {
  const Inputs in = *inputs;
  everywhere(in, [&](int64_t place) {
    const vec x = take(in.x, place, in.count), open = sigmoid(x), grad = take(dy, place, in.count);
    put(d_factor, place, in.count, SILU ? grad * x * open : grad * open);
    const vec slope = SILU ? open * (1 + x * (1 - open)) : open * (1 - open);
    put(dx, place, in.count, grad * take(in.factor, place, in.count) * slope);
  });
}

}  // extern "C"
