// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The delta rule token by token, for one CPU core per head:
//     S <- a S      u = beta (v - S^T k)      S <- S + k u^T      o = scale S^T q
//
// A state of KEY x BLOCK floats stays in the first-level cache and is passed over once a token, so that stepping runs
// at the speed of the vector units and needs neither chunks nor solves. The columns of a state never mix, hence blocks.
// The backward pass keeps no states: gradients of states run backwards (dk, dv), then states forwards (dq and the rest
// of dk), and the gradient of a log decay g = log a follows from these. For G = dL/dS after a token, <G, S> changes at a
// token by what reads and writes there, q dq - v dv; its exact value is taken every ANCHOR tokens.
//
// Compiled for one KEY, VALUE (a multiple of 16) and DECAY (0 none, 1 a number a head). Layouts as in recurrence.h.

#include "recurrence.h"

#include "kernel.h"

#include <algorithm>

namespace {

constexpr int ROWS = rounded(KEY), PARTS = parts_of(5, ROWS, VALUE), BLOCK = PARTS * LANES;
constexpr int CHAINS = PARTS >= 3 ? 1 : PARTS == 2 ? 2 : 4;  // independent sums, to hide the latency of an addition
constexpr int ANCHOR = 256, AHEAD = 4;
static_assert(VALUE % LANES == 0 && VALUE > 0, "VALUE must be whole registers");

typedef RowOf<PARTS> Row;
typedef ColumnOf<KEY> Column;
struct State {
  Row row[ROWS];
};

inline Row load(const float* x) {
  Row row;
  load(row, x);
  return row;
}

void load_state(State& state, const float* from, int column) {
  std::memset(&state, 0, sizeof(State));
  for (int i = 0; from && i < KEY; ++i) state.row[i] = load(from + i * VALUE + column);
}

void store_state(const State& state, float* to, int column) {
  for (int i = 0; i < KEY; ++i) store(to + i * VALUE + column, state.row[i]);
}

// What a token does to the rows of a state.
struct Token {
  Column k, q, ak;
  float decay, beta;

  Token() { std::memset(this, 0, sizeof(Token)); }

  void load(const Inputs& x, int64_t n, int64_t soon) {
    fetch<KEY>(x.k + soon * KEY);
    fetch<KEY>(x.q + soon * KEY);
    fetch<VALUE>(x.v + soon * VALUE);
    k.load(x.k + n * KEY);
    q.load(x.q + n * KEY, float(x.scale));
    decay = DECAY ? x.decay[n] : 1;
    beta = x.beta[n];
    for (int i = 0; i < ROWS; ++i) ak.at[i] = decay * k.at[i];
  }

  // decays, and nothing else
  void rest() {
    k.clear();
    ak.clear();
    decay = 1;
  }

