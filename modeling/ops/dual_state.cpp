// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The dual-state delta rule token by token (dual_state.py has the formulas), for one CPU core per head.
//
// A state of M x KEY x BLOCK floats stays in the first-level cache, so that going token by token reaches the speed of
// the vector units and needs no chunks. The columns of a state never mix, hence blocks of BLOCK columns. Compiled for
// one KEY, VALUE, M (memories a head) and DELTA (0 writes v itself, not what it has over the memory).
// Layouts: q, k [B, T, H, KEY], v, o [B, T, H, VALUE], decay, beta, read [B, T, H, M], coupling [B, T, H, M, M], states
// [B, H, M, KEY, VALUE], skip and starts [B, T] (may be null). A token with starts != 0 begins from an empty state; one
// with skip != 0 is padding and does nothing else.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = VALUE % 32 == 0 ? 32 : 16;
constexpr int PARTS = BLOCK / LANES;
constexpr int SEGMENT = 32;  // tokens whose states the backward pass holds at once
static_assert(VALUE % LANES == 0, "VALUE must be a multiple of 16");

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

struct Row {  // BLOCK columns
  vec part[PARTS];
};
typedef Row State[M][KEY];

#define EACH_MEMORY(a) _Pragma("GCC unroll 4") for (int a = 0; a < M; ++a)
#define EACH_PART(p) _Pragma("GCC unroll 2") for (int p = 0; p < PARTS; ++p)

inline Row load(const float* x) {
  Row row;
  std::memcpy(&row, x, sizeof(Row));
  return row;
}

inline void add_to(float* x, const Row& row) {
  for (int j = 0; j < BLOCK; ++j) x[j] += row.part[j / LANES][j % LANES];
}

inline float sum(vec x) {
  float total = 0;
  for (int j = 0; j < LANES; ++j) total += x[j];
  return total;
}

inline float dot(const Row& x, const Row& y) {
  vec total = x.part[0] * y.part[0];
  for (int p = 1; p < PARTS; ++p) total += x.part[p] * y.part[p];
  return sum(total);
}

// Z <- the state after the token; errors[a] = v - decay_a Z_a^T k.
inline void step(State& state, const float* k, const Row& v, const float* decay, const float* beta,
                 const float* coupling, Row (&errors)[M]) {
  Row found[M] = {};
  for (int i = 0; DELTA && i < KEY; ++i)
    EACH_MEMORY(a) EACH_PART(p) found[a].part[p] += k[i] * state[a][i].part[p];
  Row writes[M] = {};
  EACH_MEMORY(b) EACH_PART(p) {
    errors[b].part[p] = DELTA ? v.part[p] - decay[b] * found[b].part[p] : v.part[p];
    const vec update = beta[b] * errors[b].part[p];
    EACH_MEMORY(a) writes[a].part[p] += coupling[a * M + b] * update;
  }
  float keep[M][M];
  EACH_MEMORY(a) EACH_MEMORY(b) keep[a][b] = coupling[a * M + b] * decay[b];
  for (int i = 0; i < KEY; ++i) EACH_PART(p) {
    vec next[M];
    EACH_MEMORY(a) {
      next[a] = k[i] * writes[a].part[p];
      EACH_MEMORY(b) next[a] += keep[a][b] * state[b][i].part[p];
    }
    EACH_MEMORY(a) state[a][i].part[p] = next[a];
  }
}

inline Row read_out(const State& state, const float* q, const float* read) {
  Row found[M] = {}, o = {};
  for (int i = 0; i < KEY; ++i)
    EACH_MEMORY(a) EACH_PART(p) found[a].part[p] += q[i] * state[a][i].part[p];
  EACH_MEMORY(a) EACH_PART(p) o.part[p] += read[a] * found[a].part[p];
  return o;
}

void load_state(State& state, const float* from, long column) {
  if (!from) {
    std::memset(&state, 0, sizeof(State));
    return;
  }
  for (int a = 0; a < M; ++a)
    for (int i = 0; i < KEY; ++i) state[a][i] = load(from + (a * KEY + i) * VALUE + column);
}

