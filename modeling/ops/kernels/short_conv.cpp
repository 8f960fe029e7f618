// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Depthwise convolution along the real tokens of each document, y [B, T, D], weight and its gradient [D, WIDTH], bias
// [D] (may be null). x is [B, T, D] with `row` numbers from one row of the batch to the next and `token` between tokens.
// Compiled for one WIDTH, for BEFORE earlier tokens in a window, and for SILU (1 ends in a SiLU).
// skip and documents [B, T] may be null; a token with skip != 0 is padding, and its y and dx stay as they are.

#include <memory>

#include "kernel.h"

namespace {

constexpr int64_t BLOCK = 512;  // the most channels that one task takes through all rows

struct Inputs {
  const float *x, *weight, *bias;
  const uint8_t* skip;
  const int64_t* documents;
  int64_t batch, length, channels, threads, row, token;
};

alignas(64) const float ZEROS[BLOCK] = {};

// The tokens of a row that are no padding, each with its document.
struct Row {
  std::vector<int64_t> at, place, document;  // in [B, T] and where it begins in x

  Row(const Inputs& in, int64_t b) {
    for (int64_t s = 0; s < in.length; ++s) {
      const int64_t t = b * in.length + s;
      if (in.skip && in.skip[t]) continue;
      at.push_back(t);
      place.push_back(b * in.row + s * in.token);
      document.push_back(in.documents ? in.documents[t] : 0);
    }
  }

  int64_t count() const { return at.size(); }
  bool together(int64_t i, int64_t j) const { return j >= 0 && j < count() && document[i] == document[j]; }
};

// Where the channels of the tokens in the window of token i begin; zeros where there is no token.
void window(const Inputs& in, const Row& row, int64_t i, int64_t first, const float* (&seen)[WIDTH]) {
  for (int o = 0; o < WIDTH; ++o) {
    const int64_t j = i + o - BEFORE;
    seen[o] = row.together(i, j) ? in.x + row.place[j] + first : ZEROS;
  }
}

// What belongs to each channel of a block, in WIDTH rows.
struct Weights {
  alignas(64) float rows[WIDTH][BLOCK] = {}, bias[BLOCK] = {};

  void load(const Inputs& in, int64_t first, int64_t size) {
    for (int64_t c = 0; c < size; ++c)
      for (int o = 0; o < WIDTH; ++o) rows[o][c] = in.weight[(first + c) * WIDTH + o];
    if (in.bias) std::memcpy(bias, in.bias + first, size * sizeof(float));
  }
};

// What a task works with; for wide windows more than a stack holds.
struct Reading {
  Weights weights;
  const float* seen[WIDTH];
};
struct Learning {
  Weights weights;
  const float* seen[WIDTH];
  Weights slopes;
  alignas(64) float grads[WIDTH][BLOCK] = {};  // of the latest WIDTH sums
  const float* later[WIDTH];
};

// y = first + sum_o weights[o] rows[o]
inline void weigh(const Weights& weights, const float* first, const float* const (&rows)[WIDTH], int64_t size,
                  float* __restrict__ y) {
  for (int64_t c = 0; c < size; ++c) {
    float total = first[c];
    for (int o = 0; o < WIDTH; ++o) total += weights.rows[o][c] * rows[o][c];
    y[c] = total;
  }
}

int64_t block_of(const Inputs& in) {
  const int64_t share = (in.channels + in.threads - 1) / in.threads, size = (share + 63) / 64 * 64;
  return size < BLOCK ? size : BLOCK;
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, float* y) {
  const Inputs in = *inputs;
  const int64_t block = block_of(in);
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
  for (int64_t first = 0; first < in.channels; first += block) {
    const int64_t size = in.channels - first < block ? in.channels - first : block;
    const auto work = std::make_unique<Reading>();
    auto& [weights, seen] = *work;
    weights.load(in, first, size);
    alignas(64) float sums[BLOCK] = {};
    for (int64_t b = 0; b < in.batch; ++b) {
      const Row row(in, b);
      for (int64_t i = 0; i < row.count(); ++i) {
        window(in, row, i, first, seen);
        float* to = y + row.at[i] * in.channels + first;
        weigh(weights, weights.bias, seen, size, SILU ? sums : to);
        if (!SILU) continue;
        for (int64_t c = 0; c < size; c += LANES) {
          vec& s = *reinterpret_cast<vec*>(sums + c);
          s *= sigmoid(s);
        }
        std::memcpy(to, sums, size * sizeof(float));
      }
    }
  }
}

// Writes dx [B, T, D], d_weight and, if not null, d_bias. A token's dx is ready when the last window that sees it has its gradient.
void backward(const Inputs* inputs, const float* dy, float* dx, float* d_weight, float* d_bias) {
  const Inputs in = *inputs;
  const int64_t block = block_of(in);
  constexpr int AFTER = WIDTH - 1 - BEFORE;
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
  for (int64_t first = 0; first < in.channels; first += block) {
    const int64_t size = in.channels - first < block ? in.channels - first : block;
    const auto work = std::make_unique<Learning>();
    auto& [weights, seen, slopes, grads, later] = *work;
    weights.load(in, first, size);
    for (int64_t b = 0; b < in.batch; ++b) {
      const Row row(in, b);
      for (int64_t i = 0; i < row.count() + BEFORE; ++i) {
        if (i < row.count()) {
          const float* from = dy + row.at[i] * in.channels + first;
          float* const grad = grads[i % WIDTH];
          window(in, row, i, first, seen);
          if (SILU) {
            weigh(weights, weights.bias, seen, size, grad);
            for (int64_t c = 0; c < size; c += LANES) {
              vec& s = *reinterpret_cast<vec*>(grad + c);
              const vec open = sigmoid(s);
              s = open * (1 + s * (1 - open));
            }
            for (int64_t c = 0; c < size; ++c) grad[c] *= from[c];
          } else {
            std::memcpy(grad, from, size * sizeof(float));
          }
          for (int o = 0; o < WIDTH; ++o) {
            float* __restrict__ to = slopes.rows[o];
            for (int64_t c = 0; c < size; ++c) to[c] += seen[o][c] * grad[c];
          }
          for (int64_t c = 0; d_bias && c < size; ++c) slopes.bias[c] += grad[c];
        }
        const int64_t j = i - BEFORE;
        if (j < 0 || j >= row.count()) continue;
        for (int o = 0; o < WIDTH; ++o) {
          const int64_t n = j + BEFORE - o;  // sees j at its place o
          later[o] = n >= j - AFTER && row.together(j, n) ? grads[n % WIDTH] : ZEROS;
        }
        weigh(weights, ZEROS, later, size, dx + row.at[j] * in.channels + first);
      }
    }
    for (int64_t c = 0; c < size; ++c)
      for (int o = 0; o < WIDTH; ++o) d_weight[(first + c) * WIDTH + o] = slopes.rows[o][c];
    if (d_bias) std::memcpy(d_bias + first, slopes.bias, size * sizeof(float));
  }
}

}  // extern "C"
