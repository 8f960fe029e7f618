// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Diagonal recurrences in blocks of at most 16 tokens, for one CPU core per head:
//     S <- diag(a) S + k v^T        o = scale S^T q, under NORMALIZED divided by z . q + eps with z <- diag(a) z + k
//
// With f_i the product of the decays of a block from its second token on, q~_i = scale q_i f_i and k~_j = k_j / f_j,
//     S' = a_1 S        o_i = S'^T q~_i + sum over j <= i of (q~_i . k~_j) v_j        S <- f_n (S' + sum of k~_j v_j^T)
// so that a block is a few small matrix products, whose operands stay in the first caches. Where f would fall below
// SMALLEST a new block begins, and so does every document: nothing overflows, nothing leaks.
//
// The backward pass keeps no states: D, the gradient of S, runs backwards (dk, dv and what dq owes to the block), then
// S forwards (the rest of dq). The gradient of a log decay g = log a follows from these: <D, S> changes at a token by
// q dq - k dk, row by row; its exact value is taken every ANCHOR blocks.
//
// Compiled for one KEY, VALUE (a multiple of 16), DECAY (0 none, 1 a number per head, 2 a number per key row), NORMALIZED,
// TAYLOR (0, or the size of q and k, of which a block makes KEY features: they never exist all at once).
// Layouts: q, k [B, T, H, SIZE], v, o [B, T, H, VALUE], decay [B, T, H] or [B, T, H, KEY], states [B, H, KEY, VALUE], or
// under NORMALIZED [B, H, KEY, VALUE + 1], whose last column is z, skip and starts [B, T] (may be null). A token with
// starts != 0 begins from an empty state; one with skip != 0 is padding and does nothing else.

#include "diagonal.h"

namespace {

// A block. Rows of tokens that a short one lacks hold what was there before: no sum reads them.
struct Workspace {
  alignas(64) float q[TOKENS][KEYS], k[TOKENS][KEYS], k_across[KEYS][TOKENS], v[TOKENS][VALUE];
  alignas(64) float v_across[VALUE][TOKENS], o[TOKENS][VALUE], across[VALUE][KEYS];
  alignas(64) float d_q[TOKENS][KEYS], d_k[TOKENS][KEYS], d_v[TOKENS][VALUE], size[TOKENS];
  alignas(64) float scores[TOKENS][TOKENS], d_scores[TOKENS][TOKENS];
  int64_t at[TOKENS];  // in [B, T, H]
  Factor kept[TOKENS], inverse[TOKENS], enter, leave;  // f_i, 1 / f_i, a_1, f_n
  alignas(64) float features[2][TAYLOR ? Map::SLACK : 1];

  void load(const Inputs& x, const Window& window, const Block& block, int64_t head) {
    for (int t = 0; t < block.count; ++t) {
      const int64_t n = at[t] = window.at(block.first + t, head);
      if (DECAY) {
        kept[t] = window.kept[block.first + t];
        inverse[t].invert(kept[t]);
      }
      const float *from_q = x.q + n * SIZE, *from_k = x.k + n * SIZE;
      if (TAYLOR) {
        Map::map(from_q, features[0]);
        Map::map(from_k, features[1]);
        from_q = features[0];
        from_k = features[1];
      }
      EACH_GROUP(g) {
        const vec a = part_of<KEY>(from_q, g), b = part_of<KEY>(from_k, g);
        aligned(q[t] + g) = float(x.scale) * (DECAY ? kept[t].rows(g) * a : a);
        aligned(k[t] + g) = DECAY ? inverse[t].rows(g) * b : b;
      }
      std::memcpy(v[t], x.v + n * VALUE, sizeof(v[t]));
    }
    if (DECAY) {
      enter.take(x.decay + at[0] * WIDTH);
      leave = kept[block.count - 1];
    }
  }

  // S', read by rows or across
  void enter_block(State& state, bool fresh, bool read_across) const {
    if (fresh) {
      state.empty();
    } else if (DECAY) {
      state.pending.multiply(enter);
      read_across ? state.settle_across() : state.settle();
    }
    state.pending.fill(1);
  }

