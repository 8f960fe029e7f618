// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// A block of the delta rule with M coupled memories: what delta_rule.cpp reads and writes, with the states.

#pragma once

#include "delta_blocks.h"

namespace {

struct Workspace : Rows {
  alignas(64) Keys scaled;
  float across[KEYS][TOKENS];                                    // of k
  Lanes decay[M], beta[M], read[M], coupling[M][M], step[M][M];  // step: B
  Lanes rho[M], since[M][M], seen[M], leaving[M][M];             // since: P, seen: rho^T P, leaving: C_last N_last,j
  Pairs between[M][M], inner[M][M], weights[M];                  // N, -N (k_i . k_j), rho^T N (q_i . k_j)
  Pairs scores, key_scores;                                      // q_i . k_j for j <= i, k_i . k_j for j < i
  Values found[M], errors[M], updates[M], written[M], o;
  float last[M][M];  // C_last P_last

  void load(const Inputs& x, const Tokens& tokens, const Block& block, int64_t head) {
    load_rows(x, tokens, block, head);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
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
  void solve(const State& state) {
    const bool finds = DELTA && !state.empty;
    for (int b = 0; finds && b < M; ++b) multiply<VALUE, KEYS, 1>(found[b][0], k[0], state.of[b], count, KEY);
    for (int t = 0; t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) {
        vec total[M];
        EACH_MEMORY(a) total[a] = unaligned(values[t] + c);
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
};

}  // namespace
