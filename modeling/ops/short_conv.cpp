// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Depthwise convolution along the real tokens of each document, x and y [B, T, D], weight and its gradient [WIDTH, D].
// Compiled for one WIDTH, for BEFORE earlier tokens in a window, and for SILU (1 ends in a SiLU).
// skip and documents [B, T] may be null; a token with skip != 0 is padding, and its y and dx stay as they are.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 64;  // channels that one task takes through all rows

struct Inputs {
  const float *x, *weight;
  const uint8_t* skip;
  const int64_t* documents;
  int64_t batch, length, channels, threads;
};

std::vector<int64_t> real_tokens(const Inputs& in, int64_t b) {
  std::vector<int64_t> tokens;
  for (int64_t t = b * in.length; t < (b + 1) * in.length; ++t)
    if (!in.skip || !in.skip[t]) tokens.push_back(t);
  return tokens;
}

// The tokens of the window of tokens[i], -1 where there is none.
void window(const Inputs& in, const std::vector<int64_t>& tokens, int64_t i, int64_t (&seen)[WIDTH]) {
  for (int o = 0; o < WIDTH; ++o) {
    const int64_t j = i + o - BEFORE;
    seen[o] = j < 0 || j >= (int64_t)tokens.size() ? -1 : tokens[j];
    if (seen[o] >= 0 && in.documents && in.documents[seen[o]] != in.documents[tokens[i]]) seen[o] = -1;
  }
}

inline void convolve(const Inputs& in, const int64_t (&seen)[WIDTH], int64_t first, int64_t size, float* y) {
  for (int64_t c = 0; c < size; ++c) y[c] = 0;
  for (int o = 0; o < WIDTH; ++o) {
    if (seen[o] < 0) continue;
    const float *x = in.x + seen[o] * in.channels + first, *w = in.weight + o * in.channels + first;
    for (int64_t c = 0; c < size; ++c) y[c] += w[c] * x[c];
  }
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y) {
  const Inputs in = *inputs;
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
  for (int64_t first = 0; first < in.channels; first += BLOCK) {
    const int64_t size = in.channels - first < BLOCK ? in.channels - first : BLOCK;
    float sums[BLOCK];
    int64_t seen[WIDTH];
    for (int64_t b = 0; b < in.batch; ++b) {
      const std::vector<int64_t> tokens = real_tokens(in, b);
      for (int64_t i = 0; i < (int64_t)tokens.size(); ++i) {
        window(in, tokens, i, seen);
        convolve(in, seen, first, size, sums);
        float* to = y + tokens[i] * in.channels + first;
        for (int64_t c = 0; c < size; ++c) to[c] = SILU ? sums[c] / (1 + std::exp(-sums[c])) : sums[c];
      }
    }
  }
}

// Adds to dx and d_weight.
void backward(const Inputs* inputs, const float* dy, float* dx, float* d_weight) {
  const Inputs in = *inputs;
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
  for (int64_t first = 0; first < in.channels; first += BLOCK) {
    const int64_t size = in.channels - first < BLOCK ? in.channels - first : BLOCK;
    float sums[BLOCK], grad[BLOCK];
    int64_t seen[WIDTH];
    for (int64_t b = 0; b < in.batch; ++b) {
      const std::vector<int64_t> tokens = real_tokens(in, b);
      for (int64_t i = 0; i < (int64_t)tokens.size(); ++i) {
        window(in, tokens, i, seen);
        const float* from = dy + tokens[i] * in.channels + first;
        if (SILU) convolve(in, seen, first, size, sums);
        for (int64_t c = 0; c < size; ++c) {
          grad[c] = from[c];
          if (SILU) {
            const float s = 1 / (1 + std::exp(-sums[c]));
            grad[c] *= s * (1 + sums[c] * (1 - s));
          }
        }
        for (int o = 0; o < WIDTH; ++o) {
          if (seen[o] < 0) continue;
          const float *x = in.x + seen[o] * in.channels + first, *w = in.weight + o * in.channels + first;
          float *to = dx + seen[o] * in.channels + first, *dw = d_weight + o * in.channels + first;
          for (int64_t c = 0; c < size; ++c) {
            to[c] += w[c] * grad[c];
            dw[c] += x[c] * grad[c];
          }
        }
      }
    }
  }
}

}  // extern "C"