  // q~_i . k~_j for j <= i
  void score(int count) {
    transpose<TOKENS, KEYS>(k[0], k_across[0]);
    multiply<TOKENS, KEYS, 1>(scores[0], q[0], k_across[0], count, KEY);
    keep_lower(scores, count);
  }

  float read_size(int t, const float* z) const {
    vec total = {};
    for (int j = 0; j < TOKENS; j += LANES) total += aligned(scores[t] + j);
    EACH_GROUP(g) total += aligned(q[t] + g) * aligned(z + g);
    return sum(total);
  }

  // The gradient of a token's q or k, from that of its features.
  template <bool ADDS>
  void give(const float* d, const float* from, float* to) {
    alignas(64) float found[rounded(SIZE)];
    std::memset(features[0], 0, sizeof(features[0]));
    std::memcpy(features[0], d, KEY * sizeof(float));
    Map::gradient(from, features[0], found);
    for (int g = 0; g < SIZE; g += LANES)
      ADDS ? add_to<SIZE>(to, g, aligned(found + g)) : write_to<SIZE>(to, g, aligned(found + g));
  }

  // Gradients of the reads, into o, and under NORMALIZED of the divisors, into size.
  void load_gradient(int count, const float* o_before, const float* d_o, const float* sizes) {
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      vec along = {};
      const float inverse = NORMALIZED ? 1 / sizes[n] : 1;
      for (int c = 0; c < VALUE; c += LANES) {
        const vec d = inverse * unaligned(d_o + n * VALUE + c);
        aligned(o[t] + c) = d;
        if (NORMALIZED) along += d * unaligned(o_before + n * VALUE + c);
      }
      if (NORMALIZED) size[t] = -sum(along);
    }
  }

