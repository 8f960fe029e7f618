// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The dual-state delta rule token by token (dual_state.py has the formulas), for one CPU core per head.
//
// A state of M x KEY x BLOCK floats stays in the first-level cache and is passed over once a token, so that stepping
// runs at the speed of the vector units and needs no chunks. The columns of a state never mix, hence blocks of BLOCK
// columns. The backward pass recomputes the states, SEGMENT tokens at a time.
// Compiled for one KEY, VALUE, M (memories a head) and DELTA (0 writes v itself, not what it has over the memory).
// Layouts: q, k [B, T, H, KEY], v, o [B, T, H, VALUE], decay, beta, read [B, T, H, M], coupling [B, T, H, M, M], states
// [B, H, M, KEY, VALUE], skip and starts [B, T] (may be null). A token with starts != 0 begins from an empty state; one
// with skip != 0 is padding and does nothing else.

#include "kernel.h"

namespace {

constexpr int ROWS = rounded(KEY), PARTS = parts_of(4, M * ROWS, VALUE), BLOCK = PARTS * LANES;
constexpr int SEGMENT = 32;  // tokens whose states the backward pass holds at once
static_assert(VALUE % LANES == 0, "VALUE must be whole registers");

typedef RowOf<PARTS> Row;
typedef ColumnOf<KEY> Column;
struct State {
  Row of[M][ROWS];
};

#define EACH_MEMORY(a) _Pragma("GCC unroll 4") for (int a = 0; a < M; ++a)

void load_state(State& state, const float* from, int column) {
  std::memset(&state, 0, sizeof(State));
  for (int a = 0; from && a < M; ++a)
    for (int i = 0; i < KEY; ++i) load(state.of[a][i], from + (a * KEY + i) * VALUE + column);
}

void store_state(const State& state, float* to, int column) {
  for (int a = 0; a < M; ++a)
    for (int i = 0; i < KEY; ++i) store(to + (a * KEY + i) * VALUE + column, state.of[a][i]);
}

}  // namespace

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *beta, *read, *coupling, *state;
  const uint8_t *skip, *starts;
  int64_t batch, length, heads, reverse, threads;
};

struct Gradients {
  float *q, *k, *v;                       // written by the first direction, added to by the second
  float *decay, *beta, *read, *coupling;  // added to
  float* state;                                       // [B, H, M, KEY, VALUE]: in, that of the last state; out, of the first
};
}

namespace {

struct Token {
  Column k, q;
  const float *decay, *beta, *read, *coupling, *v;

  Token() {
    k.clear();
    q.clear();
  }

