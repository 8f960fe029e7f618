// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The delta rule with M coupled memories (dual_state.py; one memory is that of delta_rule.py) in blocks of at most 16
// tokens, for one CPU core per head. dual_state.py has the formulas of its chunk form, docs/derivations/lam.md those of
// the backward pass; the letters are theirs.
//
// A block is a few small matrix products and one triangular system. Every document begins a block. The forward pass
// leaves the state that enters every SEGMENT tokens; the backward pass recomputes those between, a segment at a time, in
// the second-level cache. A core reads a segment of all its heads before the next one, for they lie side by side.
//
// Compiled for one KEY, VALUE, M (memories per head), DELTA (0 writes v itself, not the error against the memory), SEGMENT.
// Layouts: q, k [B, T, H, KEY], v, o [B, T, H, VALUE], decay, beta, read [B, T, H, M], coupling [B, T, H, M, M], states
// [B, H, M, KEY, VALUE], skip and starts [B, T] (may be null). A token with starts != 0 begins from an empty state; one
// with skip != 0 is padding and does nothing else. Null decays and reads are 1, a null coupling leaks nothing.

#include "delta_rule.h"

namespace {

// A block, and what its gradients are made of.
struct Backward : Workspace {
  alignas(64) float values_across[VALUE][TOKENS];
  Values d_updates[M], d_errors[M], d_written[M], entered[M];
  float reads[M][KEYS][TOKENS], d_across[KEYS][TOKENS], q_across[KEYS][TOKENS];
  Pairs sights[M], errors_updates[M][M], d_between[M][M], d_scores, d_key_scores;
  Keys d_q, d_k;
  Lanes d_rho[M], d_beta[M], d_since[M][M], d_leaving[M][M], d_step[M][M], d_decay[M], d_read[M], d_coupling[M][M];

  // Gradients of a block: `grad`, that of the state behind it, becomes that of `before`, which enters it.
  void retreat(const Inputs& x, const float* d_o, const Gradients& d, const State& before, State& grad) {
    for (int t = 0; t < count; ++t) std::memcpy(o[t], d_o + at[t] * VALUE, sizeof(o[t]));
    if (!grad.empty) write();
    substitute(x, d, before, grad);
    follow_values(before, grad);
    follow_pairs();
    follow_steps(before, grad);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      EACH_MEMORY(a) {
        d.beta[n * M + a] = d_beta[a][t];
        if (d.decay) d.decay[n * M + a] = d_decay[a][t];
        if (d.read) d.read[n * M + a] = d_read[a][t];
        if (d.coupling) EACH_MEMORY(b) d.coupling[(n * M + a) * M + b] = d_coupling[a][b][t];
      }
    }
    hand_in_keys(x, d, d_q, d_k);
    leave(before, grad);
  }

 private:
  // The system of `solve` from its end: gradients of the updates and of the errors.
  void substitute(const Inputs& x, const Gradients& d, const State& before, const State& grad) {
    EACH_MEMORY(b) multiply<VALUE, 1, TOKENS, UPPER>(d_updates[b][0], weights[b][0], o[0], count, count);
    for (int a = 0; !grad.empty && a < M; ++a)
      multiply<VALUE, KEYS, 1>(d_written[a][0], k[0], grad.of[a], count, KEY);
    for (int t = 0; !grad.empty && t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) EACH_MEMORY(b) {
        vec total = aligned(d_updates[b][t] + c);
        EACH_MEMORY(a) total += leaving[a][b][t] * aligned(d_written[a][t] + c);
        aligned(d_updates[b][t] + c) = total;
      }
    for (int first = (count - 1) / GROUP * GROUP; first >= 0; first -= GROUP) {
      const int end = std::min(first + GROUP, count);
      if (DELTA && end < count) EACH_PAIR(a, b) {
        multiply<VALUE, 1, TOKENS, WHOLE, true>(d_updates[b][first], inner[a][b][end] + first, d_errors[a][end], GROUP,
                                                count - end);
      }
      for (int t = end - 1; t >= first; --t) {
        vec strength[M] = {};
        for (int c = 0; c < VALUE; c += PARTS * LANES) {
          Row total[M], d_v = {};
          EACH_MEMORY(b) total[b] = Row::at(d_updates[b][t] + c);
          for (int i = t + 1; DELTA && i < end; ++i) EACH_MEMORY(a) {
            const Row row = Row::at(d_errors[a][i] + c);
            EACH_MEMORY(b) total[b].add(inner[a][b][i][t], row);
          }
          float* const to = d.v + at[t] * VALUE + c;
          if (x.reverse) d_v = Row::at(to);
          EACH_MEMORY(b) {
            strength[b] += total[b].dot(Row::at(errors[b][t] + c));
            total[b].scale(beta[b][t]);
            total[b].store(d_errors[b][t] + c);
            d_v.add(1, total[b]);
          }
          d_v.store(to);
        }
        EACH_MEMORY(b) d_beta[b][t] = sum(strength[b]);
      }
    }
    for (int t = 0; DELTA && !before.empty && t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES) EACH_MEMORY(b) {
        vec total = {};
        EACH_MEMORY(a) total -= since[a][b][t] * aligned(d_errors[a][t] + c);
        aligned(entered[b][t] + c) = total;
      }
  }

