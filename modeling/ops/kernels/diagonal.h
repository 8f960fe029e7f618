// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Of diagonal recurrences: what Python hands over, a state and its decay, and where blocks of tokens begin.

#pragma once

#include "taylor.h"

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *state;
  const uint8_t *skip, *starts;
  double scale, eps;
  int64_t batch, length, heads, threads;
};

struct Gradients {
  float *q, *k, *v, *g;  // written
  float* state;          // in, that of the last state; out, of the first
};
}

namespace {

constexpr int KEYS = rounded(KEY), COLUMNS = VALUE + NORMALIZED;  // of a state outside
constexpr int SIZE = TAYLOR ? TAYLOR : KEY;                       // of q and k outside
using Map = Taylor<TAYLOR ? TAYLOR : 1>;
static_assert(!TAYLOR || KEY == Map::FEATURES, "KEY must be the number of features");
constexpr int ANCHOR = 16, WIDTH = DECAY == 2 ? KEY : 1;          // windows; numbers of a log decay
constexpr float SMALLEST = 2e-9f;                                 // exp(-20)
static_assert(VALUE % LANES == 0 && VALUE > 0, "VALUE must be whole registers");

#define EACH_GROUP(g) _Pragma("GCC unroll 4") for (int g = 0; g < KEYS; g += LANES)

// What the rows of a state are multiplied by; 1 for the rows that only fill up a register.
struct Factor {
  static constexpr int SIZE = DECAY == 2 ? KEYS : LANES;
  alignas(64) float at[SIZE];

  void fill(float x) {
    for (int g = 0; g < SIZE; g += LANES) aligned(at + g) = x - vec{};
  }
  void take(const float* x) {
    if (DECAY == 2) {
      for (int g = 0; g < SIZE; g += LANES) aligned(at + g) = part_of<KEY>(x, g, 1);
    } else {
      fill(*x);
    }
  }
  void multiply(const Factor& other) {
    for (int g = 0; g < SIZE; g += LANES) aligned(at + g) *= aligned(other.at + g);
  }
  void invert(const Factor& other) {
    for (int g = 0; g < SIZE; g += LANES) aligned(at + g) = 1 / aligned(other.at + g);
  }
  bool above(float limit) const {
    bool all = true;
    for (int g = 0; g < SIZE; g += LANES) all &= !any(aligned(at + g) < limit - vec{});
    return all;
  }
  float row(int i) const { return at[DECAY == 2 ? i : 0]; }
  vec rows(int i) const { return aligned(at + (DECAY == 2 ? i : 0)); }
};

// The state of a head, or its gradient: [KEYS][VALUE], or across [VALUE][KEYS]; its rows are still to be multiplied by
// `pending`.
struct State {
  alignas(64) float at[KEYS * VALUE], z[KEYS];
  Factor pending;

  void empty() {
    std::memset(at, 0, sizeof(at));
    std::memset(z, 0, sizeof(z));
    pending.fill(1);  // 0 times the NaN of another document is no 0
  }

  void load(const float* from) {
    empty();
    for (int i = 0; from && i < KEY; ++i) {
      std::memcpy(at + i * VALUE, from + i * COLUMNS, VALUE * sizeof(float));
      if (NORMALIZED) z[i] = from[i * COLUMNS + VALUE];
    }
  }

  void store(float* to) {
    settle();
    for (int i = 0; i < KEY; ++i) {
      std::memcpy(to + i * COLUMNS, at + i * VALUE, VALUE * sizeof(float));
      if (NORMALIZED) to[i * COLUMNS + VALUE] = z[i];
    }
  }

  void settle() {
    if (!DECAY) return;
    for (int i = 0; i < KEY; ++i)
      for (int c = 0; c < VALUE; c += LANES) aligned(at + i * VALUE + c) *= pending.row(i);
    settle_z();
  }

  void settle_across() {
    if (!DECAY) return;
    for (int c = 0; c < VALUE; ++c) EACH_GROUP(g) aligned(at + c * KEYS + g) *= pending.rows(g);
    settle_z();
  }

  void add_to_z(const float (&rows)[TOKENS][KEYS], int count, const float* weights) {
    for (int t = 0; t < count; ++t) EACH_GROUP(g) aligned(z + g) += (weights ? weights[t] : 1) * aligned(rows[t] + g);
  }

 private:
  void settle_z() {
    EACH_GROUP(g) aligned(z + g) *= pending.rows(g);
    pending.fill(1);
  }
};

struct Block {
  int first, count;  // of the tokens of a window
  bool fresh;        // begins from an empty state
};

// f_i of the tokens of a window; large keys would not fit on the stack.
thread_local Factor decays[TOKENS];

// 16 tokens of a row, the same for all heads, and the blocks of one head in them.
struct Window {
  const Inputs& x;
  const Tokens& tokens;
  int64_t first;
  int count, blocks = 0;
  Block block[TOKENS];
  Factor* const kept = decays;

  Window(const Inputs& x, const Tokens& tokens, int64_t index)
      : x(x), tokens(tokens), first(index * TOKENS), count(std::min<int64_t>(TOKENS, tokens.count() - first)) {}

  int64_t at(int t, int64_t head) const { return tokens.at[first + t] * x.heads + head; }

  void divide(int64_t head) {
    blocks = 0;
    for (int t = 0; t < count; ++t) {
      bool joins = t && !tokens.begins[first + t];
      if (DECAY && joins) {
        kept[t].take(x.decay + at(t, head) * WIDTH);
        kept[t].multiply(kept[t - 1]);
        joins = kept[t].above(SMALLEST);
      }
      if (joins) {
        ++block[blocks - 1].count;
      } else {
        block[blocks++] = {t, 1, bool(tokens.begins[first + t])};
        kept[t].fill(1);
      }
    }
  }
};

}  // namespace