  // The gradients of a block inside it and by what it writes; `state` is D before, and after it.
  void retreat(const Inputs& x, const Gradients& d, const Block& block, State& state) {
    const int count = block.count;
    if (DECAY) state.pending.multiply(leave);
    state.settle();
    transpose<KEYS, VALUE>(state.at, across[0]);
    transpose<TOKENS, VALUE>(v[0], v_across[0]);
    score(count);
    multiply<TOKENS, VALUE, 1>(d_scores[0], o[0], v_across[0], count, VALUE);
    for (int t = 0; NORMALIZED && t < count; ++t)
      for (int j = 0; j < TOKENS; j += LANES) aligned(d_scores[t] + j) += size[t];
    // No decay stands between a token and itself. In d_scores that share would be in q dq and in k dk, and leave its
    // rounding, perhaps all there is of the decays' gradient, in their difference: it comes in below.
    alignas(64) float own[TOKENS] = {};
    for (int t = 0; t < count; ++t) own[t] = d_scores[t][t];
    keep_below(d_scores, count);
    multiply<VALUE, KEYS, 1>(d_v[0], k[0], state.at, count, KEY);
    multiply<VALUE, 1, TOKENS, UPPER, true>(d_v[0], scores[0], o[0], count, count);
    multiply<KEYS, VALUE, 1>(d_k[0], v[0], across[0], count, VALUE);
    multiply<KEYS, 1, TOKENS, UPPER, true>(d_k[0], d_scores[0], q[0], count, count);
    multiply<KEYS, TOKENS, 1, LOWER>(d_q[0], d_scores[0], k[0], count, count);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      std::memcpy(d.v + n * VALUE, d_v[t], sizeof(d_v[t]));
      vec change = {};
      EACH_GROUP(g) {
        vec to_q = aligned(d_q[t] + g), to_k = aligned(d_k[t] + g);
        if (NORMALIZED) to_k += aligned(state.z + g);
        const vec part = aligned(q[t] + g) * to_q - aligned(k[t] + g) * to_k;
        if (DECAY == 2) write_to<KEY>(d.g + n * KEY, g, part);
        change += part;
        to_q += own[t] * aligned(k[t] + g);
        to_k += own[t] * aligned(q[t] + g);
        if (DECAY) {
          to_q *= kept[t].rows(g);
          to_k *= inverse[t].rows(g);
        }
        write_to<KEY>(TAYLOR ? d_q[t] : d.q + n * KEY, g, float(x.scale) * to_q);
        write_to<KEY>(TAYLOR ? d_k[t] : d.k + n * KEY, g, to_k);
      }
      if (DECAY == 1) d.g[n] = sum(change);
      if (TAYLOR) {
        give<false>(d_q[t], x.q + n * SIZE, d.q + n * SIZE);
        give<false>(d_k[t], x.k + n * SIZE, d.k + n * SIZE);
      }
    }
    multiply<VALUE, 1, KEYS, WHOLE, true>(state.at, q[0], o[0], KEYS, count);
    if (NORMALIZED) state.add_to_z(q, count, size);
    state.pending = enter;
    if (block.fresh) state.empty();
  }

  // What dq owes to the state that the block reads, which lies across.
  void follow(const Inputs& x, const Gradients& d, const Block& block, State& state) {
    const int count = block.count;
    enter_block(state, block.fresh, true);
    multiply<KEYS, VALUE, 1>(d_q[0], o[0], state.at, count, VALUE);
    for (int t = 0; t < count; ++t) {
      const int64_t n = at[t];
      vec change = {};
      EACH_GROUP(g) {
        vec to_q = aligned(d_q[t] + g);
        if (NORMALIZED) to_q += size[t] * aligned(state.z + g);
        const vec part = aligned(q[t] + g) * to_q;
        if (DECAY == 2) add_to<KEY>(d.g + n * KEY, g, part);
        change += part;
        if (DECAY) to_q *= kept[t].rows(g);
        if (TAYLOR)
          aligned(d_q[t] + g) = float(x.scale) * to_q;
        else
          add_to<KEY>(d.q + n * KEY, g, to_q, float(x.scale));
      }
      if (DECAY == 1) d.g[n] += sum(change);
      if (TAYLOR) give<true>(d_q[t], x.q + n * SIZE, d.q + n * SIZE);
    }
    multiply<KEYS, 1, VALUE, WHOLE, true>(state.at, v[0], k[0], VALUE, count);
    if (NORMALIZED) state.add_to_z(k, count, nullptr);
    state.pending = leave;
  }
};

// Both across: D, and S that is still to be multiplied by what is pending.
struct Leaving : State {
  void keep(State& gradient) {
    gradient.settle();
    transpose<KEYS, VALUE>(gradient.at, at);
    std::memcpy(z, gradient.z, sizeof(z));
  }

  // Sums over the columns of D S, row by row or of all rows.
  void meet(const State& state, double* ends) const {
    for (int g = 0; g < KEYS; g += LANES) {
      vec total = NORMALIZED ? aligned(z + g) * aligned(state.z + g) : vec{};
      for (int c = 0; c < VALUE; ++c) total += aligned(at + c * KEYS + g) * aligned(state.at + c * KEYS + g);
      total *= state.pending.rows(g);
      for (int i = g; i < g + LANES && i < KEY; ++i) ends[i % WIDTH] += total[i - g];
    }
  }
};

// Some heads of a row and their states.
struct Task {
  const Inputs& x;
  const Group group;
  const Tokens tokens;
  std::vector<State>& states;

  Task(const Inputs& x, const Groups& groups, int64_t index, std::vector<State>& held)
      : x(x), group(groups, index), tokens(group.row, x.length, x.skip, x.starts, false), states(held) {
    if (states.size() < size_t(groups.size)) states.resize(groups.size);
  }

  int64_t heads() const { return group.end - group.begin; }
  int64_t windows() const { return (tokens.count() + TOKENS - 1) / TOKENS; }
  State& state(int64_t head) const { return states[head - group.begin]; }
  int64_t place(int64_t head) const { return (group.row * x.heads + head) * KEY * COLUMNS; }  // in [B, H, KEY, COLUMNS]
};

