// Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
// What the C++ kernels share: vectors as wide as the machine's registers, rows of a state, the tokens of a sequence.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Compilers pass vectors wider than a register through memory.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
constexpr int LANES = 4;
#define EACH_LANE(f) f(0), f(1), f(2), f(3)
#ifdef __aarch64__
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef float loose __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, f) __builtin_shufflevector(a, b, EACH_LANE(f))
#else
typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));
#define SHUFFLE(a, b, f) __builtin_shuffle(a, b, (lanes){EACH_LANE(f)})
#endif

// `lower` is a, but lanes whose number has the bit D take the lane of b that is D below. `upper` is b, but the other
// lanes take the lane of a that is D above.
#define FROM_BELOW(j) ((j) & D ? LANES + (j) - D : (j))
#define FROM_ABOVE(j) ((j) & D ? LANES + (j) : (j) + D)
template <int D>
inline vec lower(vec a, vec b) {
  return SHUFFLE(a, b, FROM_BELOW);
}
template <int D>
inline vec upper(vec a, vec b) {
  return SHUFFLE(a, b, FROM_ABOVE);
}

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

// LANES numbers of x from `place` on, zeros after the last of `size`.
inline vec take(const float* x, int64_t place, int64_t size) {
  vec found = {};
  if (place + LANES <= size) return *reinterpret_cast<const loose*>(x + place);
  std::memcpy(&found, x + place, (size - place) * sizeof(float));
  return found;
}

// 0 below -87, where exp ends.
inline vec sigmoid(vec x) {
  const vec y = 1 / (1 + exponential(-x));
  return x < -87.f - (vec){} ? (vec){} : y;
}

// The sums over the lanes of COUNT vectors, each in its own lane.
template <int COUNT>
inline vec sums_of(const vec* x) {
  if constexpr (COUNT == 1) {
    return *x;
  } else {
    constexpr int HALF = COUNT / 2;
    const vec a = sums_of<HALF>(x), b = sums_of<HALF>(x + HALF);
    return lower<HALF>(a, b) + upper<HALF>(a, b);
  }
}

// Key sizes are rounded up to whole vectors; rows beyond the key stay zero.
constexpr int rounded(int size) { return (size + LANES - 1) / LANES * LANES; }

#define EACH_PART(p) _Pragma("GCC unroll 8") for (int p = 0; p < PARTS; ++p)

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

// The tokens of a batch element that are not padding, in the order in which they are read.
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

// The heads of a batch element in groups, each of which one thread processes together: there is a group for every
// thread, and the states of a group fit into a second-level cache.
struct Groups {
  int64_t heads, size, count, total;  // heads of a group, groups of a row, groups

  Groups(int64_t batch, int64_t heads, int64_t threads, int64_t state_bytes) : heads(heads) {
    const int64_t rows = std::max<int64_t>(1, batch), most = std::max<int64_t>(1, heads);  // of an empty batch, too
    const int64_t wanted = std::min(most, (threads + rows - 1) / rows);
    size = std::min(std::max<int64_t>(1, (1 << 19) / state_bytes), (most + wanted - 1) / wanted);
    count = (heads + size - 1) / size;
    total = batch * count;
  }
};

struct Group {
  int64_t row, begin, end;  // of the heads

  Group(const Groups& groups, int64_t index)
      : row(index / groups.count),
        begin(index % groups.count * groups.size),
        end(std::min(groups.heads, begin + groups.size)) {}
};

}  // namespace
