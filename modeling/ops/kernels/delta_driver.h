// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// The passes over the blocks of a row, forward and backward, for a `Workspace` and a `Backward` that a kernel defines.

#pragma once

namespace {

// Some heads of a row, block by block, and a state of each.
struct Task {
  const Inputs& x;
  Group group;
  const Tokens tokens;
  const std::vector<Block> blocks;
  std::vector<State>& states;

  Task(const Inputs& x, const Groups& groups, int64_t index, std::vector<State>& held)
      : x(x),
        group(groups, index),
        tokens(group.row, x.length, x.skip, x.starts, x.reverse),
        blocks(blocks_of(tokens)),
        states(held) {
    const int64_t shared = x.heads / x.parts;
    group.begin *= shared, group.end *= shared;
    if (states.size() < size_t(groups.size * shared)) states.resize(groups.size * shared);
  }

  // Groups of parts, each with all the values that it serves: one task adds up the gradients of a key.
  static Groups groups_of(const Inputs& x) {
    return {x.batch, x.parts, x.threads, int64_t(sizeof(State)) * (x.heads / x.parts)};
  }

  State& state(int64_t head) const { return states[head - group.begin]; }
  int64_t segment(size_t i) const { return blocks[i].first / SEGMENT; }

  // The end of the segment that begins with block i.
  size_t end(size_t i) const {
    const int64_t here = segment(i);
    while (i < blocks.size() && segment(i) == here) ++i;
    return i;
  }

  // Where a head's state lies in [B, H, M, KEY, VALUE], and the one that enters a segment in `kept`.
  int64_t place(int64_t head) const { return (group.row * x.heads + head) * M * KEY * VALUE; }
  int64_t kept_place(int64_t head, int64_t segment) const {
    return place(head) * ((x.length - 1) / SEGMENT) + (segment - 1) * M * KEY * VALUE;
  }
};

thread_local Backward work;
thread_local std::vector<State> held, entering;

#define EACH_HEAD(head) for (int64_t head = task.group.begin; head < task.group.end; ++head)

}  // namespace

extern "C" {

// Writes the reads to o, adds them where it reads backwards, and writes, if not null, the last states to final_state
// and those that enter segments to kept [B, H, (T - 1) / SEGMENT, M, KEY, VALUE].
void forward(const Inputs* in, float* o, float* final_state, float* kept) {
  const Inputs x = *in;
  const Groups groups = Task::groups_of(x);
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Workspace& w = work;
    const Task task(x, groups, index, held);
    EACH_HEAD(head) task.state(head).load(x.state ? x.state + task.place(head) : nullptr);
    for (size_t first = 0, end; first < task.blocks.size(); first = end) {
      end = task.end(first);
      EACH_HEAD(head) {
        State& state = task.state(head);
        if (kept && first) state.store(kept + task.kept_place(head, task.segment(first)));
        for (size_t i = first; i < end; ++i) {
          state.empty |= task.blocks[i].fresh;
          w.load(x, task.tokens, task.blocks[i], head);
          w.relate();
          w.look();
          w.solve(state);
          w.output(x, state, o);
          if (final_state || i + 1 < task.blocks.size()) w.advance(state, state);
        }
      }
    }
    if (final_state) EACH_HEAD(head) {
      task.state(head).empty |= task.tokens.ends_empty;
      task.state(head).store(final_state + task.place(head));
    }
  }
}

void backward(const Inputs* in, const float* d_o, const float* kept, const Gradients* out) {
  const Inputs x = *in;
  const Gradients d = *out;
  const Groups groups = Task::groups_of(x);
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
  for (int64_t index = 0; index < groups.total; ++index) {
    Backward& w = work;
    const Task task(x, groups, index, held);
    std::vector<size_t> boundaries = {0};  // of segments, in blocks
    while (boundaries.back() < task.blocks.size()) boundaries.push_back(task.end(boundaries.back()));
    EACH_HEAD(head) {
      task.state(head).load(d.state ? d.state + task.place(head) : nullptr);
      task.state(head).empty |= task.tokens.ends_empty;
    }
    for (size_t s = boundaries.size() - 1; s-- > 0;) {
      const size_t count = boundaries[s + 1] - boundaries[s];
      const Block* const blocks = &task.blocks[boundaries[s]];
      if (entering.size() < count) entering.resize(count);
      EACH_HEAD(head) {
        if (s)
          entering[0].load(kept + task.kept_place(head, task.segment(boundaries[s])));
        else
          entering[0].load(x.state ? x.state + task.place(head) : nullptr);
        for (size_t i = 0; i < count; ++i) {
          entering[i].empty |= blocks[i].fresh;
          if (i + 1 == count) break;
          w.load(x, task.tokens, blocks[i], head);
          w.relate();
          w.solve(entering[i]);
          w.advance(entering[i], entering[i + 1]);
        }
        for (size_t i = count; i-- > 0;) {
          w.load(x, task.tokens, blocks[i], head);
          w.relate();
          w.look();
          w.solve(entering[i]);
          w.retreat(x, d_o, d, entering[i], task.state(head));
        }
      }
    }
    if (d.state) EACH_HEAD(head) task.state(head).store(d.state + task.place(head));
  }
}

}  // extern "C"