  void load(const Inputs& x, int64_t n) {
    k.load(x.k + n * KEY);
    q.load(x.q + n * KEY);
    decay = x.decay + n * M;
    beta = x.beta + n * M;
    read = x.read + n * M;
    coupling = x.coupling + n * M * M;
    v = x.v + n * VALUE;
  }
};

// found[a] = Z_a^T k, in the order of `advance`, so that a text read in pieces gives the same to the last bit.
void find(const State& state, const Column& k, Row (&found)[M]) {
  EACH_MEMORY(a) found[a] = Row{};
  for (int i = 0; i < ROWS; ++i) EACH_MEMORY(a) EACH_PART(p) found[a].part[p] += k.at[i] * state.of[a][i].part[p];
}

// errors[a] = v - decay_a Z_a^T k, from what k found.
inline void compare(const Token& now, int column, const Row (&found)[M], Row (&errors)[M]) {
  EACH_MEMORY(a) {
    load(errors[a], now.v + column);
    if (DELTA) EACH_PART(p) errors[a].part[p] -= now.decay[a] * found[a].part[p];
  }
}

// state <- the state behind the token; reads[a] = Z_a^T q; found = what the next token's k finds.
inline void advance(State& state, const Token& now, const Token& next, const Row (&errors)[M], Row (&reads)[M],
                    Row (&found)[M]) {
  Row writes[M] = {};
  float keep[M][M];
  EACH_MEMORY(b) EACH_PART(p) {
    const vec update = now.beta[b] * errors[b].part[p];
    EACH_MEMORY(a) writes[a].part[p] += now.coupling[a * M + b] * update;
  }
  EACH_MEMORY(a) EACH_MEMORY(b) keep[a][b] = now.coupling[a * M + b] * now.decay[b];
  EACH_MEMORY(a) reads[a] = found[a] = Row{};
  for (int i = 0; i < ROWS; ++i) EACH_PART(p) {
    vec fresh[M];
    EACH_MEMORY(a) {
      fresh[a] = now.k.at[i] * writes[a].part[p];
      EACH_MEMORY(b) fresh[a] += keep[a][b] * state.of[b][i].part[p];
      reads[a].part[p] += now.q.at[i] * fresh[a];
      if (DELTA) found[a].part[p] += next.k.at[i] * fresh[a];
    }
    EACH_MEMORY(a) state.of[a][i].part[p] = fresh[a];
  }
}

// What a token's gradients need beside the states before and after it.
struct Trace {
  Row errors[M], reads[M];
};

// grad, that of the state after the token, becomes that of the state before it; the gradients of its inputs are handed in.
void retreat(State& grad, const Token& now, const State& before, const State& after, const Trace& trace,
             const float* d_o, int column, int64_t n, const Inputs& x, const Gradients& d) {
  const bool adds = x.reverse || column;  // to what another direction or block of columns has left
  Row d_out, weighed[M], updates[M], d_updates[M] = {};
  vec d_coupling[M][M] = {};
  load(d_out, d_o + n * VALUE + column);
  EACH_MEMORY(a) {
    weighed[a] = now.read[a] * d_out;
    updates[a] = now.beta[a] * trace.errors[a];
  }
  for (int first = 0; first < ROWS; first += LANES) {
    vec queries[LANES];
    for (int j = 0; j < LANES; ++j) {
      const int i = first + j;
      const float q = now.q.at[i], k = now.k.at[i];
      queries[j] = vec{};
      EACH_PART(p) {
        vec leaked[M], written[M];
        EACH_MEMORY(a) {
          leaked[a] = grad.of[a][i].part[p] + q * weighed[a].part[p];
          written[a] = now.decay[a] * before.of[a][i].part[p] + k * updates[a].part[p];
          queries[j] += weighed[a].part[p] * after.of[a][i].part[p];
        }
        EACH_MEMORY(b) {
          vec d_written = now.coupling[b] * leaked[0];
          for (int a = 1; a < M; ++a) d_written += now.coupling[a * M + b] * leaked[a];
          EACH_MEMORY(a) d_coupling[a][b] += leaked[a] * written[b];
          d_updates[b].part[p] += k * d_written;
          grad.of[b][i].part[p] = d_written;
        }
      }
    }
    hand_in<KEY>(d.q + n * KEY, first, sums(queries), adds);
  }
  Row lost[M], d_v;
  vec d_decay[M] = {};
  d_v = Row{};
  if (x.reverse) load(d_v, d.v + n * VALUE + column);
  EACH_MEMORY(a) {
    d.read[n * M + a] += sum(dot(trace.reads[a], d_out));
    d.beta[n * M + a] += sum(dot(d_updates[a], trace.errors[a]));
    EACH_MEMORY(b) d.coupling[(n * M + a) * M + b] += sum(d_coupling[a][b]);
    d_updates[a] = now.beta[a] * d_updates[a];  // now that of the error
    lost[a] = now.decay[a] * d_updates[a];
    EACH_PART(p) d_v.part[p] += d_updates[a].part[p];
  }
  store(d.v + n * VALUE + column, d_v);
  for (int first = 0; first < ROWS; first += LANES) {
    vec keys[LANES];
    for (int j = 0; j < LANES; ++j) {
      const int i = first + j;
      keys[j] = vec{};
      EACH_MEMORY(a) EACH_PART(p) {
        vec& cell = grad.of[a][i].part[p];
        const vec old = before.of[a][i].part[p];
        vec d_kept = cell;
        keys[j] += cell * updates[a].part[p];
        if (DELTA) {
          keys[j] -= old * lost[a].part[p];
          d_kept -= now.k.at[i] * d_updates[a].part[p];
        }
        d_decay[a] += d_kept * old;
        cell = now.decay[a] * d_kept;
      }
    }
    hand_in<KEY>(d.k + n * KEY, first, sums(keys), adds);
  }
  EACH_MEMORY(a) d.decay[n * M + a] += sum(d_decay[a]);
}

// Runs over the tokens first .. last of a text from `state`, which stays behind the last of them.
template <typename See>
void run(const Inputs& x, const Tokens& tokens, int64_t h, int64_t first, int64_t last, int column, State& state,
         See see) {
  const State empty = {};
  Token both[2], none;
  Row found[M] = {};
  Trace trace;
  if (first < last) both[first % 2].load(x, tokens.at[first] * x.heads + h);
  if (DELTA && first < last) find(state, both[first % 2].k, found);
  for (int64_t s = first; s < last; ++s) {
    if (s + 1 < last) both[(s + 1) % 2].load(x, tokens.at[s + 1] * x.heads + h);
    if (tokens.begins[s]) {
      state = empty;
      EACH_MEMORY(a) found[a] = Row{};
    }
    const Token &now = both[s % 2], &next = s + 1 < last ? both[(s + 1) % 2] : none;
    compare(now, column, found, trace.errors);
    advance(state, now, next, trace.errors, trace.reads, found);
    see(s, now, trace);
  }
}

}  // namespace

