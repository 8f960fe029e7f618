// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The features of SIZE numbers x: 1, x / SIZE^(1/4), and x_i x_j / sqrt(SIZE) for i <= j, those of i = j over sqrt 2.

#pragma once

#include <cmath>

#include "blocks.h"

namespace {

template <int SIZE>
struct Taylor {
  static constexpr int FEATURES = 1 + SIZE + SIZE * (SIZE + 1) / 2, WIDE = rounded(SIZE);
  static constexpr int SLACK = rounded(FEATURES) + LANES;  // rows are written and read in whole vectors, and beyond

  // x, and zeros after it.
  struct Padded {
    alignas(64) float at[WIDE + LANES] = {};
    explicit Padded(const float* x) { std::memcpy(at, x, SIZE * sizeof(float)); }
  };

  static vec first_of_pairs() {
    vec weights = 1 - (vec){};
    weights[0] = float(M_SQRT1_2);
    return weights;
  }

  // Writes SLACK numbers, of which those beyond the features mean nothing.
  static void map(const float* from, float* to) {
    const Padded x(from);
    const float first = 1 / std::sqrt(std::sqrt(float(SIZE))), second = 1 / std::sqrt(float(SIZE));
    *to++ = 1;
    for (int j = 0; j < SIZE; j += LANES) unaligned(to + j) = first * aligned(x.at + j);
    to += SIZE;
    _Pragma("GCC unroll 16") for (int i = 0; i < SIZE; to += SIZE - i++) {
      for (int j = 0; j < SIZE - i; j += LANES) {
        const vec pairs = second * x.at[i] * unaligned(x.at + i + j);
        unaligned(to + j) = j ? pairs : pairs * first_of_pairs();
      }
    }
  }

  // The gradient of x [WIDE], from that of its features, which SLACK numbers hold, zeros after the last.
  static void gradient(const float* from, const float* d, float* out) {
    const Padded x(from);
    const float first = 1 / std::sqrt(std::sqrt(float(SIZE))), second = 1 / std::sqrt(float(SIZE));
    alignas(64) float total[WIDE + LANES] = {};
    ++d;
    for (int j = 0; j < SIZE; j += LANES) aligned(total + j) = first * unaligned(d + j);
    d += SIZE;
    for (int g = 0; g < SIZE; g += LANES) {
      vec own[LANES] = {};
      _Pragma("GCC unroll 16") for (int i = g; i < g + LANES && i < SIZE; d += SIZE - i++) {
        for (int j = 0; j < SIZE - i; j += LANES) {
          const vec pairs = second * (j ? unaligned(d + j) : unaligned(d + j) * first_of_pairs());
          own[i - g] += pairs * unaligned(x.at + i + j);
          unaligned(total + i + j) += x.at[i] * pairs;
        }
      }
      aligned(total + g) += sums_of<LANES>(own);
    }
    std::memcpy(out, total, WIDE * sizeof(float));
  }
};

}  // namespace
