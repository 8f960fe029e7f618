// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// A block of the delta rule: what delta_rule.cpp reads and writes, token by token and with the states.

#pragma once

#include "blocks.h"

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *beta, *read, *coupling, *state;
  const uint8_t *skip, *starts;
  double scale;
  int64_t batch, length, heads, reverse, threads;
};

struct Gradients {
  float *q, *k, *v;                       // written by the first direction, added to by the second
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

// A block as it is read. Rows of tokens that a short one lacks hold what was there before: no sum reads them.
struct Workspace {
  int count;
  int64_t at[TOKENS];  // in [B, T, H]
  alignas(64) Keys q, k, scaled;
  float across[KEYS][TOKENS];                                    // of k
  Lanes decay[M], beta[M], read[M], coupling[M][M], step[M][M];  // step: B
  Lanes rho[M], since[M][M], seen[M], leaving[M][M];             // since: P, seen: rho^T P, leaving: C_last N_last,j
  Pairs between[M][M], inner[M][M], weights[M];                  // N, -N (k_i . k_j), rho^T N (q_i . k_j)
  Pairs scores, key_scores;                                      // q_i . k_j for j <= i, k_i . k_j for j < i
  Values found[M], errors[M], updates[M], written[M], o;
  float last[M][M];  // C_last P_last

