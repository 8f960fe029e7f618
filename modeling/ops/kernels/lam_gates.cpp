// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The gates of LAM with two memories (lam_gates.py): all that is done to their projection, token by token.
// N tokens, D directions, H heads, 7 numbers per head: write strength, 2 read weights, 2 decays, 2 leaks.

#include "kernel.h"

struct Inputs {
  const float *x, *k, *v;                            // [N, D, H, 7], [N, H, K], [N, H, V]
  const float *flux_weight, *decay_bias, *flux_bias;  // [H, K, V], [D, H, 2], [D, H]
  int64_t tokens, directions, heads, key_size, value_size, threads;
  double leak_max;
};

// Of the outputs [D, N, H, 2], the coupling [D, N, H, 2, 2].
struct Gates {
  float *g, *beta, *read, *coupling;
};

namespace {

constexpr int FIELDS = 7, READ = 1, DECAY = 3, LEAK = 5;

// min(x, 0) - log(1 + e), e = exp(-|x|) <= 1, by 2 artanh(e / (2 + e)).
inline vec log_sigmoid(vec x) {
  const vec zero = {}, e = exponential(x < zero ? x : -x), s = e / (2 + e), square = s * s;
  vec y = 2.f / 15 - zero;
  for (const float c : {2.f / 13, 2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3, 2.f}) y = y * square + c;
  return (x < zero ? x : zero) - s * y;
}

// k^T W v, two rows of W at a time.
inline float bilinear(const float* k, const float* weight, const float* v, int64_t keys, int64_t values) {
  vec total = {};
  for (int64_t j = 0; j < values; j += LANES) {
    vec even = {}, odd = {};
    int64_t i = 0;
    for (; i + 1 < keys; i += 2) {
      even += k[i] * take(weight + i * values, j, values);
      odd += k[i + 1] * take(weight + (i + 1) * values, j, values);
    }
    if (i < keys) even += k[i] * take(weight + i * values, j, values);
    total += (even + odd) * take(v, j, values);
  }
  return sum(total);
}

using Row = std::vector<float>;

Row room(int64_t size) { return Row((size + LANES - 1) / LANES * LANES); }

template <typename Function>
inline void each(Row& to, const Row& from, Function f) {
  for (size_t j = 0; j < to.size(); j += LANES)
    *reinterpret_cast<loose*>(&to[j]) = f(*reinterpret_cast<const loose*>(&from[j]));
}

// What both passes know of a token: sigmoids of all 7 D H numbers, log decays and the first memory's share of a write.
struct Token {
  const Inputs& in;
  Row x, open, z, g, flux, psi;

  explicit Token(const Inputs& in)
      : in(in),
        x(room(in.directions * in.heads * FIELDS)),
        open(x.size()),
        z(room(in.directions * in.heads * 2)),
        g(z.size()),
        flux(room(in.directions * in.heads)),
        psi(flux.size()) {}

  void read(int64_t n) {
    const int64_t heads = in.heads, size = in.directions * heads;
    std::memcpy(x.data(), in.x + n * size * FIELDS, size * FIELDS * sizeof(float));
    each(open, x, sigmoid);
    for (int64_t h = 0; h < heads; ++h) {
      const float dot = bilinear(in.k + (n * heads + h) * in.key_size, in.flux_weight + h * in.key_size * in.value_size,
                                 in.v + (n * heads + h) * in.value_size, in.key_size, in.value_size);
      for (int64_t d = 0; d < in.directions; ++d) flux[d * heads + h] = dot + in.flux_bias[d * heads + h];
    }
    for (int64_t i = 0; i < size; ++i)
      for (int m = 0; m < 2; ++m) z[2 * i + m] = in.decay_bias[2 * i + m] + x[i * FIELDS + DECAY + m];
    each(g, z, log_sigmoid);
    each(psi, flux, sigmoid);
  }
};

// The place of a head in the outputs.
inline int64_t place(const Inputs& in, int64_t n, int64_t i) {
  return 2 * ((i / in.heads * in.tokens + n) * in.heads + i % in.heads);
}

}  // namespace

extern "C" {

void forward(const Inputs* inputs, const Gates* gates) {
  const Inputs in = *inputs;
  const Gates to = *gates;
#pragma omp parallel num_threads(in.threads)
  {
    Token token(in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < in.tokens; ++n) {
      token.read(n);
      for (int64_t i = 0; i < in.directions * in.heads; ++i) {
        const float *const x = &token.x[i * FIELDS], *const open = &token.open[i * FIELDS], psi = token.psi[i];
        const float fast = float(in.leak_max) * open[LEAK], slow = float(in.leak_max) * open[LEAK + 1];
        const float shares[2] = {psi, 1 - psi}, coupling[4] = {1 - fast, fast, slow, 1 - slow};
        const int64_t at = place(in, n, i);
        for (int m = 0; m < 2; ++m) {
          to.g[at + m] = token.g[2 * i + m];
          to.beta[at + m] = open[0] * shares[m];
          to.read[at + m] = x[READ + m];
        }
        std::memcpy(to.coupling + 2 * at, coupling, sizeof coupling);
      }
    }
  }
}

// `flux` [N, D, H] gets the gradients of the sums that the first memory's share is the sigmoid of.
void backward(const Inputs* inputs, const Gates* gradients, float* dx, float* flux) {
  const Inputs in = *inputs;
  const Gates from = *gradients;
  const int64_t size = in.directions * in.heads;
#pragma omp parallel num_threads(in.threads)
  {
    Token token(in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < in.tokens; ++n) {
      token.read(n);
      float* const d_flux = flux + n * size;
      for (int64_t i = 0; i < size; ++i) {
        const float* const open = &token.open[i * FIELDS];
        const float psi = token.psi[i], strength = open[0];
        const int64_t at = place(in, n, i);
        const float *const d_beta = from.beta + at, *const d_coupling = from.coupling + 2 * at;
        const float leaks[2] = {d_coupling[1] - d_coupling[0], d_coupling[2] - d_coupling[3]};
        float* const to = dx + (n * size + i) * FIELDS;
        to[0] = (d_beta[0] * psi + d_beta[1] * (1 - psi)) * strength * (1 - strength);
        d_flux[i] = (d_beta[0] - d_beta[1]) * strength * psi * (1 - psi);
        for (int m = 0; m < 2; ++m) {
          const float leak = open[LEAK + m];
          to[READ + m] = from.read[at + m];
          to[LEAK + m] = leaks[m] * float(in.leak_max) * leak * (1 - leak);
        }
      }
      // The slope of log(sigmoid(z)) is sigmoid(-z).
      for (float& z : token.z) z = -z;
      each(token.g, token.z, sigmoid);
      for (int64_t i = 0; i < size; ++i)
        for (int m = 0; m < 2; ++m)
          dx[(n * size + i) * FIELDS + DECAY + m] = from.g[place(in, n, i) + m] * token.g[2 * i + m];
    }
  }
}

}  // extern "C"
