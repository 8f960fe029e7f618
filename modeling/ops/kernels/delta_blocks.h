// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Blocks of the delta rules: what Python hands over, the states of a head, and the rows of q, k and v that a block reads.

#pragma once

#include <cmath>

#include "blocks.h"

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *beta, *read, *coupling, *state;
  const uint8_t *skip, *starts;
  double scale, eps;  // eps < 0: q and k are taken as they are; else times 1 / sqrt(x . x + eps)
  int64_t batch, length, heads, key_heads, reverse, threads;
  int64_t parts;  // heads in the gradients of q and k, a multiple of key_heads and a divisor of heads
  int64_t row[3], token[3];  // of q, k and v: numbers from one row of the batch to the next, and from token to token
};

struct Gradients {
  // [B, T, parts, KEY] and [B, T, heads, VALUE], written by the first direction and head of a part, added to by others
  float *q, *k, *v;
  float *decay, *beta, *read, *coupling;  // written; null where the input is
  float* state;                           // in, that of the last state; out, of the first; null where neither counts
};
}

namespace {

constexpr int GROUP = 4;  // tokens of a triangular system that are solved one by one
constexpr int KEYS = rounded(KEY);
static_assert(VALUE % LANES == 0 && VALUE > 0, "VALUE must be whole registers");

// The largest number of vectors, `wanted` at most, that divides a row of values.
constexpr int parts_of(int wanted) { return VALUE / LANES % wanted == 0 ? wanted : parts_of(wanted - 1); }
constexpr int PARTS = parts_of(SUMS / 2 / M ? SUMS / 2 / M : 1);

typedef float Lanes[TOKENS];  // a number for each token
typedef float Pairs[TOKENS][TOKENS];
typedef float Keys[TOKENS][KEYS];
typedef float Values[TOKENS][VALUE];

#define EACH_MEMORY(a) _Pragma("GCC unroll 4") for (int a = 0; a < M; ++a)
#define EACH_PAIR(a, b) EACH_MEMORY(a) EACH_MEMORY(b)
#define EACH_TOKENS(g) _Pragma("GCC unroll 4") for (int g = 0; g < TOKENS; g += LANES)

// The memories of a head, or their gradients. Those of an empty one are zeros that nobody has written.
struct State {
  alignas(64) float of[M][KEYS * VALUE];
  bool empty;

  State() {}  // leaves them unwritten

  void load(const float* from) {
    empty = !from;
    for (int a = 0; from && a < M; ++a) {
      std::memcpy(of[a], from + a * KEY * VALUE, KEY * VALUE * sizeof(float));
      std::memset(of[a] + KEY * VALUE, 0, (KEYS - KEY) * VALUE * sizeof(float));
    }
  }

  void store(float* to) const {
    for (int a = 0; a < M; ++a) {
      if (empty)
        std::memset(to + a * KEY * VALUE, 0, KEY * VALUE * sizeof(float));
      else
        std::memcpy(to + a * KEY * VALUE, of[a], KEY * VALUE * sizeof(float));
    }
  }

  // The memories of `from` mixed: a takes by[a][b] of b.
  void mix(const State& from, const float (&by)[M][M]) {
    for (int i = 0; i < KEYS * VALUE; i += LANES) {
      vec old[M];
      EACH_MEMORY(b) old[b] = aligned(from.of[b] + i);
      EACH_MEMORY(a) {
        vec total = by[a][0] * old[0];
        for (int b = 1; b < M; ++b) total += by[a][b] * old[b];
        aligned(of[a] + i) = total;
      }
    }
  }

  // memory a (+)= x^T y, for x [count, KEYS] and y [count, VALUE]
  void write(int a, const Keys& x, const Values& y, int count, bool adds) {
    adds ? multiply<VALUE, 1, KEYS, WHOLE, true>(of[a], x[0], y[0], KEYS, count)
         : multiply<VALUE, 1, KEYS>(of[a], x[0], y[0], KEYS, count);
  }
};

struct Block {
  int64_t first;  // of the tokens of a row
  int count;
  bool fresh;  // begins from an empty state
};

std::vector<Block> blocks_of(const Tokens& tokens) {
  std::vector<Block> blocks;
  for (int64_t s = 0; s < tokens.count(); ++s) {
    if (tokens.begins[s] || blocks.empty() || blocks.back().count == TOKENS)
      blocks.push_back({s, 0, bool(tokens.begins[s])});
    ++blocks.back().count;
  }
  return blocks;
}

struct Unit {
  alignas(64) Pairs at = {};
  constexpr Unit() {
    for (int i = 0; i < TOKENS; ++i) at[i][i] = 1;
  }
};
constexpr Unit unit;

// PARTS vectors of a row of values.
struct Row {
  vec part[PARTS];

