// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// What the C++ kernels of recurrences share: vectors of 16 floats, rows of a state, the tokens of a text.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int CACHE = 40960;  // bytes of a state: most of a first-level cache

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(64)));
typedef float loose __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

inline float sum(vec x) {
  float total = 0;
  for (int j = 0; j < LANES; ++j) total += x[j];
  return total;
}

// exp(x) to 2e-7 of its value, from 2^-126 to 2^127.
inline vec exponential(vec x) {
  const vec high = 88.f - (vec){}, low = -87.f - (vec){};
  x = x < low ? low : x > high ? high : x;
  const vec shift = 12582912.f - (vec){};  // 1.5 * 2^23: adding it rounds
  const vec n = (x * 1.44269504f + shift) - shift;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = 1.f / 5040 - (vec){};
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = y * r + c;
  typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t))));
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return y * (vec)power;
}

// 0 below -87, where exp ends.
inline vec sigmoid(vec x) {
  const vec y = 1 / (1 + exponential(-x));
  return x < -87.f - (vec){} ? (vec){} : y;
}

inline vec pairs(vec a, vec b) {
  return SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
inline vec quads(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
inline vec eights(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
         SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
inline vec halves(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// The sums over the lanes of 16 vectors.
inline vec sums(const vec (&x)[LANES]) {
  vec e[2];
  for (int j = 0; j < 2; ++j) {
    const vec* y = x + 8 * j;
    e[j] = eights(quads(pairs(y[0], y[1]), pairs(y[2], y[3])), quads(pairs(y[4], y[5]), pairs(y[6], y[7])));
  }
  return halves(e[0], e[1]);
}

// Has SIZE numbers brought to the cache. The tokens of a head lie too far apart for the processor to foresee them.
template <int SIZE>
inline void fetch(const float* x) {
  for (int i = 0; i < SIZE; i += LANES) __builtin_prefetch(x + i);
}

// The largest number of vectors, `wanted` at most, that divides `value_size` and whose state of `rows` fits the cache.
constexpr int parts_of(int wanted, int rows, int value_size) {
  return value_size / LANES % wanted == 0 && (wanted == 1 || rows * wanted * LANES * 4 <= CACHE)
             ? wanted
             : parts_of(wanted - 1, rows, value_size);
}

// Key sizes are rounded up to whole vectors; rows beyond the key stay zero.
constexpr int rounded(int size) { return (size + LANES - 1) / LANES * LANES; }

// PARTS x LANES columns of a row of a state.
template <int PARTS>
struct RowOf {
  vec part[PARTS];
};

#define EACH_PART(p) _Pragma("GCC unroll 8") for (int p = 0; p < PARTS; ++p)

template <int PARTS>
inline void load(RowOf<PARTS>& row, const float* x) {
  EACH_PART(p) row.part[p] = *reinterpret_cast<const loose*>(x + p * LANES);
}

template <int PARTS>
inline void store(float* x, const RowOf<PARTS>& row) {
  EACH_PART(p) *reinterpret_cast<loose*>(x + p * LANES) = row.part[p];
}

template <int PARTS>
inline RowOf<PARTS> operator*(float a, RowOf<PARTS> x) {
  EACH_PART(p) x.part[p] *= a;
  return x;
}

template <int PARTS>
inline vec dot(const RowOf<PARTS>& x, const RowOf<PARTS>& y) {  // still to be summed over the lanes
  vec total = x.part[0] * y.part[0];
  for (int p = 1; p < PARTS; ++p) total += x.part[p] * y.part[p];
  return total;
}

// Independent sums, as many as hide the latency of an addition, into one.
template <int PARTS, int CHAINS>
inline RowOf<PARTS> joined(RowOf<PARTS> (&sums)[CHAINS]) {
  for (int c = 1; c < CHAINS; ++c) EACH_PART(p) sums[0].part[p] += sums[c].part[p];
  return sums[0];
}

// A number for each row of a state.
template <int SIZE>
struct ColumnOf {
  alignas(64) float at[rounded(SIZE)];

  void load(const float* x, float scale = 1) {
    for (int i = 0; i < SIZE; ++i) at[i] = scale * x[i];
    for (int i = SIZE; i < rounded(SIZE); ++i) at[i] = 0;
  }

  void clear() { std::memset(this, 0, sizeof(*this)); }
};

// x[first + j] = values[j] for the rows that there are.
template <int SIZE>
inline void write_to(float* x, int first, vec values) {
  std::memcpy(x + first, &values, (first + LANES <= SIZE ? LANES : SIZE - first) * sizeof(float));
}

// x[first + j] += scale * values[j] for the rows that there are.
template <int SIZE>
inline void add_to(float* x, int first, vec values, float scale = 1) {
  if (first + LANES <= SIZE) {
    *reinterpret_cast<loose*>(x + first) += scale * values;
  } else {
    for (int i = first; i < SIZE; ++i) x[i] += scale * values[i - first];
  }
}

// Writes, or adds to what is there.
template <int SIZE>
inline void hand_in(float* x, int first, vec values, bool adds) {
  adds ? add_to<SIZE>(x, first, values) : write_to<SIZE>(x, first, values);
}

// The tokens of a row that are no padding, in the order in which they are read.
struct Tokens {
  std::vector<int64_t> at;
  std::vector<char> begins;  // from an empty state
  bool ends_empty = false;   // a document began on padding at the end

  Tokens(int64_t row, int64_t length, const uint8_t* skip, const uint8_t* starts, bool reverse) {
    for (int64_t s = 0; s < length; ++s) {
      const int64_t t = row * length + (reverse ? length - 1 - s : s);
      ends_empty |= starts && starts[t];
      if (skip && skip[t]) continue;
      at.push_back(t);
      begins.push_back(ends_empty);
      ends_empty = false;
    }
  }

  int64_t count() const { return at.size(); }
};

}  // namespace