  // What queries and keys owe to the states, and sums over values: of reads with P and of writes with what leaves.
  void follow_values(const State& before, const State& grad) {
    std::memset(d_across, 0, sizeof(d_across));
    transpose<TOKENS, VALUE>(o[0], values_across[0]);
    transpose<TOKENS, KEYS>(q[0], q_across[0]);
    EACH_MEMORY(b) {
      if (before.empty) {
        EACH_MEMORY(a) std::memset(d_since[a][b], 0, sizeof(Lanes));
        continue;
      }
      multiply<TOKENS, VALUE, 1>(reads[b][0], before.of[b], values_across[0], KEYS, VALUE);
      EACH_TOKENS(g) {
        vec total = {};
        for (int i = 0; i < KEYS; ++i) {
          aligned(d_across[i] + g) += aligned(seen[b] + g) * aligned(reads[b][i] + g);
          total += aligned(q_across[i] + g) * aligned(reads[b][i] + g);
        }
        EACH_MEMORY(a) aligned(d_since[a][b] + g) = aligned(rho[a] + g) * total;
        EACH_MEMORY(a) {
          const vec part = aligned(since[a][b] + g) * total;
          aligned(d_rho[a] + g) = b ? aligned(d_rho[a] + g) + part : part;
        }
      }
      for (int a = 0; DELTA && a < M; ++a) {
        alignas(64) Lanes met;
        vec sums[TOKENS] = {};
        for (int t = 0; t < count; ++t) sums[t] = dot(d_errors[a][t], found[b][t]);
        sum_each(sums, met);
        EACH_TOKENS(g) aligned(d_since[a][b] + g) -= aligned(met + g);
      }
    }
    if (before.empty) std::memset(d_rho, 0, sizeof(d_rho));
    transpose<KEYS, TOKENS>(d_across[0], d_q[0]);

    std::memset(d_across, 0, sizeof(d_across));
    EACH_MEMORY(a) {
      if (DELTA && !before.empty) {
        transpose<TOKENS, VALUE>(entered[a][0], values_across[0]);
        multiply<TOKENS, VALUE, 1, WHOLE, true>(d_across[0], before.of[a], values_across[0], KEYS, VALUE);
      }
      if (grad.empty) {
        EACH_MEMORY(b) std::memset(d_leaving[a][b], 0, sizeof(Lanes));
        continue;
      }
      transpose<TOKENS, VALUE>(written[a][0], values_across[0]);
      multiply<TOKENS, VALUE, 1, WHOLE, true>(d_across[0], grad.of[a], values_across[0], KEYS, VALUE);
      EACH_MEMORY(b) {
        vec sums[TOKENS] = {};
        for (int t = 0; t < count; ++t) sums[t] = dot(d_written[a][t], updates[b][t]);
        sum_each(sums, d_leaving[a][b]);
      }
    }
    transpose<KEYS, TOKENS>(d_across[0], d_k[0]);
  }

  // What the tokens of a block owe to each other.
  void follow_pairs() {
    EACH_MEMORY(b) {
      transpose<TOKENS, VALUE>(updates[b][0], values_across[0]);
      multiply<TOKENS, VALUE, 1>(sights[b][0], o[0], values_across[0], count, VALUE);
      keep_lower(sights[b], count);
      for (int a = 0; DELTA && a < M; ++a) {
        multiply<TOKENS, VALUE, 1>(errors_updates[a][b][0], d_errors[a][0], values_across[0], count, VALUE);
        keep_below(errors_updates[a][b], count);
      }
    }
    vec d_reads[M][TOKENS] = {};
    for (int t = 0; t < count; ++t) EACH_TOKENS(g) {
      vec to_scores = {}, to_keys = {};
      EACH_PAIR(a, b) {
        const vec n = aligned(between[a][b][t] + g), sight = aligned(sights[b][t] + g);
        const vec score = aligned(scores[t] + g);
        vec to_between = rho[a][t] * score * sight;
        to_scores += rho[a][t] * n * sight;
        d_reads[a][t] += score * n * sight;
        if (DELTA) {
          const vec met = aligned(errors_updates[a][b][t] + g);
          to_between -= aligned(key_scores[t] + g) * met;
          to_keys -= n * met;
        }
        aligned(d_between[a][b][t] + g) = to_between;
      }
      aligned(d_scores[t] + g) = to_scores;
      aligned(d_key_scores[t] + g) = to_keys;
    }
    EACH_MEMORY(a) {
      alignas(64) Lanes total;
      sum_each(d_reads[a], total);
      EACH_TOKENS(g) aligned(d_rho[a] + g) += aligned(total + g);
    }
    multiply<KEYS, TOKENS, 1, LOWER, true>(d_q[0], d_scores[0], k[0], count, count);
    multiply<KEYS, 1, TOKENS, UPPER, true>(d_k[0], d_scores[0], q[0], count, count);
    if (!DELTA) return;
    multiply<KEYS, TOKENS, 1, LOWER, true>(d_k[0], d_key_scores[0], k[0], count, count);
    multiply<KEYS, 1, TOKENS, UPPER, true>(d_k[0], d_key_scores[0], k[0], count, count);
  }