void store_state(const State& state, float* to, long column) {
  for (int a = 0; a < M; ++a)
    for (int i = 0; i < KEY; ++i) std::memcpy(to + (a * KEY + i) * VALUE + column, &state[a][i], sizeof(Row));
}

}  // namespace

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *beta, *read, *coupling, *state;
  const uint8_t *skip, *starts;
  int64_t batch, length, heads, reverse, threads;
};

// Adds the reads to o, and writes the last states to final_state.
void forward(const Inputs* in, float* o, float* final_state) {
  const Inputs x = *in;
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t task = 0; task < x.batch * x.heads; ++task) {
    const int64_t b = task / x.heads, h = task % x.heads;
    State state;
    Row errors[M];
    for (int column = 0; column < VALUE; column += BLOCK) {
      load_state(state, x.state ? x.state + task * M * KEY * VALUE : nullptr, column);
      for (int64_t s = 0; s < x.length; ++s) {
        const int64_t t = b * x.length + (x.reverse ? x.length - 1 - s : s), n = t * x.heads + h;
        if (x.starts && x.starts[t]) std::memset(&state, 0, sizeof(State));
        if (x.skip && x.skip[t]) continue;
        step(state, x.k + n * KEY, load(x.v + n * VALUE + column), x.decay + n * M, x.beta + n * M,
             x.coupling + n * M * M, errors);
        add_to(o + n * VALUE + column, read_out(state, x.q + n * KEY, x.read + n * M));
      }
      store_state(state, final_state + task * M * KEY * VALUE, column);
    }
  }
}

struct Gradients {
  float *q, *k, *v, *decay, *beta, *read, *coupling;  // added to
  float* state;                                       // [B, H, M, KEY, VALUE]: in, that of the last state; out, of the first
};