extern "C" {

// Writes the reads to o, adds them where it reads backwards, and writes the last states to final_state.
void forward(const Inputs* in, float* o, float* final_state) {
  const Inputs x = *in;
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t task = 0; task < x.batch * x.heads; ++task) {
    const int64_t h = task % x.heads;
    const Tokens tokens(task / x.heads, x.length, x.skip, x.starts, x.reverse);
    State state;
    for (int column = 0; column < VALUE; column += BLOCK) {
      load_state(state, x.state ? x.state + task * M * KEY * VALUE : nullptr, column);
      run(x, tokens, h, 0, tokens.count(), column, state, [&](int64_t s, const Token& now, const Trace& trace) {
        float* const to = o + (tokens.at[s] * x.heads + h) * VALUE + column;
        Row total;
        total = Row{};
        if (x.reverse) load(total, to);
        EACH_MEMORY(a) EACH_PART(p) total.part[p] += now.read[a] * trace.reads[a].part[p];
        store(to, total);
      });
      if (tokens.ends_empty) state = State{};
      store_state(state, final_state + task * M * KEY * VALUE, column);
    }
  }
}

void backward(const Inputs* in, const float* d_o, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<State> entering, after(SEGMENT);
    Trace traces[SEGMENT];
    const State empty = {};
    State state, grad;
    Token now;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < x.batch * x.heads; ++task) {
      const int64_t h = task % x.heads;
      const Tokens tokens(task / x.heads, x.length, x.skip, x.starts, x.reverse);
      const int64_t count = tokens.count(), segments = (count + SEGMENT - 1) / SEGMENT;
      entering.resize(segments);
      for (int column = 0; column < VALUE; column += BLOCK) {
        load_state(state, x.state ? x.state + task * M * KEY * VALUE : nullptr, column);
        for (int64_t segment = 0; segment < segments; ++segment) {
          entering[segment] = state;
          if (segment + 1 < segments)
            run(x, tokens, h, segment * SEGMENT, (segment + 1) * SEGMENT, column, state,
                [](int64_t, const Token&, const Trace&) {});
        }
        load_state(grad, d.state + task * M * KEY * VALUE, column);
        if (tokens.ends_empty) grad = empty;
        for (int64_t segment = segments - 1; segment >= 0; --segment) {
          const int64_t first = segment * SEGMENT, last = count < first + SEGMENT ? count : first + SEGMENT;
          state = entering[segment];
          run(x, tokens, h, first, last, column, state, [&](int64_t s, const Token&, const Trace& trace) {
            traces[s - first] = trace;
            after[s - first] = state;
          });
          for (int64_t s = last - 1; s >= first; --s) {
            const int64_t n = tokens.at[s] * x.heads + h;
            const State& before = tokens.begins[s] ? empty : s == first ? entering[segment] : after[s - first - 1];
            now.load(x, n);
            retreat(grad, now, before, after[s - first], traces[s - first], d_o, column, n, x, d);
            if (tokens.begins[s]) grad = empty;
          }
        }
        store_state(grad, d.state + task * M * KEY * VALUE, column);
      }
    }
  }
}

}  // extern "C"
