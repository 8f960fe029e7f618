// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The delta rule with a decay per channel of the keys (kda.py) in blocks of at most 16 tokens, for one CPU core per head.
//
// With a_t the decays, f_t = a_1 ... a_t and l_t = a_(t+1) ... a_n inside a block of n tokens, all by channel,
//   A_ij = sum_c k_ic k_jc a_(j+1)c ... a_ic  (j < i)    P_ij = the same with q_i  (j <= i)
//   errors = v - (f k) S - A updates, updates = beta errors, o = (f q) S + P updates, S <- f_n S + (l k)^T updates.
// The products of decays are made one factor at a time: nothing is divided, and no number is larger than 1. The backward
// pass follows the same products from their ends, so that the gradient of a log decay has no terms that cancel.
//
// Compiled for one KEY, VALUE, SEGMENT, with M = DELTA = 1. Layouts as in delta_rule.cpp; decay holds the log decays
// [B, T, H, KEY], and so does its gradient.

#include "delta_blocks.h"

namespace {

#define EACH_GROUP(g) _Pragma("GCC unroll 4") for (int g = 0; g < KEYS; g += LANES)

struct Workspace : Rows {
  alignas(64) Keys decay, reading, leaving, scaled;  // a, f, l
  Pairs scores, inner;                               // P, -A
  Lanes beta;
  Values found, errors, updates, o;

  void load(const Inputs& x, const Tokens& tokens, const Block& block, int64_t head) {
    load_rows(x, tokens, block, head);
    for (int t = 0; t < count; ++t) {
      beta[t] = x.beta[at[t]];
      for (int g = 0; g < KEYS; g += LANES) aligned(decay[t] + g) = exponential(part_of<KEY>(x.decay + at[t] * KEY, g));
    }
  }

  void relate() {
    EACH_GROUP(g) {
      vec product = 1.f - vec{};
      for (int t = 0; t < count; ++t) aligned(reading[t] + g) = product *= aligned(decay[t] + g);
      product = 1.f - vec{};
      for (int t = count - 1; t >= 0; --t) {
        aligned(leaving[t] + g) = product;
        product *= aligned(decay[t] + g);
      }
    }
    std::memset(inner, 0, sizeof(inner));
    std::memset(scores, 0, sizeof(scores));
    for (int j = 0; j < count; ++j) {
      vec written[KEYS / LANES], of_q = {};
      vec to_k[TOKENS] = {}, to_q[TOKENS] = {};
      EACH_GROUP(g) {
        written[g / LANES] = aligned(k[j] + g);
        of_q += aligned(q[j] + g) * written[g / LANES];
      }
      to_q[j] = of_q;
      for (int i = j + 1; i < count; ++i) {
        vec by_k = {}, by_q = {};
        EACH_GROUP(g) {
          const vec left = written[g / LANES] *= aligned(decay[i] + g);
          by_k += aligned(k[i] + g) * left;
          by_q += aligned(q[i] + g) * left;
        }
        to_k[i] = by_k, to_q[i] = by_q;
      }
      alignas(64) Lanes sums;
      sum_each(to_k, sums);
      for (int i = j + 1; i < count; ++i) inner[i][j] = -sums[i];
      sum_each(to_q, sums);
      for (int i = j; i < count; ++i) scores[i][j] = sums[i];
    }
  }

  void look() {}

  void scale(const Keys& x, const Keys& by) {
    for (int t = 0; t < count; ++t)
      for (int g = 0; g < KEYS; g += LANES) aligned(scaled[t] + g) = aligned(x[t] + g) * aligned(by[t] + g);
  }

