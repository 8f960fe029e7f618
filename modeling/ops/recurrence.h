// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// What Python hands to the kernels of ops/recurrence.py.
//
// Layouts: q, k [B, T, H, KEY], v, o [B, T, H, VALUE], decay [B, T, H] or [B, T, H, KEY], beta [B, T, H], states
// [B, H, KEY, VALUE], skip and starts [B, T] (may be null). A token with starts != 0 begins from an empty state; one
// with skip != 0 is padding and does nothing else.

#pragma once

#include <cstdint>

extern "C" {

struct Inputs {
  const float *q, *k, *v, *decay, *beta, *state;
  const uint8_t *skip, *starts;
  double scale, eps;
  int64_t batch, length, heads, threads;
};

struct Gradients {
  float *q, *k, *v, *g;  // written
  float *beta;           // added to
  float* state;          // in, that of the last state; out, of the first
};
}