inline double size_of(const double* x) {
  double total = 0;
  for (int64_t i = 0; i < WIDTH; ++i) total += std::fabs(x[i]);
  return total;
}

inline double size_of(const float* x) {
  if constexpr (WIDTH == 1) return std::fabs(*x);
  vec total = {};
  for (int i = 0; i < WIDTH; i += LANES) {
    const vec part = part_of<WIDTH>(x, i);
    total += part < vec{} ? -part : part;
  }
  return sum(total);
}

// d.g holds q dq - k dk of every token, by which <D, S> changes; the gradient of a log decay is <D, S> before its token.
// Between two places where that is known, an anchor (`ends` [anchor][head][WIDTH]) or an edge of a document, it is a
// running sum from either. Each token takes the side with the smaller numbers to add up: behind one with large numbers
// they are taken away again, and leave their rounding.
void decay_gradient(const Task& task, const Gradients& d, const std::vector<double>& ends, int64_t head) {
  std::vector<double> opening(WIDTH), nothing(WIDTH), running(WIDTH);  // opening: <D, S> of a given state
  const int64_t place = task.place(task.group.begin + head);
  for (int64_t i = 0; task.x.state && i < KEY * COLUMNS; ++i)
    opening[i / COLUMNS % WIDTH] += double(d.state[place + i]) * task.x.state[place + i];
  constexpr int64_t SPAN = ANCHOR * TOKENS;
  const Tokens& tokens = task.tokens;
  const auto at = [&](int64_t s) { return d.g + (tokens.at[s] * task.x.heads + task.group.begin + head) * WIDTH; };
  const auto known = [&](int64_t s) { return &ends[(s / SPAN * task.heads() + head) * WIDTH]; };
  double sizes[SPAN + 1];  // sums of the sizes before a token
  for (int64_t first = 0, end; first < tokens.count(); first = end) {
    for (end = first + 1; end < tokens.count() && end % SPAN && !tokens.begins[end];) ++end;
    const bool empty = tokens.begins[first] || (first == 0 && !task.x.state);
    const double* const left = empty ? nothing.data() : first ? known(first - 1) : opening.data();
    const double* const right = end == tokens.count() || end % SPAN == 0 ? known(end - 1) : nothing.data();
    sizes[0] = size_of(left);
    for (int64_t s = first; s < end; ++s) sizes[s - first + 1] = sizes[s - first] + size_of(at(s));
    const double all = sizes[end - first] + size_of(right);
    int64_t middle = first;
    while (middle < end && 2 * sizes[middle - first] <= all) ++middle;
    std::copy_n(left, WIDTH, running.begin());
    for (int64_t s = first; s < middle; ++s) {
      float* const g = at(s);
      for (int64_t i = 0; i < WIDTH; ++i) {
        const double before = running[i];
        running[i] -= g[i];
        g[i] = float(before);
      }
    }
    std::copy_n(right, WIDTH, running.begin());
    for (int64_t s = end - 1; s >= middle; --s) {
      float* const g = at(s);
      for (int64_t i = 0; i < WIDTH; ++i) g[i] = float(running[i] += g[i]);
    }
    if (empty) std::fill_n(at(first), WIDTH, 0.f);  // no state to decay
  }
}

thread_local Workspace work;
thread_local std::vector<State> held;

#define EACH_HEAD(head) for (int64_t head = task.group.begin; head < task.group.end; ++head)

}  // namespace