  void solve(const State& state) {
    if (!state.empty) {
      scale(k, reading);
      multiply<VALUE, KEYS, 1>(found[0], scaled[0], state.of[0], count, KEY);
    }
    for (int t = 0; t < count; ++t)
      for (int c = 0; c < VALUE; c += LANES)
        aligned(errors[t] + c) = state.empty ? vec(unaligned(values[t] + c)) : unaligned(values[t] + c) - aligned(found[t] + c);
    for (int first = 0; first < count; first += GROUP) {
      if (first) multiply<VALUE, TOKENS, 1, WHOLE, true>(errors[first], inner[first], updates[0], GROUP, first);
      for (int t = first; t < count && t < first + GROUP; ++t)
        for (int c = 0; c < VALUE; c += PARTS * LANES) {
          Row total = Row::at(errors[t] + c);
          for (int j = first; j < t; ++j) total.add(inner[t][j], Row::at(updates[j] + c));
          total.store(errors[t] + c);
          total.scale(beta[t]);
          total.store(updates[t] + c);
        }
    }
  }

  // after = the state behind the block that `before` enters; they may be the same
  void advance(const State& before, State& after) {
    const bool adds = !before.empty;
    if (adds) decayed(before, after);
    scale(k, leaving);
    after.write(0, scaled, updates, count, adds);
    after.empty = false;
  }

  void decayed(const State& from, State& to) const {
    for (int i = 0; i < KEY; ++i) {
      const float factor = reading[count - 1][i];
      for (int c = 0; c < VALUE; c += LANES) aligned(to.of[0] + i * VALUE + c) = factor * aligned(from.of[0] + i * VALUE + c);
    }
    std::memset(to.of[0] + KEY * VALUE, 0, (KEYS - KEY) * VALUE * sizeof(float));
  }

  void output(const Inputs&, const State& state, float* to) {
    multiply<VALUE, TOKENS, 1, LOWER>(o[0], scores[0], updates[0], count, count);
    if (!state.empty) {
      scale(q, reading);
      multiply<VALUE, KEYS, 1, WHOLE, true>(o[0], scaled[0], state.of[0], count, KEY);
    }
    for (int t = 0; t < count; ++t) hand_in_row<VALUE>(to + at[t] * VALUE, o[t], false);
  }
};

struct Backward : Workspace {
  alignas(64) float values_across[VALUE][TOKENS], keys_across[KEYS][TOKENS];
  Values d_updates, d_errors, entered;
  Pairs sights, d_inner;
  Keys d_q, d_k, d_decay, d_reading_q, d_reading_k, d_leaving, left;
  alignas(64) float through[KEYS];

  void retreat(const Inputs& x, const float* d_o, const Gradients& d, const State& before, State& grad) {
    for (int t = 0; t < count; ++t) std::memcpy(o[t], d_o + at[t] * VALUE, sizeof(o[t]));
    substitute(d, grad);
    follow_states(before, grad);
    follow_pairs();
    follow_decays();
    hand_in_keys(x, d, d_q, d_k);
    for (int t = 0; t < count; ++t) hand_in_row<KEY>(d.decay + at[t] * KEY, d_decay[t], false);
    leave(before, grad);
  }

 private:
  // The system of `solve` from its end.
  void substitute(const Gradients& d, const State& grad) {
    multiply<VALUE, 1, TOKENS, UPPER>(d_updates[0], scores[0], o[0], count, count);
    if (!grad.empty) {
      scale(k, leaving);
      multiply<VALUE, KEYS, 1, WHOLE, true>(d_updates[0], scaled[0], grad.of[0], count, KEY);
    }
    for (int first = (count - 1) / GROUP * GROUP; first >= 0; first -= GROUP) {
      const int end = std::min(first + GROUP, count);
      if (end < count)
        multiply<VALUE, 1, TOKENS, WHOLE, true>(d_updates[first], inner[end] + first, d_errors[end], GROUP, count - end);
      for (int t = end - 1; t >= first; --t) {
        vec strength = {};
        for (int c = 0; c < VALUE; c += PARTS * LANES) {
          Row total = Row::at(d_updates[t] + c);
          for (int i = t + 1; i < end; ++i) total.add(inner[i][t], Row::at(d_errors[i] + c));
          strength += total.dot(Row::at(errors[t] + c));
          total.scale(beta[t]);
          total.store(d_errors[t] + c);
          total.store(d.v + at[t] * VALUE + c);
          total.scale(-1);
          total.store(entered[t] + c);
        }
        d.beta[at[t]] = sum(strength);
      }
    }
  }