  static Row at(const float* x) {
    Row row;
    EACH_PART(p) row.part[p] = unaligned(x + p * LANES);
    return row;
  }
  void store(float* x) const { EACH_PART(p) unaligned(x + p * LANES) = part[p]; }
  void scale(float a) { EACH_PART(p) part[p] *= a; }
  void add(float a, const Row& x) { EACH_PART(p) part[p] += a * x.part[p]; }
  vec dot(const Row& x) const {  // still to be summed over the lanes
    vec total = part[0] * x.part[0];
    for (int p = 1; p < PARTS; ++p) total += part[p] * x.part[p];
    return total;
  }
};

inline vec dot(const float* x, const float* y) {  // of VALUE numbers, still to be summed over the lanes
  vec total = {};
  for (int c = 0; c < VALUE; c += LANES) total += aligned(x + c) * aligned(y + c);
  return total;
}

// The sums over the lanes of a register for each token.
inline void sum_each(const vec (&x)[TOKENS], Lanes& to) {
  EACH_TOKENS(g) aligned(to + g) = sums_of<LANES>(x + g);
}

// Where the rows of a block lie, with q and k as the rule takes them. `heads / key_heads` heads of values in a row share
// one of keys. Rows of tokens that a short block lacks hold what was there before: no sum reads them.
struct Rows {
  int count;
  int64_t at[TOKENS], key_at[TOKENS];  // in [B, T, heads] and [B, T, parts]
  const float* values[TOKENS];
  bool adds;  // to gradients of q and k: another head or direction has written them
  alignas(64) Keys q, k;
  Lanes q_inverse, k_inverse;  // of the norms

  void load_rows(const Inputs& x, const Tokens& tokens, const Block& block, int64_t head) {
    count = block.count;
    const int64_t key_head = head / (x.heads / x.key_heads), shared = x.heads / x.parts;
    adds = x.reverse || head % shared;
    for (int t = 0; t < count; ++t) {
      const int64_t n = tokens.at[block.first + t], row = n / x.length, token = n - row * x.length;
      at[t] = n * x.heads + head;
      key_at[t] = n * x.parts + head / shared;
      values[t] = x.v + row * x.row[2] + token * x.token[2] + head * VALUE;
      q_inverse[t] = load_key(q[t], x.q + row * x.row[0] + token * x.token[0] + key_head * KEY, x.eps, x.scale);
      k_inverse[t] = load_key(k[t], x.k + row * x.row[1] + token * x.token[1] + key_head * KEY, x.eps, 1);
    }
  }

  // Gradients of the rows as the rule takes them -> of those that were given.
  void hand_in_keys(const Inputs& x, const Gradients& d, Keys& d_q, Keys& d_k) const {
    for (int t = 0; t < count; ++t) {
      hand_in_key(d.q + key_at[t] * KEY, d_q[t], q[t], q_inverse[t], x.eps, x.scale);
      hand_in_key(d.k + key_at[t] * KEY, d_k[t], k[t], k_inverse[t], x.eps, 1);
    }
  }

 private:
  static float load_key(float* to, const float* from, double eps, double scale) {
    vec total = {};
    for (int g = 0; g < KEYS; g += LANES) {
      const vec part = part_of<KEY>(from, g);
      aligned(to + g) = part;
      total += part * part;
    }
    const float inverse = eps < 0 ? 1 : 1 / std::sqrt(sum(total) + float(eps));
    for (int g = 0; g < KEYS; g += LANES) aligned(to + g) *= float(scale) * inverse;
    return inverse;
  }

  // y = x / |x| has the gradient (dy - y (y . dy)) / |x|; `taken` is scale y.
  void hand_in_key(float* to, const float* d, const float* taken, float inverse, double eps, double scale) const {
    vec total = {};
    for (int g = 0; eps >= 0 && g < KEYS; g += LANES) total += aligned(taken + g) * aligned(d + g);
    const float along = sum(total) / float(scale);
    for (int g = 0; g < KEYS; g += LANES) {
      vec part = float(scale) * aligned(d + g);
      if (eps >= 0) part = inverse * (part - along * aligned(taken + g));
      adds ? add_to<KEY>(to, g, part) : write_to<KEY>(to, g, part);
    }
  }
};

template <int SIZE>
inline void hand_in_row(float* to, const float* x, bool adds) {
  for (int c = 0; c < SIZE; c += LANES)
    adds ? add_to<SIZE>(to, c, aligned(x + c)) : write_to<SIZE>(to, c, aligned(x + c));
}

}  // namespace