  void load(const Inputs& x, const Tokens& tokens, const Block& block, int64_t head) {
    count = block.count;
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t] = tokens.at[block.first + t] * x.heads + head;
      for (int g = 0; g < KEYS; g += LANES) {
        aligned(q[t] + g) = float(x.scale) * part_of<KEY>(x.q + n * KEY, g);
        aligned(k[t] + g) = part_of<KEY>(x.k + n * KEY, g);
      }
      EACH_MEMORY(a) {
        decay[a][t] = x.decay ? x.decay[n * M + a] : 1;
        beta[a][t] = x.beta[n * M + a];
        read[a][t] = x.read ? x.read[n * M + a] : 1;
        EACH_MEMORY(b) coupling[a][b][t] = x.coupling ? x.coupling[(n * M + a) * M + b] : a == b;
      }
    }
  }

  // B, P, N, what leaves the block, and the scores of keys with N
  void relate() {
    for (int t = 0; t < count; ++t) {
      EACH_PAIR(a, b) step[a][b][t] = t ? decay[a][t] * coupling[a][b][t - 1] : a == b ? decay[a][t] : 0;
      EACH_PAIR(a, b) {
        float total = t ? 0 : step[a][b][t];
        for (int c = 0; t && c < M; ++c) total += step[a][c][t] * since[c][b][t - 1];
        since[a][b][t] = total;
      }
    }
    EACH_TOKENS(g) {
      vec row[M][M] = {};
      for (int t = 0; t < count; ++t) {
        vec next[M][M];
        EACH_PAIR(a, b) {
          next[a][b] = a == b ? aligned(unit.at[t] + g) : vec{};
          EACH_MEMORY(c) next[a][b] += step[a][c][t] * row[c][b];
        }
        EACH_PAIR(a, b) aligned(between[a][b][t] + g) = row[a][b] = next[a][b];
      }
      EACH_PAIR(a, b) {
        vec total = {};
        EACH_MEMORY(c) total += coupling[a][c][count - 1] * row[c][b];
        aligned(leaving[a][b] + g) = total;
      }
    }
    EACH_PAIR(a, b) {
      last[a][b] = 0;
      EACH_MEMORY(c) last[a][b] += coupling[a][c][count - 1] * since[c][b][count - 1];
    }
    transpose<TOKENS, KEYS>(k[0], across[0]);
    if (!DELTA) return;
    multiply<TOKENS, KEYS, 1>(key_scores[0], k[0], across[0], count, KEY);
    keep_below(key_scores, count);
    for (int t = 0; t < count; ++t) EACH_TOKENS(g) EACH_PAIR(a, b) {
      aligned(inner[a][b][t] + g) = -aligned(key_scores[t] + g) * aligned(between[a][b][t] + g);
    }
  }

  // rho, the scores of queries, and what each read sees of each write
  void look() {
    EACH_TOKENS(g) {
      EACH_MEMORY(b) {
        vec total = {};
        EACH_MEMORY(a) total += aligned(coupling[a][b] + g) * aligned(read[a] + g);
        aligned(rho[b] + g) = total;
      }
      EACH_MEMORY(b) {
        vec total = {};
        EACH_MEMORY(a) total += aligned(rho[a] + g) * aligned(since[a][b] + g);
        aligned(seen[b] + g) = total;
      }
    }
    multiply<TOKENS, KEYS, 1>(scores[0], q[0], across[0], count, KEY);
    keep_lower(scores, count);
    for (int t = 0; t < count; ++t) EACH_TOKENS(g) EACH_MEMORY(b) {
      vec total = {};
      EACH_MEMORY(a) total += rho[a][t] * aligned(between[a][b][t] + g);
      aligned(weights[b][t] + g) = aligned(scores[t] + g) * total;
    }
  }

  // errors = v - S^T k behind the decay and the writes before, updates = beta errors; four tokens at a time
  void solve(const Inputs& x, const State& state) {
    const bool finds = DELTA && !state.empty;
    for (int b = 0; finds && b < M; ++b) multiply<VALUE, KEYS, 1>(found[b][0], k[0], state.of[b], count, KEY);
    for (int t = 0; t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) {
        vec total[M];
        EACH_MEMORY(a) total[a] = unaligned(x.v + at[t] * VALUE + c);
        for (int b = 0; finds && b < M; ++b) EACH_MEMORY(a) total[a] -= since[a][b][t] * aligned(found[b][t] + c);
        EACH_MEMORY(a) aligned(errors[a][t] + c) = total[a];
      }
    for (int first = 0; first < count; first += GROUP) {
      if (DELTA && first) EACH_PAIR(a, b) {
        multiply<VALUE, TOKENS, 1, WHOLE, true>(errors[a][first], inner[a][b][first], updates[b][0], GROUP, first);
      }
      for (int t = first; t < count && t < first + GROUP; ++t)
        for (int c = 0; c < VALUE; c += PARTS * LANES) {
          Row total[M];
          EACH_MEMORY(a) total[a] = Row::at(errors[a][t] + c);
          for (int j = first; DELTA && j < t; ++j) EACH_MEMORY(b) {
            const Row row = Row::at(updates[b][j] + c);
            EACH_MEMORY(a) total[a].add(inner[a][b][t][j], row);
          }
          EACH_MEMORY(a) {
            total[a].store(errors[a][t] + c);
            total[a].scale(beta[a][t]);
            total[a].store(updates[a][t] + c);
          }
        }
    }
  }

  // What a block's writes are worth when it ends.
  void write() {
    for (int t = 0; t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) EACH_MEMORY(a) {
        vec total = {};
        EACH_MEMORY(b) total += leaving[a][b][t] * aligned(updates[b][t] + c);
        aligned(written[a][t] + c) = total;
      }
  }

  // after = the state behind the block that `before` enters; they may be the same
  void advance(const State& before, State& after) {
    const bool adds = !before.empty;
    write();
    if (adds) after.mix(before, last);
    EACH_MEMORY(a) after.write(a, k, written[a], count, adds);
    after.empty = false;
  }

  void output(const Inputs& x, const State& state, float* to) {
    for (int b = 0; b < M; ++b) {
      b ? multiply<VALUE, TOKENS, 1, LOWER, true>(o[0], weights[b][0], updates[b][0], count, count)
        : multiply<VALUE, TOKENS, 1, LOWER>(o[0], weights[b][0], updates[b][0], count, count);
      if (state.empty) continue;
      for (int t = 0; t < count; ++t)
        for (int g = 0; g < KEYS; g += LANES) aligned(scaled[t] + g) = seen[b][t] * aligned(q[t] + g);
      multiply<VALUE, KEYS, 1, WHOLE, true>(o[0], scaled[0], state.of[b], count, KEY);
    }
    for (int t = 0; t < count; ++t) hand_in_row<VALUE>(to + at[t] * VALUE, o[t], x.reverse);
  }

  template <int SIZE>
  static void hand_in_row(float* to, const float* x, bool adds, float scale = 1) {
    for (int c = 0; c < SIZE; c += LANES)
      adds ? add_to<SIZE>(to, c, aligned(x + c), scale) : write_to<SIZE>(to, c, scale * aligned(x + c));
  }
};

}  // namespace