void backward(const Inputs* in, const float* d_o, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
  const int64_t segments = (x.length + SEGMENT - 1) / SEGMENT;
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<float> kept(segments * sizeof(State) / sizeof(float));
    std::vector<float> held((SEGMENT + 1) * sizeof(State) / sizeof(float));
    State* const entering = reinterpret_cast<State*>(kept.data());
    State* const states = reinterpret_cast<State*>(held.data());
    static const State empty = {};
    State state, grad;
    Row errors[SEGMENT][M];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < x.batch * x.heads; ++task) {
      const int64_t b = task / x.heads, h = task % x.heads;
      for (int column = 0; column < VALUE; column += BLOCK) {
        load_state(state, x.state ? x.state + task * M * KEY * VALUE : nullptr, column);
        for (int64_t segment = 0; segment + 1 < segments; ++segment) {
          std::memcpy(&entering[segment], &state, sizeof(State));
          for (int64_t s = segment * SEGMENT; s < (segment + 1) * SEGMENT; ++s) {
            const int64_t t = b * x.length + (x.reverse ? x.length - 1 - s : s), n = t * x.heads + h;
            if (x.starts && x.starts[t]) std::memset(&state, 0, sizeof(State));
            if (x.skip && x.skip[t]) continue;
            step(state, x.k + n * KEY, load(x.v + n * VALUE + column), x.decay + n * M, x.beta + n * M,
                 x.coupling + n * M * M, errors[0]);
          }
        }
        std::memcpy(&entering[segments - 1], &state, sizeof(State));
        load_state(grad, d.state + task * M * KEY * VALUE, column);
        for (int64_t segment = segments - 1; segment >= 0; --segment) {
          const int64_t first = segment * SEGMENT;
          const int64_t count = x.length - first < SEGMENT ? x.length - first : SEGMENT;
          std::memcpy(&states[0], &entering[segment], sizeof(State));
          for (int64_t s = 0; s < count; ++s) {
            const int64_t t = b * x.length + (x.reverse ? x.length - 1 - first - s : first + s);
            const int64_t n = t * x.heads + h;
            std::memcpy(&states[s + 1], &states[s], sizeof(State));
            if (x.starts && x.starts[t]) std::memset(&states[s + 1], 0, sizeof(State));
            if (x.skip && x.skip[t]) continue;
            step(states[s + 1], x.k + n * KEY, load(x.v + n * VALUE + column), x.decay + n * M, x.beta + n * M,
                 x.coupling + n * M * M, errors[s]);
          }
          for (int64_t s = count - 1; s >= 0; --s) {
            const int64_t t = b * x.length + (x.reverse ? x.length - 1 - first - s : first + s);
            const int64_t n = t * x.heads + h;
            const bool begins = x.starts && x.starts[t];
            if (x.skip && x.skip[t]) {
              if (begins) std::memset(&grad, 0, sizeof(State));
              continue;
            }
            const State& before = begins ? empty : states[s];
            const State& after = states[s + 1];
            const float *q = x.q + n * KEY, *k = x.k + n * KEY, *decay = x.decay + n * M, *beta = x.beta + n * M;
            const float *read = x.read + n * M, *coupling = x.coupling + n * M * M;
            const Row d_out = load(d_o + n * VALUE + column);
            Row weighed[M], updates[M], found[M] = {}, d_updates[M] = {};
            vec d_coupling[M][M] = {};
            EACH_MEMORY(a) EACH_PART(p) {
              weighed[a].part[p] = read[a] * d_out.part[p];
              updates[a].part[p] = beta[a] * errors[s][a].part[p];
            }
            for (int i = 0; i < KEY; ++i) {
              vec d_q = {};
              EACH_PART(p) {
                vec leaked[M], written[M];
                EACH_MEMORY(a) {
                  leaked[a] = grad[a][i].part[p] + q[i] * weighed[a].part[p];
                  written[a] = decay[a] * before[a][i].part[p] + k[i] * updates[a].part[p];
                  d_q += weighed[a].part[p] * after[a][i].part[p];
                  found[a].part[p] += q[i] * after[a][i].part[p];
                }
                EACH_MEMORY(b) {
                  vec d_written = coupling[b] * leaked[0];
                  for (int a = 1; a < M; ++a) d_written += coupling[a * M + b] * leaked[a];
                  EACH_MEMORY(a) d_coupling[a][b] += leaked[a] * written[b];
                  d_updates[b].part[p] += k[i] * d_written;
                  grad[b][i].part[p] = d_written;
                }
              }
              d.q[n * KEY + i] += sum(d_q);
            }
            Row d_errors[M], d_v = {};
            EACH_MEMORY(a) {
              d.read[n * M + a] += dot(found[a], d_out);
              d.beta[n * M + a] += dot(d_updates[a], errors[s][a]);
              EACH_MEMORY(b) d.coupling[(n * M + a) * M + b] += sum(d_coupling[a][b]);
              EACH_PART(p) {
                d_errors[a].part[p] = beta[a] * d_updates[a].part[p];
                d_v.part[p] += d_errors[a].part[p];
              }
            }
            add_to(d.v + n * VALUE + column, d_v);
            vec d_decay[M] = {};
            for (int i = 0; i < KEY; ++i) {
              vec d_k = {};
              EACH_MEMORY(a) EACH_PART(p) {
                const vec d_written = grad[a][i].part[p];
                d_k += d_written * updates[a].part[p];
                vec d_kept = d_written;
                if (DELTA) {
                  d_k -= decay[a] * before[a][i].part[p] * d_errors[a].part[p];
                  d_kept -= k[i] * d_errors[a].part[p];
                }
                d_decay[a] += d_kept * before[a][i].part[p];
                grad[a][i].part[p] = decay[a] * d_kept;
              }
              d.k[n * KEY + i] += sum(d_k);
            }
            EACH_MEMORY(a) d.decay[n * M + a] += sum(d_decay[a]);
            if (begins) std::memset(&grad, 0, sizeof(State));
          }
        }
        store_state(grad, d.state + task * M * KEY * VALUE, column);
      }
    }
  }
}

}  // extern "C"