  inline vec decayed(vec x) const { return DECAY ? decay * x : x; }
};

// In the order of `advance`, so that a text read in pieces gives the same to the last bit.
Row find(const State& state, const Column& ak) {
  Row found[CHAINS] = {};
  for (int i = 0; i < ROWS; ++i) EACH_PART(p) found[i % CHAINS].part[p] += ak.at[i] * state.row[i].part[p];
  return joined(found);
}

// state <- the state after the token, whose write is u; o = the read; found = what the next token's k finds.
inline void advance(State& state, const Token& now, const Token& next, const Row& u, Row& o, Row& found) {
  Row reads[CHAINS] = {}, finds[CHAINS] = {};
  for (int i = 0; i < ROWS; i += CHAINS)
    _Pragma("GCC unroll 4") for (int c = 0; c < CHAINS; ++c) EACH_PART(p) {
      vec& cell = state.row[i + c].part[p];
      const vec x = now.decayed(cell) + now.k.at[i + c] * u.part[p];
      cell = x;
      reads[c].part[p] += now.q.at[i + c] * x;
      finds[c].part[p] += next.ak.at[i + c] * x;
    }
  o = joined(reads);
  found = joined(finds);
}

// grad <- what the token `later`, whose error has the gradient d_error, leaves of it for the state before.
void pass_on(State& grad, const Token& later, const Row& d_error) {
  for (int i = 0; i < ROWS; ++i) EACH_PART(p) {
    vec& cell = grad.row[i].part[p];
    cell = later.decayed(cell) - later.ak.at[i] * d_error.part[p];
  }
}

// The gradient runs back over `later` and then over the token: d_u = that of its write; d_k gets its key's (`adds`: to
// what other columns left there).
inline void retreat(State& grad, const Token& later, const Row& d_error, const Token& now, const Row& d_o, const Row& u,
                    float* d_k, bool adds, Row& d_u) {
  Row total[CHAINS] = {};
  for (int first = 0; first < ROWS; first += LANES) {
    vec keys[LANES];
    _Pragma("GCC unroll 16") for (int j = 0; j < LANES; ++j) {
      const int i = first + j;
      keys[j] = vec{};
      EACH_PART(p) {
        vec& cell = grad.row[i].part[p];
        const vec x = later.decayed(cell) + now.q.at[i] * d_o.part[p] - later.ak.at[i] * d_error.part[p];
        cell = x;
        total[j % CHAINS].part[p] += now.k.at[i] * x;
        keys[j] += x * u.part[p];
      }
    }
    hand_in<KEY>(d_k, first, sums(keys), adds);
  }
  d_u = joined(total);
}

// As `advance`, for the gradients of q, and of k by what it found.
inline void follow(State& state, const Token& now, const Row& u, const Row& d_o, const Row& d_error, float scale,
                   float* d_q, bool adds, float* d_k) {
  constexpr int HALF = LANES / 2;  // as many sums as registers hold
  for (int first = 0; first < ROWS; first += LANES) {
    vec queries[LANES], found[LANES];
    for (int part = 0; part < LANES; part += HALF) {
      _Pragma("GCC unroll 16") for (int j = part; j < part + HALF; ++j) {
        const int i = first + j;
        queries[j] = found[j] = vec{};
        EACH_PART(p) {
          vec& cell = state.row[i].part[p];
          found[j] += cell * d_error.part[p];
          const vec x = now.decayed(cell) + now.k.at[i] * u.part[p];
          cell = x;
          queries[j] += x * d_o.part[p];
        }
      }
    }
    hand_in<KEY>(d_q, first, scale * sums(queries), adds);
    add_to<KEY>(d_k, first, sums(found), -now.decay);
  }
}

typedef double fine __attribute__((vector_size(LANES * sizeof(float))));
typedef float half __attribute__((vector_size(LANES / 2 * sizeof(float)), aligned(4), may_alias));

// sum of x y in doubles
template <int SIZE>
double product(const float* x, const float* y) {
  constexpr int STEP = LANES / 2;
  fine total = {};
  int i = 0;
  for (; i + STEP <= SIZE; i += STEP) {
    const half a = *reinterpret_cast<const half*>(x + i), b = *reinterpret_cast<const half*>(y + i);
    total += __builtin_convertvector(a, fine) * __builtin_convertvector(b, fine);
  }
  double found = 0;
  for (int j = 0; j < STEP; ++j) found += total[j];
  for (; i < SIZE; ++i) found += double(x[i]) * y[i];
  return found;
}

void decay_gradient(const Inputs& x, const Gradients& d, const Tokens& tokens, int64_t h,
                    const std::vector<double>& ends) {
  const int64_t count = tokens.count();
  double running = 0;
  for (int64_t s = count - 1; s >= 0; --s) {
    const int64_t n = tokens.at[s] * x.heads + h;
    if (s == count - 1 || s % ANCHOR == ANCHOR - 1) running = ends[s / ANCHOR];
    running += product<KEY>(x.q + n * KEY, d.q + n * KEY) - product<VALUE>(x.v + n * VALUE, d.v + n * VALUE);
    if (tokens.begins[s] || (s == 0 && !x.state)) running = 0;  // no state to decay
    d.g[n] = float(running);
  }
}

}  // namespace