  // to = x y^T, for x [count, VALUE] and a state y
  void against(const State& y, const Values& x, Keys& to) {
    if (y.empty) {
      std::memset(to, 0, sizeof(to));
      return;
    }
    transpose<TOKENS, VALUE>(x[0], values_across[0]);
    multiply<TOKENS, VALUE, 1>(keys_across[0], y.of[0], values_across[0], KEYS, VALUE);
    transpose<KEYS, TOKENS>(keys_across[0], to[0]);
  }

  void follow_states(const State& before, const State& grad) {
    against(before, o, d_reading_q);
    against(before, entered, d_reading_k);
    against(grad, updates, d_leaving);
    std::memset(through, 0, sizeof(through));
    for (int i = 0; !before.empty && !grad.empty && i < KEYS; i += LANES) {
      vec sums[LANES] = {};
      _Pragma("GCC unroll 16") for (int r = 0; r < LANES; ++r) {
        sums[r] = dot(before.of[0] + (i + r) * VALUE, grad.of[0] + (i + r) * VALUE);
      }
      aligned(through + i) = sums_of<LANES>(sums) * aligned(reading[count - 1] + i);
    }
    transpose<TOKENS, VALUE>(updates[0], values_across[0]);
    multiply<TOKENS, VALUE, 1>(sights[0], o[0], values_across[0], count, VALUE);
    multiply<TOKENS, VALUE, 1>(d_inner[0], entered[0], values_across[0], count, VALUE);
  }

  // What the tokens of a block owe to each other: from P_ij to q_i, k_j and the decays between them, and from A_ij.
  void follow_pairs() {
    std::memset(d_q, 0, sizeof(d_q));
    std::memset(d_k, 0, sizeof(d_k));
    std::memset(d_decay, 0, sizeof(d_decay));
    for (int j = 0; j < count; ++j) {
      EACH_GROUP(g) {
        vec product = aligned(k[j] + g);
        aligned(d_q[j] + g) += sights[j][j] * product;
        for (int i = j + 1; i < count; ++i) {
          product *= aligned(decay[i] + g);
          aligned(left[i] + g) = product;
          aligned(d_q[i] + g) += sights[i][j] * product;
          aligned(d_k[i] + g) += d_inner[i][j] * product;
        }
        vec total = {};
        for (int i = count - 1; i > j; --i) {
          total += sights[i][j] * aligned(q[i] + g) + d_inner[i][j] * aligned(k[i] + g);
          aligned(d_decay[i] + g) += total * aligned(left[i] + g);
          total *= aligned(decay[i] + g);
        }
        aligned(d_k[j] + g) += total + sights[j][j] * aligned(q[j] + g);
      }
    }
  }

  // The products f and l, and what passes through the block.
  void follow_decays() {
    EACH_GROUP(g) {
      vec after = aligned(through + g);
      for (int t = count - 1; t >= 0; --t) {
        const vec f = aligned(reading[t] + g), by_q = f * aligned(d_reading_q[t] + g), by_k = f * aligned(d_reading_k[t] + g);
        after += by_q * aligned(q[t] + g) + by_k * aligned(k[t] + g);
        aligned(d_q[t] + g) += by_q;
        aligned(d_k[t] + g) += by_k;
        aligned(d_decay[t] + g) += after;
      }
      vec before = {};
      for (int t = 0; t < count; ++t) {
        const vec by_k = aligned(leaving[t] + g) * aligned(d_leaving[t] + g);
        aligned(d_decay[t] + g) += before;
        before += by_k * aligned(k[t] + g);
        aligned(d_k[t] + g) += by_k;
      }
    }
  }

  void leave(const State& before, State& grad) {
    if (before.empty) {
      grad.empty = true;
      return;
    }
    const bool adds = !grad.empty;
    if (adds) decayed(grad, grad);
    scale(q, reading);
    grad.write(0, scaled, o, count, adds);
    scale(k, reading);
    grad.write(0, scaled, entered, count, true);
    grad.empty = false;
  }
};

}  // namespace

#include "delta_driver.h"