extern "C" {

// Writes the reads to o and under NORMALIZED what they were divided by to sizes [B, T, H] (neither for padding), and
// the last states to final_state.
void forward(const Inputs* in, float* o, float* final_state, float* sizes) {
  const Inputs x = *in;
  const Groups groups(x.batch, x.heads, x.threads, sizeof(State));
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Workspace& w = work;
    const Task task(x, groups, index, held);
    EACH_HEAD(head) task.state(head).load(x.state ? x.state + task.place(head) : nullptr);
    for (int64_t i = 0; i < task.windows(); ++i) {
      Window window(x, task.tokens, i);
      EACH_HEAD(head) {
        State& state = task.state(head);
        window.divide(head);
        for (int b = 0; b < window.blocks; ++b) {
          const Block& block = window.block[b];
          w.load(x, window, block, head);
          w.enter_block(state, block.fresh, false);
          multiply<VALUE, KEYS, 1>(w.o[0], w.q[0], state.at, block.count, KEY);
          w.score(block.count);
          multiply<VALUE, TOKENS, 1, LOWER, true>(w.o[0], w.scores[0], w.v[0], block.count, block.count);
          for (int t = 0; t < block.count; ++t) {
            const float size = NORMALIZED ? w.read_size(t, state.z) + float(x.eps) : 1;
            if (NORMALIZED && sizes) sizes[w.at[t]] = size;
            for (int c = 0; c < VALUE; c += LANES)
              unaligned(o + w.at[t] * VALUE + c) = NORMALIZED ? aligned(w.o[t] + c) / size : aligned(w.o[t] + c);
          }
          multiply<VALUE, TOKENS, 1, WHOLE, true>(state.at, w.k_across[0], w.v[0], KEYS, block.count);
          if (NORMALIZED) state.add_to_z(w.k, block.count, nullptr);
          state.pending = w.leave;
        }
      }
    }
    EACH_HEAD(head) {
      if (task.tokens.ends_empty) task.state(head).empty();
      task.state(head).store(final_state + task.place(head));
    }
  }
}

void backward(const Inputs* in, const float* o, const float* d_o, const float* sizes, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
  const Groups groups(x.batch, x.heads, x.threads, sizeof(State));
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Workspace& w = work;
    const Task task(x, groups, index, held);
    const int64_t windows = task.windows(), anchors = (windows + ANCHOR - 1) / ANCHOR;
    std::vector<Leaving> leaving(DECAY ? anchors * task.heads() : 0);
    std::vector<double> ends(anchors * task.heads() * WIDTH);
    const auto anchored = [&](int64_t i) { return DECAY && (i == windows - 1 || i % ANCHOR == ANCHOR - 1); };
    const auto anchor = [&](int64_t head, int64_t i) { return i / ANCHOR * task.heads() + head - task.group.begin; };

    EACH_HEAD(head) {
      task.state(head).load(d.state + task.place(head));
      if (task.tokens.ends_empty) task.state(head).empty();
    }
    for (int64_t i = windows - 1; i >= 0; --i) {
      Window window(x, task.tokens, i);
      EACH_HEAD(head) {
        if (anchored(i)) leaving[anchor(head, i)].keep(task.state(head));
        window.divide(head);
        for (int b = window.blocks - 1; b >= 0; --b) {
          w.load(x, window, window.block[b], head);
          w.load_gradient(window.block[b].count, o, d_o, sizes);
          w.retreat(x, d, window.block[b], task.state(head));
        }
      }
    }
    EACH_HEAD(head) {
      State& state = task.state(head);
      state.store(d.state + task.place(head));
      state.load(x.state ? x.state + task.place(head) : nullptr);
      std::memcpy(w.across[0], state.at, sizeof(w.across));
      transpose<KEYS, VALUE>(w.across[0], state.at);
    }
    for (int64_t i = 0; i < windows; ++i) {
      Window window(x, task.tokens, i);
      EACH_HEAD(head) {
        window.divide(head);
        for (int b = 0; b < window.blocks; ++b) {
          w.load(x, window, window.block[b], head);
          w.load_gradient(window.block[b].count, o, d_o, sizes);
          w.follow(x, d, window.block[b], task.state(head));
        }
        if (anchored(i)) leaving[anchor(head, i)].meet(task.state(head), &ends[anchor(head, i) * WIDTH]);
      }
    }
    for (int64_t head = 0; DECAY && head < task.heads(); ++head) decay_gradient(task, d, ends, head);
  }
}

}  // extern "C"