extern "C" {

// Writes the reads to o (not those of padding), the last states to final_state and, if it is not null, v - S^T k of the
// delta rule to errors.
void forward(const Inputs* in, float* o, float* final_state, float* errors) {
  const Inputs x = *in;
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t task = 0; task < x.batch * x.heads; ++task) {
    const int64_t h = task % x.heads;
    const Tokens tokens(task / x.heads, x.length, x.skip, x.starts, false);
    const int64_t count = tokens.count();
    const State empty = {};
    State state;
    Token both[2], none;
    Row read, found;
    for (int column = 0; column < VALUE; column += BLOCK) {
      load_state(state, x.state ? x.state + task * KEY * VALUE : nullptr, column);
      if (count) both[0].load(x, tokens.at[0] * x.heads + h, tokens.at[0] * x.heads + h);
      found = find(state, both[0].ak);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t n = tokens.at[s] * x.heads + h;
        const Token& now = both[s % 2];
        if (s + 1 < count) both[(s + 1) % 2].load(x, tokens.at[s + 1] * x.heads + h, n + AHEAD * x.heads);
        if (tokens.begins[s]) {
          state = empty;
          found = Row{};
        }
        Row u = load(x.v + n * VALUE + column);
        EACH_PART(p) u.part[p] -= found.part[p];
        if (errors) store(errors + n * VALUE + column, u);
        u = now.beta * u;
        advance(state, now, s + 1 < count ? both[(s + 1) % 2] : none, u, read, found);
        store(o + n * VALUE + column, read);
      }
      if (tokens.ends_empty) state = empty;
      store_state(state, final_state + task * KEY * VALUE, column);
    }
  }
}

void backward(const Inputs* in, const float*, const float* d_o, const float* errors, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t task = 0; task < x.batch * x.heads; ++task) {
    const int64_t h = task % x.heads;
    const Tokens tokens(task / x.heads, x.length, x.skip, x.starts, false);
    const int64_t count = tokens.count(), anchors = (count + ANCHOR - 1) / ANCHOR;
    std::vector<State> leaving(DECAY ? anchors : 0);
    std::vector<double> ends(anchors);
    const State empty = {};
    State state;
    Token both[2];
    for (int column = 0; column < VALUE; column += BLOCK) {
      load_state(state, d.state + task * KEY * VALUE, column);
      if (tokens.ends_empty) state = empty;
      Row d_error = {}, d_u;
      both[count % 2].rest();
      for (int64_t s = count - 1; s >= 0; --s) {
        const int64_t n = tokens.at[s] * x.heads + h;
        Token &now = both[s % 2], &later = both[(s + 1) % 2];
        now.load(x, n, n - AHEAD * x.heads);
        if (DECAY && (s == count - 1 || s % ANCHOR == ANCHOR - 1)) {
          pass_on(state, later, d_error);
          later.rest();
          leaving[s / ANCHOR] = state;
        }
        const Row error = load(errors + n * VALUE + column);
        retreat(state, later, d_error, now, load(d_o + n * VALUE + column), now.beta * error, d.k + n * KEY, column, d_u);
        d.beta[n] += sum(dot(d_u, error));
        d_error = now.beta * d_u;
        store(d.v + n * VALUE + column, d_error);
        if (tokens.begins[s]) {
          state = empty;
          now.rest();
        }
      }
      pass_on(state, both[0], d_error);
      store_state(state, d.state + task * KEY * VALUE, column);

      load_state(state, x.state ? x.state + task * KEY * VALUE : nullptr, column);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t n = tokens.at[s] * x.heads + h;
        Token& now = both[0];
        now.load(x, n, n + AHEAD * x.heads);
        if (tokens.begins[s]) state = empty;
        const Row u = now.beta * load(errors + n * VALUE + column);
        d_error = load(d.v + n * VALUE + column);
        follow(state, now, u, load(d_o + n * VALUE + column), d_error, float(x.scale), d.q + n * KEY, column,
               d.k + n * KEY);
        if (DECAY && (s == count - 1 || s % ANCHOR == ANCHOR - 1))
          for (int i = 0; i < KEY; ++i) ends[s / ANCHOR] += sum(dot(leaving[s / ANCHOR].row[i], state.row[i]));
      }
    }
    if (DECAY) decay_gradient(x, d, tokens, h, ends);
  }
}

}  // extern "C"
