// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// Small matrix products between blocks of tokens and states, all of them in the caches of a core.

#pragma once

#include "kernel.h"

namespace {

constexpr int TOKENS = 16;           // of a block at most
constexpr int SUMS = REGISTERS / 2;  // the other registers hold operands

inline vec& aligned(float* x) { return *reinterpret_cast<vec*>(x); }
inline const vec& aligned(const float* x) { return *reinterpret_cast<const vec*>(x); }
inline loose& unaligned(float* x) { return *reinterpret_cast<loose*>(x); }
inline const loose& unaligned(const float* x) { return *reinterpret_cast<const loose*>(x); }

// LANES of SIZE numbers, `beyond` after the last.
template <int SIZE>
inline vec part_of(const float* x, int first, float beyond = 0) {
  if (first + LANES <= SIZE) return unaligned(x + first);
  vec found = beyond - vec{};
  std::memcpy(&found, x + first, (SIZE - first) * sizeof(float));
  return found;
}

// Whether a comparison holds anywhere.
template <class Lanes>
inline bool any(Lanes holds) {
  uint64_t words[sizeof(Lanes) / 8], found = 0;
  std::memcpy(words, &holds, sizeof(Lanes));
  for (const uint64_t word : words) found |= word;
  return found;
}

enum Shape { WHOLE, LOWER, UPPER };

// ROWS rows and PARTS vectors of `multiply`, from row `first` on.
template <int ROWS, int PARTS, int COLUMNS, int DOWN, int ALONG, Shape SHAPE, bool ADDS>
inline void tile(float* out, const float* x, const float* y, int first, int count) {
  vec total[ROWS][PARTS];
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) EACH_PART(p) {
    total[r][p] = ADDS ? aligned(out + (first + r) * COLUMNS + p * LANES) : vec{};
  }
  const int end = SHAPE == LOWER && first + ROWS < count ? first + ROWS : count;
  for (int i = SHAPE == UPPER ? first : 0; i < end; ++i) {
    vec row[PARTS];
    EACH_PART(p) row[p] = aligned(y + i * COLUMNS + p * LANES);
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) {
      const float factor = x[(first + r) * DOWN + i * ALONG];
      EACH_PART(p) total[r][p] += factor * row[p];
    }
  }
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) EACH_PART(p) {
    aligned(out + (first + r) * COLUMNS + p * LANES) = total[r][p];
  }
}

// PARTS vectors of every row: tall tiles while there are rows, then tiles of 4.
template <int PARTS, int COLUMNS, int DOWN, int ALONG, Shape SHAPE, bool ADDS>
inline void strip(float* out, const float* x, const float* y, int rows, int count) {
  constexpr int TALL = SUMS / PARTS / 4 * 4;
  int r = 0;
  for (; r + TALL <= rows; r += TALL) tile<TALL, PARTS, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out, x, y, r, count);
  for (; r < rows; r += 4) tile<4, PARTS, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out, x, y, r, count);
}

// out [rows, COLUMNS] = x y, or out + x y, where x(r, i) = x[r DOWN + i ALONG] and y is [count, COLUMNS]. Rows are
// rounded up to a multiple of 4. Of a LOWER x (zero for i > r) and an UPPER one (zero for i < r) most zeros are left out.
template <int COLUMNS, int DOWN, int ALONG, Shape SHAPE = WHOLE, bool ADDS = false>
inline void multiply(float* out, const float* x, const float* y, int rows, int count) {
  constexpr int WIDE = SUMS / 4, REST = COLUMNS / LANES % WIDE;
  int c = 0;
  for (; c + WIDE * LANES <= COLUMNS; c += WIDE * LANES)
    strip<WIDE, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out + c, x, y + c, rows, count);
  if (REST) strip<REST ? REST : 1, COLUMNS, DOWN, ALONG, SHAPE, ADDS>(out + c, x, y + c, rows, count);
}

// The transpose of a square, by swapping the off-diagonal quarters of ever smaller squares.
template <int D>
inline void transpose_square(vec (&x)[LANES]) {
  if constexpr (D > 0) {
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) {
      if (i & D) continue;
      const vec a = x[i], b = x[i + D];
      x[i] = lower<D>(a, b);
      x[i + D] = upper<D>(a, b);
    }
    transpose_square<D / 2>(x);
  }
}

// to [COLUMNS, ROWS] = from [ROWS, COLUMNS], both multiples of LANES.
template <int ROWS, int COLUMNS>
inline void transpose(const float* from, float* to) {
  for (int r = 0; r < ROWS; r += LANES)
    for (int c = 0; c < COLUMNS; c += LANES) {
      vec x[LANES];
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) x[i] = aligned(from + (r + i) * COLUMNS + c);
      transpose_square<LANES / 2>(x);
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) aligned(to + (c + i) * ROWS + r) = x[i];
    }
}

// Zeros above the diagonal, whatever stood there.
inline void keep_lower(float (&x)[TOKENS][TOKENS], int rows) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < TOKENS; ++j) x[i][j] = j <= i ? x[i][j] : 0;
}

inline void keep_below(float (&x)[TOKENS][TOKENS], int rows) {  // zeros on the diagonal, too
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < TOKENS; ++j) x[i][j] = j < i ? x[i][j] : 0;
}

}  // namespace