  // Back through the products of small matrices to the gates.
  void follow_steps(const State& before, const State& grad) {
    const int end = count - 1;
    EACH_TOKENS(g) {
      EACH_MEMORY(a) {
        vec total = {};
        EACH_MEMORY(b) total += aligned(coupling[a][b] + g) * aligned(d_rho[b] + g);
        aligned(d_read[a] + g) = total;
        EACH_MEMORY(b) aligned(d_coupling[a][b] + g) = aligned(read[a] + g) * aligned(d_rho[b] + g);
      }
    }
    if (!grad.empty) {  // C_last P_last and C_last N_last
      float d_last[M][M];
      EACH_PAIR(a, b) {
        vec total = {};
        for (int i = 0; !before.empty && i < KEYS * VALUE; i += LANES)
          total += aligned(grad.of[a] + i) * aligned(before.of[b] + i);
        d_last[a][b] = sum(total);
      }
      EACH_PAIR(a, c) {
        vec total = {};
        EACH_MEMORY(b) {
          EACH_TOKENS(g) {
            total += aligned(d_leaving[a][b] + g) * aligned(between[c][b][end] + g);
            aligned(d_between[c][b][end] + g) += coupling[a][c][end] * aligned(d_leaving[a][b] + g);
          }
          if (before.empty) continue;
          d_coupling[a][c][end] += d_last[a][b] * since[c][b][end];
          d_since[c][b][end] += coupling[a][c][end] * d_last[a][b];
        }
        d_coupling[a][c][end] += sum(total);
      }
    }
    vec totals[M][M][TOKENS] = {};
    EACH_TOKENS(g) {
      vec row[M][M] = {};
      for (int t = end; t > 0; --t) {
        EACH_PAIR(a, b) row[a][b] += aligned(d_between[a][b][t] + g);
        vec next[M][M] = {};
        EACH_PAIR(a, c) EACH_MEMORY(b) {
          totals[a][c][t] += row[a][b] * aligned(between[c][b][t - 1] + g);
          next[c][b] += step[a][c][t] * row[a][b];
        }
        EACH_PAIR(a, b) row[a][b] = next[a][b];
      }
    }
    EACH_PAIR(a, c) sum_each(totals[a][c], d_step[a][c]);
    for (int t = end; t >= 0; --t) {
      EACH_MEMORY(a) d_decay[a][t] = t ? 0 : d_since[a][a][0];
      for (int a = 0; t && a < M; ++a) EACH_MEMORY(c) {
        float& total = d_step[a][c][t];
        EACH_MEMORY(b) {
          total += d_since[a][b][t] * since[c][b][t - 1];
          d_since[c][b][t - 1] += step[a][c][t] * d_since[a][b][t];
        }
        d_decay[a][t] += total * coupling[a][c][t - 1];
        d_coupling[a][c][t - 1] += total * decay[a][t];
      }
    }
  }

  void leave(const State& before, State& grad) {
    if (before.empty) {
      grad.empty = true;
      return;
    }
    const bool adds = !grad.empty;
    float turned[M][M];
    EACH_PAIR(a, b) turned[a][b] = last[b][a];
    if (adds) grad.mix(grad, turned);
    EACH_MEMORY(b) {
      for (int t = 0; t < count; ++t)
        for (int c = 0; c < VALUE; c += LANES) aligned(written[b][t] + c) = seen[b][t] * aligned(o[t] + c);
      grad.write(b, q, written[b], count, adds);
      if (DELTA) grad.write(b, k, entered[b], count, true);
    }
    grad.empty = false;
  }
};

}  // namespace

#include "delta_driver.h"
